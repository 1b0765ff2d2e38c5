"""Which configurations of GPU kernels the gate compiles and counts; `make test-slow` has them all.

Of ops of many configurations, which differ in tiles and not in code, the gate has those of bfloat16, and of attention's
those of two head sizes, of which one is multiplied in parts. What attention launches besides with tiles that have such
a case already is compiled for one target, and not counted.
"""

from memkernels.testing.cases import KernelCase, Target

SWEPT = ("attention", "gated_mlp", "lora_linear", "moe", "quantized")
# What labels of attention end in.
BESIDES = (" packed", " sinks and window")
BESIDES_IN_GATE = tuple(
    f" {of}" for of in ("64 sm_90 packed", "64 sm_90 sinks and window", "192/128 sm_90", "32/256 sm_90")
)


def in_gate(op: str, case: KernelCase) -> bool:
    """Whether a case is compiled and counted for its targets of the gate."""
    if op not in SWEPT:
        return not any(size in case.label for size in ("16384", "17001", "20000", "32768", "40000"))
    if op == "attention" and (case.label.endswith(BESIDES) or not any(f" {size} " in case.label for size in (64, 256))):
        return False
    return "float32" not in case.label


def gate_targets(op: str, case: KernelCase) -> tuple[Target, ...]:
    """Those that the gate compiles: NVIDIA's with TMA, and AMD's."""
    if op == "attention" and case.label.endswith(BESIDES_IN_GATE):
        return case.targets
    return tuple(target for target in case.targets if in_gate(op, case) and target.name in ("sm_90", "gfx942"))
