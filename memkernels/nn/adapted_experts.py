"""Adapters of experts' weights, and experts that carry them behind a router that is elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels.nn.expert_mesh import draw_experts, held, sharded, take_shards
from memkernels.nn.lora_layer import check_adapter
from memkernels.ops.checks import check_parameter_dtype
from memkernels.ops.gated_activation.op import check_activation
from memkernels.ops.lora_linear.norm import row_tiles
from memkernels.ops.quantized.tensor import QuantizedTensor


class ExpertsLoRA(torch.nn.Module):
    """A low-rank adapter of experts' weights (E, out, in): lora_A, (E, r, in), and lora_B, (E, out, r).

    The weights with it are W[e] + scaling lora_B[e] lora_A[e]; nothing is saved for it but itself. Each expert's A is
    drawn as torch.nn.Linear draws its weight, and B is zero, so that at first it changes nothing.

    Args:
        weight: the weights, which it does not keep; with `expert_mesh` (E / ranks, out, in), those of this rank.
        r: rank, from 1 up.
        alpha: scaling is alpha / r.
        use_rslora: scaling is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        expert_mesh: the ranks that hold the experts, as `MoE` has it: lora_A and lora_B are DTensors of all of them.
        dtype: the adapter's; None: float32, or float64 if weight's is.

    Raises:
        TypeError: r is no int, alpha no number, or dtype not floating.
        ValueError: r or alpha is out of its range.
    """

    dropout_p = 0.0
    use_dora = False

    def __init__(
        self,
        weight: Tensor,
        r: int = 16,
        *,
        alpha: float = 32.0,
        use_rslora: bool = False,
        expert_mesh=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_adapter(r, alpha)
        check_parameter_dtype(dtype)
        experts, out, size = weight.shape
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.merged = False
        self._quantized: Tensor | None
        self.register_buffer("_quantized", None, persistent=False)  # the weights, while merged ones are in their place
        self.expert_mesh = expert_mesh
        options: dict[str, Any] = {
            "device": weight.device, "dtype": dtype or torch.promote_types(weight.dtype, torch.float32)
        }  # fmt: skip
        self.lora_A = torch.nn.Parameter(sharded(torch.empty(experts, r, size, **options), expert_mesh))
        self.lora_B = torch.nn.Parameter(sharded(torch.zeros(experts, out, r, **options), expert_mesh))
        draw_experts(self.lora_A, expert_mesh, partial(torch.nn.init.uniform_, a=-(size**-0.5), b=size**-0.5))

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def adapted(self, weight: Tensor) -> Tensor | ops.ExpertsLoRAWeight:
        """The weights with it, as `ops.moe_mlp` takes them; of the experts that this rank holds."""
        if self.merged:
            return weight
        lora_a, lora_b = (held(factor, self.expert_mesh) for factor in (self.lora_A, self.lora_B))
        return ops.ExpertsLoRAWeight(weight, lora_a, lora_b, self.scaling)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """The weights with it, rounded to their dtype, a tile of one expert's rows at a time.

        Dense ones are written in place, with `expert_mesh` by each rank its own. In the place of quantised ones come
        dense ones, since an adapter is finer than their steps, and they are kept for `unmerge`.

        Raises:
            ValueError: as `check_merge`.
        """
        self.check_merge()
        merged = weight
        if isinstance(weight, QuantizedTensor):
            dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            merged, self._quantized = sharded(dense, self.expert_mesh), weight.detach()
        self._add(weight, self.scaling, merged)
        self.merged = True
        return merged

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> Tensor:
        """The weights without it: merged ones written in place, to their rounding, or the quantised ones themselves.

        Raises:
            ValueError: it is not merged.
        """
        if not self.merged:
            raise ValueError("ExpertsLoRA: it is not merged.")
        quantized, self._quantized, self.merged = self._quantized, None, False
        if quantized is not None:
            return quantized
        self._add(weight, -self.scaling, weight)
        return weight

    def check_merge(self) -> None:
        """That it may be merged; with `expert_mesh` of the factors that this rank holds.

        Raises:
            ValueError: it is merged already, or not finite.
        """
        if self.merged:
            raise ValueError("ExpertsLoRA: it is merged already.")
        for name, parameter in self.named_parameters():
            if not bool(held(parameter, self.expert_mesh).isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers to merge, got others.")

    def _add(self, weight: Tensor, scaling: float, out: Tensor) -> None:
        """Writes weight + scaling B A into out, which may be weight, of the experts that this rank holds."""
        weight, out, lora_a, lora_b = (held(of, self.expert_mesh) for of in (weight, out, self.lora_A, self.lora_B))
        for expert, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            for tile, rows in _row_tiles(weight, expert):
                out[expert, tile].copy_(rows.addmm_(b[tile].to(rows.dtype), a.to(rows.dtype), alpha=scaling))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        take_shards(self, ("lora_A", "lora_B"), self.expert_mesh, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, use_rslora={self.use_rslora}, merged={self.merged}"


class AdaptedExperts(torch.nn.Module):
    """The experts of a transformers model by `ops.moe_mlp`, with adapters on their weights.

    Their weights keep the names that transformers gives them: gate_up_proj (E, 2 n, d), of ungated ones up_proj
    (E, n, d), and down_proj (E, d, n). `adapters` has an `ExpertsLoRA` under the name of each weight that has one.

    Args:
        gate_up: the weights of gate and up in one, or of up alone.
        down: down_proj.
        activation: silu, gelu, gelu_tanh, relu or relu_squared.
        gated: whether gate_up has a gate.
        replaced_class: that of the module whose place this takes, by which `memkernels.patch` knows the model's family.

    Raises:
        ValueError: an unknown activation.

    Saved for backward: as `ops.moe_mlp`; an adapter keeps nothing more.
    """

    def __init__(
        self,
        gate_up: torch.nn.Parameter,
        down: torch.nn.Parameter,
        activation: str = "silu",
        *,
        gated: bool = True,
        replaced_class: type[torch.nn.Module] | None = None,
    ):
        super().__init__()
        check_activation(activation)
        self.activation, self.gated, self.replaced_class = activation, gated, replaced_class
        for name, weight in zip(self.weight_names, (gate_up, down), strict=True):
            self.register_parameter(name, weight)
        self.adapters = torch.nn.ModuleDict()

    @property
    def weight_names(self) -> tuple[str, str]:
        return "gate_up_proj" if self.gated else "up_proj", "down_proj"

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, recompute: bool = True
    ) -> Tensor:
        """y, like hidden_states (T, d), for the experts (T, k) of each token and their weights (T, k).

        Raises:
            TypeError, ValueError, RuntimeError: as `ops.moe_mlp`.
        """
        adapters: Any = self.adapters
        weights: list[Any] = [getattr(self, name) for name in self.weight_names]
        for place, name in enumerate(self.weight_names):
            if name in adapters:
                weights[place] = adapters[name].adapted(weights[place])
        y = ops.moe_mlp(
            hidden_states, top_k_index, top_k_weights, *weights, activation=self.activation, recompute=recompute
        )
        return y.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gated={self.gated}"


def _row_tiles(weight: Tensor, expert: int):
    """`row_tiles` of one expert's weight (out, in)."""
    if not isinstance(weight, QuantizedTensor):
        return row_tiles(weight[expert])
    matrix, parts = weight.encoding.as_matrix(weight.parts)
    rows = range(expert * weight.shape[1], (expert + 1) * weight.shape[1])
    return matrix.row_tiles(parts, torch.promote_types(weight.dtype, torch.float32), rows)
