"""memkernels.testing.kernel_table: rows of one op into a table of all."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memkernels.testing import kernel_table


def test_rows_of_one_op_replace_its_own_and_keep_those_of_others(monkeypatch, tmp_path):
    written = tmp_path / "kernels.md"

    def write(run, *arguments):
        def rows(table):
            return lambda cases: [f"| {op} | {table} {run} |" for op in dict.fromkeys(op for op, _ in cases)]

        monkeypatch.setattr(kernel_table, "_resources_lines", rows("resources"))
        monkeypatch.setattr(kernel_table, "_traffic_lines", rows("traffic"))
        kernel_table.main([*arguments, "--output", str(written)])
        return written.read_text()

    first, second = write("first"), write("second", "--op", "rms_norm")
    expected = first.replace("| rms_norm | resources first |", "| rms_norm | resources second |")
    assert second == expected.replace("| rms_norm | traffic first |", "| rms_norm | traffic second |") != first
    (tmp_path / "kernels.md").unlink()
    alone = write("third", "--op", "rotary")
    assert alone.count("third") == 2 and "first" not in alone
