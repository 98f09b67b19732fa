"""Every target in turn on all cores: `make fuzz MINUTES=n`; build/reports/fuzz.json.

    python -m tests.fuzz --minutes 10 --seed 1

Ends with 1 if an input was neither read nor refused, or changed what it may not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.figures import REPORTS, Figure, show, write
from tests.fuzz.engine import LATE_S, InputInHand, input_in_hand
from tests.fuzz.targets import TARGETS

MINUTES: Final = 10.0
SHARES: Final = {"calls": 4.0, "streams": 2.0, "responses": 7.0, "journals": 6.0, "copies": 6.0}
"""Time of a target as a multiple of the others'."""
GUIDED_SHARE: Final = 1 / 3
"""Part of a target's time in which coverage guides the changes; without it they come faster."""
GOALS: Final = {"messages": 1_000_000, "journals": 100_000}
FINDINGS: Final = REPORTS.parent / "fuzz"


def fuzz(name: str, seconds: float, seed: int, guided: bool, folder: Path) -> dict[str, Any]:
    """What one process found."""
    report = folder / f"{name}-{seed}.json"
    said = report.with_suffix(".stderr")
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.fuzz.engine", name, "--seconds", f"{seconds:.1f}"),
                *(() if guided else ("--unguided",)),
                *("--seed", str(seed), "--report", report, "--findings", FINDINGS / name),
            ],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
        )
    try:
        # One that is late ends by itself and says where it was; this is for one that cannot.
        code = str(process.wait(seconds + 2 * LATE_S))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = "nothing in time"
    found: dict[str, Any] = {"executions": 0, "messages": 0, "cpu_s": 0.0, "findings": []}
    if report.exists():
        found = json.loads(report.read_text())
    if code != "0":
        found["findings"].append(f"{name}, seed {seed}: the process ended with {code}")
        if data := InputInHand.left(input_in_hand(report)):
            kept = FINDINGS / name / f"in-hand-{seed}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            found["findings"][-1] += f"; it tried {kept}"
    if found["findings"]:
        print(said.read_text(errors="replace")[-5000:], file=sys.stderr)
    print(f"{name}, seed {seed}: {found['executions']:,} inputs", flush=True)
    return found


def jobs_of(minutes: float, cores: int, names: Sequence[str]) -> list[tuple[str, float, bool]]:
    """Name and seconds of each process, and whether coverage guides it."""
    whole = sum(SHARES.get(name, 1.0) for name in names)
    jobs = []
    for name in sorted(names, key=lambda name: -SHARES.get(name, 1.0)):
        seconds = 60 * minutes * cores * SHARES.get(name, 1.0) / whole
        jobs.append((name, seconds * GUIDED_SHARE, True))
        parts = cores if name in SHARES else 1
        jobs += [(name, seconds * (1 - GUIDED_SHARE) / parts, False)] * parts
    return jobs


def main() -> int:
    """Returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    has_atheris = importlib.util.find_spec("atheris") is not None
    how = "with" if has_atheris else "WITHOUT"
    print(f"{cores} cores, {options.minutes:g} minutes, {how} atheris", flush=True)
    began_s, counts, by_name = time.monotonic(), Counter[str](), Counter[str]()
    findings: list[str] = []
    cpu_s = 0.0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores) as pool:
        jobs = jobs_of(options.minutes, cores, options.only)
        results = [
            (name, pool.submit(fuzz, name, seconds, seed, guided, Path(folder)))
            for seed, (name, seconds, guided) in enumerate(jobs, 1000 * options.seed)
        ]
        for name, result in results:
            found = result.result()
            by_name[name] += found["executions"]
            counts[TARGETS[name].counts_as] += found["messages"]
            findings += found["findings"]
            cpu_s += found["cpu_s"]
    figures = [
        Figure(f"fuzzed {what}", counts[what], "", f"at least {goal}")
        for what, goal in GOALS.items()
    ]
    figures.append(Figure("crashes, hangs and changed states", len(findings), "", "at most 0"))
    figures.append(Figure("time", (time.monotonic() - began_s) / 60, "min"))
    figures.append(Figure("CPU time", cpu_s / 60, "min"))
    figures.append(Figure("guided by coverage (atheris)", float(has_atheris), ""))
    figures += [Figure(f"inputs of {name}", count, "") for name, count in by_name.items()]
    show(figures, "make fuzz")
    write(figures, REPORTS / "fuzz.json")
    for finding in findings:
        print(finding)
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
