"""`make bench-use`: a worker's first lines, a worker that comes late, and proposed rates."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.bench_coordinator import allow_files
from benchmarks.figures import REPORTS, arguments_of, collect, publish
from benchmarks.machine import Machine
from benchmarks.use import first_lines, late_worker, probing

REPORT = REPORTS / "bench-use.json"
GROUPS = {
    "first-lines": first_lines.figures,
    "late-worker": late_worker.figures,
    "probing": probing.figures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few minutes: does it run?")
    arguments = arguments_of(parser, REPORT, GROUPS)
    allow_files()
    figures = collect(partial(GROUPS[name], arguments.small) for name in arguments.only)
    publish(figures, REPORT, Machine().describe())


if __name__ == "__main__":
    main()
