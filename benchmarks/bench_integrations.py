"""`make bench-integrations`: bytes and seconds of a round for each way in, and FedAvg beside it."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.figures import REPORTS, arguments_of, collect, publish
from benchmarks.integrations import edge_workers, flower_rounds, grpc_rounds, nvflare_rounds
from benchmarks.machine import Machine

REPORT = REPORTS / "bench-integrations.json"
GROUPS = {
    "grpc": grpc_rounds.figures,
    "flower": flower_rounds.figures,
    "nvflare": nvflare_rounds.figures,
    "edge": edge_workers.figures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few minutes: does it run?")
    arguments = arguments_of(parser, REPORT, GROUPS)
    figures = collect(partial(GROUPS[name], arguments.small) for name in arguments.only)
    publish(figures, REPORT, Machine().describe())


if __name__ == "__main__":
    main()
