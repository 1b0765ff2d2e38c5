from memkernels.bench import plot
from memkernels.bench.results import Row, write


def test_a_png_stands_beside_each_csv(tmp_path, capsys):
    machine = {"machine": "Some CPU", "torch": "2.13.0"}
    rows = [
        Row("rms_norm", "T4-d8", dtype, mode, provider, "eager", ms, ms, ms, ms / 2 if ms else 0.5, **machine)
        for dtype in ("float32", "bfloat16")
        for mode, ms in (("forward", 1.0), ("full", 2.0), ("memory", None))
        for provider in ("eager", "memkernels")
    ]
    path = tmp_path / "some-cpu" / "rms_norm.csv"
    write(path, rows)
    assert plot.main(["--results", str(tmp_path)]) == 0
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert capsys.readouterr().out.strip() == str(path.with_suffix(".png"))
