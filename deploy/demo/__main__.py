"""The main job on one machine: a coordinator and its workers fine-tune a real model over gRPC.

python -m deploy.demo [--model NAME_OR_FOLDER] [--data FOLDER] [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from deploy.demo import summary as report
from deploy.demo.prepare import prepare
from deploy.demo.processes import Processes
from fedmezo_coordinator.programs.view import run_line, run_view, seconds_left
from fedmezo_core.errors import ConfigError, DivergedError, UnavailableError
from fedmezo_core.program import run_program
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import coordinator_pb2 as wire

HERE = Path(__file__).parent
CACHE = Path("build/cache")
OUTPUT = Path("build/demo")
REPORT = Path("build/reports/demo.json")
DATA_SUFFIXES = ("jsonl", "csv", "parquet")
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run on what."""

    settings: dict[str, Any]
    model: str
    workers: dict[str, Path]
    """Worker's name -> its private data."""
    heldout: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="Hugging Face name or model folder")
    parser.add_argument("--data", default="", help="folder with *.train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=1, help="seed of the run")
    parser.add_argument("--rounds", type=int, help="rounds, if not demo.toml's")
    given = parser.parse_args(arguments)
    return run_program("demo", lambda: demo(plan(given)))


def plan(given: argparse.Namespace) -> Plan:
    """Settings from demo.toml and the command line; fetches what the defaults need."""
    settings = tomllib.loads((HERE / "demo.toml").read_text())
    model = given.model or settings.pop("model") or str(CACHE / "models/smollm2-135m")
    data = Path(given.data or settings.pop("data") or CACHE / "data/vader")
    settings = {key: value for key, value in settings.items() if key not in ("model", "data")}
    if Path(model).is_relative_to(CACHE) or data.is_relative_to(CACHE):
        prepare(CACHE)
    workers = {
        _worker_name(path): path
        for suffix in DATA_SUFFIXES
        for path in sorted(data.glob(f"*.train.{suffix}"))
    }
    heldout = [path for suffix in DATA_SUFFIXES for path in data.glob(f"heldout.{suffix}")]
    if not workers or not heldout:
        raise ConfigError(
            f"{data} must hold a heldout.jsonl (or .csv, .parquet) and one <worker>.train.jsonl for "
            "each worker; see docs/data.md."
        )
    settings["run"] |= {
        "seed": given.seed,
        "workers_min": len(workers),
        "quorum": len(workers),
        "cohort_size_max": len(workers),
    }
    if given.rounds is not None:
        settings["run"]["rounds"] = given.rounds
    return Plan(settings, model, workers, heldout[0])


def _worker_name(path: Path) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", path.name.split(".")[0].lower()).strip("-")[:64] or "worker"


def demo(what: Plan) -> None:
    """Run it all and report."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    started_s = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C does: the processes must not outlive a closed terminal.
        signal.signal(number, signal.default_int_handler)
    with Processes(OUTPUT) as federation:
        _start(federation, what)
        status = asyncio.run(_watch(federation))
        run_s = time.monotonic() - started_s
    report.print_table(status, run_s)
    report.write_json(report.figures(status, run_s), REPORT)
    report.write_plot(status, OUTPUT / "demo.png")
    print(
        f"\nplot      {OUTPUT / 'demo.png'}\nfigures   {REPORT}\nlogs      {OUTPUT}/*.log\n"
        f"journal   {OUTPUT / 'journal.db'}\n\nTake the model home as a Hugging Face folder:\n"
        f"  {Path(sys.executable).parent / 'fedmezo'} export build/demo/model --journal "
        f"{OUTPUT / 'journal.db'} --model {what.model}"
    )
    final = {d.weights_digest for d in status.digests if d.round == status.round}
    if len(final) != 1 or status.divergences:
        raise DivergedError("Not all parties hold the same weights; the logs say who differs.")


def _start(federation: Processes, what: Plan) -> None:
    federation.start(
        "coordinator",
        "fedmezo_coordinator",
        [
            *("--listen", federation.address),
            *("--journal", str(OUTPUT / "journal.db")),
            *("--model", what.model),
            *("--heldout", str(what.heldout)),
            *("--evaluate-every-rounds", str(what.settings["evaluate_every_rounds"])),
            *("--run", json.dumps(what.settings["run"])),
        ],
    )
    for name, data in what.workers.items():
        federation.start(
            f"worker-{name}",
            "fedmezo_worker",
            [
                *("--coordinator", federation.address),
                *("--name", name),
                *("--data", str(data)),
                *("--model", what.model),
                *("--threads", "1"),
            ],
        )


async def _watch(federation: Processes) -> wire.GetStatusResponse:
    """Show the run until it is finished, evaluated and digested by everyone."""
    console = Console()
    parties = len(federation.children)
    first_seen: tuple[int, float] | None = None
    told = -1
    status = wire.GetStatusResponse()
    async with CoordinatorClient(federation.address) as client:
        print(
            "starting: the coordinator loads the model to name its base, then the workers load it"
        )
        with Live(console=console, auto_refresh=False) as live:
            while not _is_complete(status, parties):
                await asyncio.sleep(LOOK_EVERY_S)
                federation.check()
                try:
                    status = await client.get_status()
                except UnavailableError:
                    if first_seen is not None:
                        raise
                    continue
                first_seen = first_seen or (status.round, time.monotonic())
                left = seconds_left(status, first_seen, time.monotonic())
                if console.is_terminal:
                    live.update(run_view(status, seconds_left=left), refresh=True)
                elif status.round > told:
                    told = status.round
                    print(run_line(status, left), flush=True)
        await asyncio.to_thread(federation.wait_workers)
        federation.check()
    return status


def _is_complete(status: wire.GetStatusResponse, parties: int) -> bool:
    """Finished, with a final digest of every worker and the replica, and a final evaluation."""
    if status.phase != wire.PHASE_FINISHED:
        return False
    digests = [digest for digest in status.digests if digest.round == status.round]
    return len(digests) == parties and status.evaluations[-1].round == status.round


if __name__ == "__main__":
    sys.exit(main())
