"""The benchmarks run, on sizes that say nothing, and their reports are well-formed."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import bench, bench_gpu, figures
from benchmarks.engine import measuring_memory as memory
from benchmarks.engine.plain_torch import PlainTorch
from benchmarks.engine.subjects import GPT2_TINY, gpt2
from benchmarks.figures import Figure
from benchmarks.machine import Machine
from fedmezo_core.zo.noise import Distribution

ROOT = Path(__file__).parents[2]
ELEMENTS = 768 * 4


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def _check(measured: list[Figure], path: Path) -> None:
    figures.write(measured, path)
    rows = json.loads(path.read_text())
    assert rows
    for row in rows:
        assert set(row) == {"name", "value", "unit", "goal"}
        assert math.isfinite(row["value"])
        assert row["goal"] == "" or row["goal"].startswith(("at least ", "at most "))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert figures.read(path) == measured


@pytest.mark.parametrize("group", bench.groups(1))
def test_each_group_of_the_bench_runs(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak_here(way: str, tokens: int, *, tiny: bool) -> float:
        assert tiny
        memory.passes(gpt2(GPT2_TINY), way, tokens)()
        return 1.0

    # A process each takes seconds to start; the test below starts one.
    monkeypatch.setattr(memory, "peak_mb", peak_here)
    chosen = {group: bench.groups(ELEMENTS, tiny=True)[group]}
    _check(figures.collect(chosen.values()), tmp_path / "reports" / "bench.json")


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    assert memory.peak_mb("measurement", 16, tiny=True) > 100


def test_the_gpu_bench_runs_on_any_device(tmp_path: Path) -> None:
    _check(
        figures.collect(bench_gpu.groups(Machine(), ELEMENTS, tiny=True).values()),
        tmp_path / "gpu.json",
    )


def test_the_host_bench_counts_launches(tmp_path: Path) -> None:
    """In a process of its own, because here Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA path")
    script = (
        "import sys; from benchmarks import bench_host as bench, figures; from pathlib import Path;"
        "found = list(bench.figures(bench.LLAMA_TINY, turns=1));"
        "figures.write(found, Path(sys.argv[1]))"
    )
    path = tmp_path / "host.json"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, cwd=ROOT)
    measured = figures.read(path)
    _check(measured, tmp_path / "again.json")
    launches = [figure.value for figure in measured if figure.name.endswith(": launches of ours")]
    assert launches[0] > 1 < launches[1]
    assert launches[2:] == [1, 1, 0], "recorded measurements, and an evaluation"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_the_gpu_bench_says_that_there_is_no_gpu() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_gpu"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "needs a CUDA device" in run.stderr


def test_a_goal_that_is_missed_stands_out() -> None:
    missed = Figure("slow", 1.0, "G/s", "at least 2")
    reached = [Figure("fast", 3.0, "G/s", "at least 2"), Figure("small", 0.0, "MB", "at most 0")]
    assert missed.missed
    assert not any(figure.missed for figure in reached)
    text = io.StringIO()
    figures.show([missed, *reached], "title", Console(file=text, width=120))
    assert text.getvalue().count("missed") == 1
    assert (
        figures.markdown([missed]).splitlines()[-1]
        == "| slow | 1.00 | G/s | **missed**: at least 2 |"
    )


@pytest.mark.parametrize("distribution", Distribution)
def test_the_plain_way_comes_back_to_about_the_same_weights(distribution: Distribution) -> None:
    weights = [torch.randn(3, 5), torch.randn(7)]
    before = [tensor.clone() for tensor in weights]
    seen: list[list[torch.Tensor]] = []

    def loss() -> float:
        seen.append([tensor.clone() for tensor in weights])
        return float(sum(tensor.sum() for tensor in weights))

    PlainTorch(weights, distribution).measure(loss, 5, 0.5)
    for plus, minus, old, now in zip(*seen, before, weights, strict=True):
        assert torch.allclose((plus + minus) / 2, old, atol=1e-5)
        assert torch.allclose(now, old, atol=1e-5)
        assert not torch.allclose(plus, minus)
