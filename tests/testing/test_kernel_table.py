"""memkernels.testing.kernel_table: rows of one op into a table of all, and current ones kept."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memkernels.testing import kernel_table
from memkernels.testing.cases import kernel_cases, ops_with_triton


@pytest.fixture
def write(monkeypatch, tmp_path):
    """write(run, *arguments, **sources): the table that a run writes, whose rows say which run computed them.

    sources: of ops whose cases follow from something else than those of the others.
    """

    def write(run, *arguments, **sources):
        def computed(table):
            return lambda rows: {row: [kernel_table._line(*row, table, run)] for row in rows}

        def case_sources(ops):
            return {op: {case.label: sources.get(op, "as before") for case in kernel_cases(op)} for op in ops}

        monkeypatch.setattr(kernel_table, "case_sources", case_sources)
        monkeypatch.setattr(kernel_table, "_resources_lines", computed("resources"))
        monkeypatch.setattr(kernel_table, "_traffic_lines", computed("traffic"))
        kernel_table.main([*arguments, "--output", str(tmp_path / "kernels.md")])
        return (tmp_path / "kernels.md").read_text()

    return write


def rows_of(table, op, run):
    return sum(line.startswith(f"| {op} |") and line.endswith(f" {run} |") for line in table.splitlines())


def test_only_rows_that_follow_from_something_else_are_computed_again(write):
    first = write("first")
    assert write("second") == first
    third = write("third", rotary="a change", rms_norm="a change")
    assert third.replace("a change", "as before").replace("third", "first") == first
    for op in ops_with_triton():
        changed = op in ("rotary", "rms_norm")
        assert rows_of(third, op, "third" if changed else "first") == 2 * len(kernel_cases(op))


def test_rows_of_one_op_replace_its_own_and_keep_those_of_others(write, tmp_path):
    first = write("first")
    second = write("second", "--op", "rms_norm", rms_norm="a change", rotary="a change")
    assert second.count("second") == rows_of(second, "rms_norm", "second") == 2 * len(kernel_cases("rms_norm"))
    assert second.replace("second", "first").replace("a change", "as before") == first
    (tmp_path / "kernels.md").unlink()
    alone = write("third", "--op", "rotary")
    assert "third" in alone and "first" not in alone and "| rms_norm" not in alone


@pytest.mark.slow
def test_sources_are_the_same_in_every_process():
    first, second = (kernel_table.case_sources(ops_with_triton()) for _ in range(2))
    assert first == second and len({source for of in first.values() for source in of.values()}) > 800
