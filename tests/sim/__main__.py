"""Replay one seed with its transcript, or run many.

python -m tests.sim [--sites | --secure] --seed 7 [--count 1000]
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.checker import ViolationError
from tests.sim.hierarchy import HierarchyWorld
from tests.sim.world import SecureWorld, World


def main() -> int:
    """Returns the process's exit code: 1 if a run broke an invariant."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument(
        "--count", type=int, default=1, help="seeds to run; one prints its transcript"
    )
    parser.add_argument("--sites", action="store_true", help="with relays among the workers")
    parser.add_argument("--secure", action="store_true", help="with secure aggregation")
    options = parser.parse_args()
    world = SecureWorld if options.secure else HierarchyWorld if options.sites else World
    began_s = time.monotonic()
    for seed in range(options.seed, options.seed + options.count):
        transcript: list[str] | None = [] if options.count == 1 else None
        try:
            world(seed, transcript=transcript).run()
        except ViolationError as violation:
            _show(transcript)
            print(f"seed {seed}: {violation}")
            return 1
        _show(transcript)
    print(
        f"{options.count} seeds from {options.seed}: all sound, {time.monotonic() - began_s:.1f} s"
    )
    return 0


def _show(transcript: list[str] | None) -> None:
    if transcript is not None:
        sys.stdout.write("\n".join(transcript) + "\n")


if __name__ == "__main__":
    sys.exit(main())
