import pytest

from memkernels.bench.results import COLUMNS, Row, merge, read, write


def row(provider="eager", mode="full", **values):
    return Row("rms_norm", "T4-d8", "float32", mode, provider, "eager", **values)


def test_rows_survive_a_round_trip(tmp_path):
    rows = [
        row(median_ms=1.25, p10_ms=1.0, p90_ms=2.5, ratio_to_baseline=1.0, machine="X, 2 cores", torch="2.13.0+cpu"),
        row("memkernels", "memory", peak_bytes=123456789, saved_bytes=0, commit="abc-dirty", date="2026-11-24"),
    ]
    path = tmp_path / "machine" / "rms_norm.csv"
    write(path, rows)
    assert read(path) == rows


def test_the_schema_is_fixed(tmp_path):
    path = tmp_path / "rms_norm.csv"
    write(path, [])
    expected = (
        "op,case,dtype,mode,provider,baseline,median_ms,p10_ms,p90_ms,ratio_to_baseline,gb_per_s,gflop_per_s,"
        "peak_bytes,saved_bytes,machine,torch,commit,date"
    )
    assert path.read_text() == expected + "\n"
    assert ",".join(COLUMNS) == expected


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "rms_norm.csv"
    path.write_text("op,case\nrms_norm,T4\n")
    with pytest.raises(ValueError, match="columns must be"):
        read(path)


def test_merge_replaces_whole_groups_and_keeps_the_others(tmp_path):
    path = tmp_path / "rms_norm.csv"
    write(path, [row(median_ms=1.0), row("compile", median_ms=2.0), row(mode="forward", median_ms=3.0)])
    merge(path, [row(median_ms=4.0), row("memkernels", median_ms=5.0)])
    found = {(r.mode, r.provider): r.median_ms for r in read(path)}
    assert found == {("forward", "eager"): 3.0, ("full", "eager"): 4.0, ("full", "memkernels"): 5.0}
