from pathlib import Path

import pytest

from memkernels.bench import machine, report
from memkernels.bench.results import Row, read, write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def rows(ratio=0.31, case="T4-d8"):
    common = {"machine": "Some CPU, 2 cores", "torch": "2.13.0"}
    return [
        Row("rms_norm", case, "float32", "full", "eager", "eager", median_ms=12.0, ratio_to_baseline=1.0, **common),
        Row("rms_norm", case, "float32", "full", "memkernels", "eager", ratio_to_baseline=ratio, **common),
        Row(
            "rms_norm", case, "float32", "memory", "eager", "eager",
            ratio_to_baseline=1.0, peak_bytes=101_000_000, saved_bytes=33_600_000, **common,
        ),
        Row(
            "rms_norm", case, "float32", "memory", "memkernels", "eager",
            ratio_to_baseline=0.25, peak_bytes=25_000_000, saved_bytes=16_800_000, **common,
        ),
    ]  # fmt: skip


(SHOWN,) = report.SHOWN["rms_norm"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    write(tmp_path / "benchmarks/results/some-cpu/rms_norm.csv", rows() + rows(case=SHOWN))
    (tmp_path / "README.md").write_text(f"# Title\n\n{report.START}\n{report.END}\n\nThe rest.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_figures_are_rendered_as_ratios_beside_the_baseline(clone):
    assert report.main([]) == 0
    text = (clone / "README.md").read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe rest.\n")
    cells = "eager 12 ms, memkernels 0.31x | eager 101 MB, memkernels 0.25x | eager 33.6 MB, memkernels 16.8 MB |"
    assert f"| rms_norm | {SHOWN}, float32 | {cells}" in text
    assert "Some CPU, 2 cores; torch 2.13.0:" in text
    assert "T4-d8" not in text
    whole = (clone / "benchmarks/results/README.md").read_text()
    assert f"| rms_norm | {SHOWN}, float32 | {cells}" in whole and f"| rms_norm | T4-d8, float32 | {cells}" in whole


def test_every_shown_case_has_results():
    found = {(row.op, row.case) for row in report.read_results(RESULTS)}
    assert {(op, case) for op, cases in report.SHOWN.items() for case in cases} <= found


def test_results_lie_in_the_folder_of_their_machine():
    for path in RESULTS.glob("*/*.csv"):
        assert {machine.slug(row.machine) for row in read(path)} == {path.parent.name}


def test_what_has_no_backward_shows_its_forward():
    common = {"machine": "Some CPU", "torch": "2.13.0", "median_ms": 3.0, "ratio_to_baseline": 1.0}
    forward = Row("codec", "n8", "float32", "forward", "copy", "copy", **common)
    assert "| codec | n8, float32 | copy 3 ms | not measured |" in report.render([forward])
    full = Row("codec", "n8", "float32", "full", "copy", "copy", **common | {"median_ms": 5.0})
    assert "copy 5 ms" in report.render([forward, full])


def test_check_passes_on_a_fresh_readme_and_fails_on_a_stale_one(clone, capsys):
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    write(clone / "benchmarks/results/some-cpu/rms_norm.csv", rows(ratio=0.32, case=SHOWN))
    before = (clone / "README.md").read_text()
    assert report.main(["--check"]) == 1
    told = capsys.readouterr().err
    assert "\nbenchmarks/results/README.md disagrees" in told and told.startswith("README.md disagrees")
    assert (clone / "README.md").read_text() == before


def test_the_readme_agrees_with_the_committed_results():
    assert report.main(["--check", "--readme", f"{ROOT}/README.md", "--results", f"{RESULTS}"]) == 0


def test_the_readme_begins_with_the_committed_figures_of_a_llama():
    lines = (ROOT / "README.md").read_text().splitlines()
    place = ("llama", "d1024-f2816-L6-V32000-T2048", "memkernels-sublayer")
    found = [row for row in report.read_results(RESULTS) if (row.op, row.case, row.provider) == place]
    for dtype in ("bfloat16", "float32"):
        (line,) = [line for line in lines if line.startswith(f"| {dtype}; ")]
        for cell, mode in zip(line.split("|")[2:4], ("memory", "full"), strict=True):
            ratios = sorted(f"{row.ratio_to_baseline:.2f}x" for row in found if (row.dtype, row.mode) == (dtype, mode))
            assert cell.strip() == " to ".join(dict.fromkeys((ratios[0], ratios[-1]))), (dtype, mode)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        report.update("# Title\n", rows())
