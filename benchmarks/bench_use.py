"""`make bench-use`: a worker's first lines, a worker that comes late, and proposed rates."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.bench_coordinator import allow_files
from benchmarks.figures import REPORTS, collect, markdown, publish, read
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
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--small", action="store_true", help="a few minutes: does it run?")
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing, print the last report"
    )
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(read(REPORT)), end="")
        return
    allow_files()
    figures = collect(partial(GROUPS[name], arguments.small) for name in arguments.only)
    publish(figures, REPORT, Machine().describe())


if __name__ == "__main__":
    main()
