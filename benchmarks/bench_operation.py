"""`make bench-operation`: what it costs to operate runs, and to watch them."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.figures import REPORTS, arguments_of, collect, publish
from benchmarks.machine import Machine
from benchmarks.operation import page_costs, runs_at_once, scale, watching_costs

REPORT = REPORTS / "bench-operation.json"
GROUPS = {
    "page": page_costs.figures,
    "runs": runs_at_once.figures,
    "scale": scale.figures,
    "watching": watching_costs.figures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a minute or two: does it run?")
    arguments = arguments_of(parser, REPORT, GROUPS)
    figures = collect(partial(GROUPS[name], arguments.small) for name in arguments.only)
    publish(figures, REPORT, Machine().describe())


if __name__ == "__main__":
    main()
