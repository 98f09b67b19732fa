"""The main job on one machine: a coordinator and its workers fine-tune a real model over gRPC.

python -m deploy.demo [--model NAME_OR_FOLDER] [--data FOLDER] [--seed N] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
import tomllib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from deploy.demo import summary
from deploy.demo.inputs import Inputs, last_widening_layer, write_inputs, write_settings
from deploy.demo.prepare import prepare
from deploy.demo.processes import Processes
from fedmezo_coordinator.coordinator_settings import model_label
from fedmezo_coordinator.programs.view import Pace, run_line, run_view
from fedmezo_core.config import NEWEST_TEMPLATE_VERSION, TaskConfig, parse_run
from fedmezo_core.errors import DivergedError, UnavailableError
from fedmezo_core.program import run_program
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire

HERE = Path(__file__).parent
CACHE = Path("build/cache")
OUTPUT = Path("build/demo")
ADAPTER = OUTPUT / "adapter"
LINE_EVERY_ROUNDS = 10
"""Without a terminal, rounds after which a line is printed even without an evaluation."""
JOURNAL = OUTPUT / "journal.db"
SETTINGS = OUTPUT / "coordinator.toml"
REPORT = Path("build/reports/demo.json")
LOOK_EVERY_S = 0.5
LINE_COLUMNS = 80
"""Columns of a terminal; what is printed is wrapped to fit them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run on what."""

    coordinator: dict[str, Any]
    """Settings of the coordinator, without those that name files of this run."""
    model: str
    inputs: Inputs
    is_default: bool
    """Whether model and data are the demo's own, so that the experiments' results compare."""


@dataclass(slots=True)
class Timing:
    """How long what has been done so far took, in wall time and in CPU time of all processes."""

    began_s: float = field(default_factory=time.monotonic)
    began_cpu_s: float = field(default_factory=lambda: _cpu_s())

    def wall_s(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self.began_s

    def cpu_s(self) -> float:
        """CPU seconds since then, of this process and of its children that have ended."""
        return _cpu_s() - self.began_cpu_s


def _cpu_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="Hugging Face name or model folder")
    parser.add_argument("--data", default="", help="folder with *.train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=1, help="seed of the run")
    parser.add_argument("--rounds", type=int, help="rounds, if not demo.toml's")
    given = parser.parse_args(arguments)
    return run_program("demo", lambda: _demo_until_stopped(given))


def _demo_until_stopped(given: argparse.Namespace) -> None:
    """The demo; Ctrl-C and the signals that `demo` turns into it end it with one line."""
    try:
        demo(given)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # The terminal may be closed.
            print(
                "demo: stopped, and all its processes have ended; run the same command again to "
                "begin anew.",
                file=sys.stderr,
            )
        raise


def plan(given: argparse.Namespace, output: Path = OUTPUT) -> Plan:
    """Settings from demo.toml and the command line; fetches what the defaults need.

    Writes the rows that workers and fit get to `output`. Raises as `write_inputs` and
    `last_widening_layer` do.
    """
    settings = tomllib.loads((HERE / "demo.toml").read_text(encoding="utf-8"))
    own_model = given.model or settings["model"]
    own_data = given.data or settings["data"]
    if not (own_model and own_data):
        prepare(CACHE)
    model = own_model or str(CACHE / "models/smollm2-135m")
    run = settings["coordinator"]["run"]
    inputs = write_inputs(
        Path(own_data or CACHE / "data/vader"),
        TaskConfig(**{"template_version": NEWEST_TEMPLATE_VERSION, **run["task"]}),
        output / "data",
        rows_max=settings["rows_max"],
        texts_max=settings["texts_max"],
    )
    lora = run["lora"]
    if "target_modules" not in lora:
        name, width = last_widening_layer(model)
        lora["target_modules"] = [name]
        # As many directions as the fit can find.
        lora["rank"] = min(lora["rank"], width // 2, max(1, inputs.text_count // 2))
        lora["alpha"] = lora["rank"]
    everyone = len(inputs.workers)
    run |= {
        "seed": given.seed,
        "workers_min": everyone,
        "quorum": everyone,
        "cohort_size_max": everyone,
    }
    is_default = not (own_model or own_data)
    if is_default:
        run.setdefault("learning_rate", settings["learning_rate"])
    if given.rounds is not None:
        run["rounds"] = given.rounds
    parse_run({"model": "demo", **run}, "deploy/demo/demo.toml")
    return Plan(settings["coordinator"], model, inputs, is_default)


def demo(given: argparse.Namespace) -> None:
    """Run it all and report."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C does: the processes must not outlive a closed terminal.
        signal.signal(number, signal.default_int_handler)
    what = plan(given)
    # Only now: a wrong name on the command line leaves the last demo alone.
    for old in OUTPUT.iterdir():
        if old.is_dir() and old.name != "data":
            shutil.rmtree(old)
        elif old.is_file():
            old.unlink()
    console = Console()
    timing = Timing()
    with Processes(OUTPUT) as federation:
        _introduce(what)
        _fit(federation, what, console)
        _start(federation, what)
        status = asyncio.run(_watch(federation, what, console))
        wall_s = timing.wall_s()
    cpu_s = timing.cpu_s()
    summary.print_tables(status, wall_s, cpu_s, with_back_propagation=what.is_default)
    summary.write_json(summary.figures(status, wall_s, cpu_s), REPORT)
    summary.write_plot(status, OUTPUT / "demo.png", with_back_propagation=what.is_default)
    print()
    _say(f"Plot: {OUTPUT / 'demo.png'}. Figures: {REPORT}. Logs: {OUTPUT}/*.log.")
    _say("Take the model home as a Hugging Face folder (with --as adapter, the adapter alone):")
    print(
        f"  {Path(sys.executable).parent / 'fedmezo'} export my-model "
        f"--journal {JOURNAL} \\\n    --model {what.model} --adapter {ADAPTER}"
    )
    final = {d.weights_digest for d in status.digests if d.round == status.round}
    if len(final) != 1 or status.divergences:
        raise DivergedError("Not all parties hold the same weights; the logs say who differs.")


