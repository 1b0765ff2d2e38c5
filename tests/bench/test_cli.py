"""A whole run of a small benchmark: two providers, one that is missing."""

import argparse
import textwrap

import pytest
import torch

from memkernels.bench import cli, machine, report
from memkernels.bench.results import read
from memkernels.bench.step import TIME_MODES

BENCHMARK = """
    import torch

    from memkernels.bench import Benchmark, Case, Step, Work


    def setup(case, provider):
        if provider == "memkernels":
            from memkernels.no_such_op import no_such_function
        torch.set_num_threads(THREADS or torch.get_num_threads())
        x, y = (torch.ones(case.sizes["n"], requires_grad=True) for _ in range(2))
        copied = {"eager": lambda: x * 1.0, "single": lambda: x, "wrong": lambda: x * 2.0}[provider]
        return Step(lambda: copied().sum() + y.sum(), (x, y))


    benchmark = Benchmark(
        op="total",
        cases=(Case("n4M", torch.float32, {"n": 4 << 20}),),
        providers=PROVIDERS,
        setup=setup,
        work=lambda case, mode: Work(bytes=2 * 4 * case.sizes["n"]),
        modes=MODES,
    )
"""


@pytest.fixture
def run(tmp_path):
    def run(providers, *arguments, modes=TIME_MODES, threads=0):
        (tmp_path / "ops").mkdir(exist_ok=True)
        source = textwrap.dedent(BENCHMARK)
        for name, value in (("PROVIDERS", providers), ("MODES", modes), ("THREADS", threads)):
            source = source.replace(name, repr(value))
        (tmp_path / "ops" / "total.py").write_text(source)
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        return cli.run(parser.parse_args([*arguments, "--benchmarks", str(tmp_path)]))

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def results(tmp_path):
    return read(tmp_path / "results" / machine.slug(machine.describe()) / "total.csv")


def test_a_run_writes_every_mode_of_every_provider(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "Plan", lambda: cli._QUICK)
    assert run(("eager", "single")) == 0
    rows = {(row.mode, row.provider): row for row in results(tmp_path)}
    modes = {"forward", "backward", "full", "memory", "memory_with_gradients"}
    assert set(rows) == {(mode, provider) for mode in modes for provider in ("eager", "single")}
    tensor = 4 * (4 << 20)
    peaks = {key: row.peak_bytes / tensor for key, row in rows.items() if row.peak_bytes is not None}
    assert peaks["memory_with_gradients", "single"] == pytest.approx(2, rel=0.05)  # two gradients
    assert peaks["memory", "single"] == pytest.approx(0, abs=0.05)  # the gradients were there before
    assert peaks["memory", "eager"] == pytest.approx(1, rel=0.05)  # the copy
    for row in rows.values():
        assert row.saved_bytes in (0, None)
        if row.mode == "forward":
            assert row.gb_per_s == pytest.approx(2 * tensor / row.median_ms / 1e6, rel=1e-3)


def test_memory_alone_compares_providers_that_compute_different_things(run, tmp_path):
    assert run(("eager", "wrong"), modes=()) == 0
    assert {row.mode for row in results(tmp_path)} == {"memory", "memory_with_gradients"}


def test_what_a_benchmark_says_that_providers_hold(tmp_path):
    (tmp_path / "steps").mkdir()
    source = """
        import torch
        from memkernels.bench import Benchmark, Case

        SIZES = {"formula": 10_000_000, "measured": 11_000_000}
        benchmark = Benchmark(op="total", cases=(Case("one", torch.float32),), providers=tuple(SIZES),
                              held=lambda case, provider: SIZES[provider], baseline="formula", modes=())
    """
    (tmp_path / "steps" / "total.py").write_text(textwrap.dedent(source))
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args(["--benchmarks", str(tmp_path)])) == 0
    rows = {row.provider: row for row in results(tmp_path)}
    assert [row.mode for row in rows.values()] == ["memory"] * 2
    assert (rows["measured"].ratio_to_baseline, rows["measured"].peak_bytes) == (1.1, 11_000_000)
    assert "formula 10 MB, measured 1.10x | not measured |" in report.render(rows.values())


def test_no_memory_is_measured_of_what_has_no_backward(run, tmp_path):
    assert run(("eager", "single"), modes=("forward",)) == 0
    assert {row.mode for row in results(tmp_path)} == {"forward"}


def test_what_takes_fewer_threads_is_filed_under_their_number(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMKERNELS_BENCH_THREADS", "2")
    monkeypatch.setattr(cli, "Plan", lambda: cli._QUICK)
    assert run(("eager", "single"), "--mode", "time", modes=("forward",), threads=1) == 0
    (path,) = (tmp_path / "results").glob("*/*.csv")
    assert path.parent.name.endswith("-1-threads")
    assert {machine.slug(row.machine) for row in read(path)} == {path.parent.name}


def test_a_missing_provider_is_a_message_and_a_status(run, capsys):
    assert run(("eager", "single", "memkernels"), "--quick", "--mode", "time") == 1
    out = capsys.readouterr().out
    assert "memkernels: unavailable: No module named 'memkernels.no_such_op'" in out
    assert "single" in out.split("median ms")[1]


def test_nothing_to_compare_with_gives_no_figure(run, capsys, tmp_path):
    assert run(("eager", "memkernels")) == 1
    assert "no ratio to eager: available are eager" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_providers_that_disagree_are_refused(run):
    with pytest.raises(RuntimeError, match=r"wrong differs from eager by 0\.5 of its norm"):
        run(("eager", "wrong"), "--quick", "--mode", "time")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "op must be among total, got nothing"), (["--case", "n5"], "--case 'n5' matches no case of total")],
)
def test_a_wrong_name_is_refused(run, capsys, arguments, message):
    assert run(("eager", "single"), *arguments) == 2
    assert message in capsys.readouterr().err