def _say(text: str) -> None:
    """Print a paragraph with lines that fit a terminal; only a longer word is longer."""
    lines = textwrap.fill(
        text,
        LINE_COLUMNS,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    print(lines, flush=True)


def _introduce(what: Plan) -> None:
    inputs, run = what.inputs, what.coordinator["run"]
    _say(
        f"{len(inputs.workers)} workers ({', '.join(inputs.workers)}) train "
        f"{model_label(what.model)} for {run['rounds']} rounds, each on rows of its own: "
        f"{', '.join(map(str, inputs.rows.values()))} of the {inputs.rows_found:,} in the data."
    )


def _fit(federation: Processes, what: Plan, console: Console) -> None:
    """Fit the adapter that the run begins from, as a user would, and say so."""
    lora, inputs = what.coordinator["run"]["lora"], what.inputs
    [*_, layer] = lora["target_modules"]
    whose = "set aside from the workers' rows" if inputs.texts_are_set_aside else "of the data"
    settings = {
        **what.coordinator,
        "listen": federation.address,
        "journal": str(JOURNAL),
        "model": what.model,
        "heldout": str(inputs.heldout),
    }
    write_settings(SETTINGS, settings)
    began_s = time.monotonic()
    message = f"fitting an adapter to {inputs.text_count} texts"
    with console.status(message) if console.is_terminal else nullcontext():
        federation.run(
            "fit",
            "fedmezo_coordinator.programs.fedmezo_command",
            [
                *("adapter", str(ADAPTER)),
                *("--config", str(SETTINGS)),
                *("--data", str(inputs.texts)),
                *("--threads", str(min(2, os.cpu_count() or 1))),
            ],
        )
    _say(
        f"Fitted an adapter of rank {lora['rank']} on {layer} "
        f"to {inputs.text_count} texts {whose} in {time.monotonic() - began_s:.0f} s, without "
        "their labels (docs/decisions/0015)."
    )


def _start(federation: Processes, what: Plan) -> None:
    federation.start(
        "coordinator",
        "fedmezo_coordinator",
        ["--config", str(SETTINGS), "--adapter", str(ADAPTER)],
    )
    for name, data in what.inputs.workers.items():
        federation.start(
            f"worker-{name}",
            "fedmezo_worker",
            [
                *("--coordinator", federation.address),
                *("--name", name),
                *("--data", str(data)),
                *("--model", what.model),
                *("--adapter", str(ADAPTER)),
                *("--threads", "1"),
            ],
        )


async def _watch(federation: Processes, what: Plan, console: Console) -> wire.GetStatusResponse:
    """Show the run until it is finished, evaluated and digested by everyone."""
    parties = len(federation.children)
    pace = Pace()
    has_answered = False
    told: wire.GetStatusResponse | None = None
    status = wire.GetStatusResponse()
    _say(
        "Now everyone loads the model. The first rounds take longest: the frozen layers are "
        "computed once for each row and kept."
    )
    async with CoordinatorClient(federation.address) as client:
        loading = Spinner("dots", "loading the model")
        with Live(loading, console=console) if console.is_terminal else nullcontext() as live:
            while not _is_complete(status, parties):
                await asyncio.sleep(LOOK_EVERY_S)
                federation.check()
                try:
                    status = await client.get_status()
                except UnavailableError:
                    if has_answered:
                        raise
                    continue
                if not has_answered and "learning_rate" not in what.coordinator["run"]:
                    rate = (await client.get_run()).genesis.config.learning_rate
                    _say(
                        f"The coordinator chose the learning rate {rate:g} for this model and "
                        "these rows (docs/choosing.md)."
                    )
                has_answered = True
                left = pace.seconds_left(status, time.monotonic())
                if live is not None:
                    live.update(run_view(status, seconds_left=left))
                elif _is_news(status, told):
                    told = status
                    _say(run_line(status, left))
        await asyncio.to_thread(federation.wait_workers)
        federation.check()
    return status


def _is_news(status: wire.GetStatusResponse, told: wire.GetStatusResponse | None) -> bool:
    """Whether a line is due: after an evaluation, after some rounds, or at a pause."""
    if told is None or len(status.evaluations) > len(told.evaluations):
        return True
    if status.round >= told.round + LINE_EVERY_ROUNDS:
        return True
    return status.phase != told.phase and status.phase == wire.PHASE_PAUSED


def _is_complete(status: wire.GetStatusResponse, parties: int) -> bool:
    """Finished, with a final digest of every worker and the replica, and a final evaluation."""
    if status.phase != wire.PHASE_FINISHED:
        return False
    digests = [digest for digest in status.digests if digest.round == status.round]
    return len(digests) == parties and status.evaluations[-1].round == status.round


if __name__ == "__main__":
    sys.exit(main())
