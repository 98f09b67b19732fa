"""What a sum that hides its terms costs a round: bytes and time of both sides, on one core.

    python -m benchmarks.secure_sum_cost

Each line is a round in which every worker takes part and none drops out, and then one in which a
tenth drop out after they gave shares, so that their masks must be computed anew.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from fedmezo_core.config import RunConfig, TaskConfig, parse_run
from fedmezo_core.events import AskSum, SumAsked, SumReceived
from fedmezo_core.records import Genesis
from fedmezo_core.trust.secure_aggregation.masking import SumContext, run_digest_of
from fedmezo_core.trust.secure_aggregation.secure_member import SecureMember
from fedmezo_core.trust.secure_aggregation.sum_collector import STEP_MS, SumCollector
from fedmezo_core.wire.sum_messages import ask_to_pb, sum_step_to_pb

WORKERS = (10, 50, 200)
DIRECTIONS = 64
DROPPED_SHARE = 0.1
MASKING_STEP = 2


def contract_of(workers: int) -> RunConfig:
    """A run of that many workers."""
    return parse_run(
        {
            "run_id": "cost",
            "model": "none",
            "task": TaskConfig(verbalizers={"no": "no", "yes": "yes"}),
            "local_steps": 1,
            "probes": DIRECTIONS,
            "learning_rate": 1e-3,
            "cohort_size_max": workers,
            "secure_aggregation": True,
        },
        "the benchmark's run",
    )


def cost_of(workers: int, dropped: int) -> dict[str, float]:
    """One round; milliseconds of a worker are the mean, those of the coordinator all its work.

    Its longest step is the longest time that other callers wait for it.
    """
    config = contract_of(workers)
    genesis = Genesis(config, bytes(32), bytes(32), bytes(32), 8, 32)
    members = [SecureMember(genesis, f"w{slot}") for slot in range(workers)]
    context = SumContext(run_digest_of(genesis), 1, 1, 1, DIRECTIONS)
    named = {slot: f"w{slot}" for slot in range(workers)}
    collector = SumCollector(config, context, named, 0)
    dice = random.Random(0)
    of_members_s = of_coordinator_s = longest_s = 0.0
    up = down = 0
    for step in range(4):
        begin_s = time.process_time()
        asks: list[AskSum] = list(collector.asks())
        longest_s = max(longest_s, time.process_time() - begin_s)
        down += sum(len(ask_to_pb(ask).SerializeToString()) for ask in asks)
        of_coordinator_s += time.process_time() - begin_s
        for ask in asks:
            slot = ask.ticket.slot
            if slot < dropped and step >= MASKING_STEP:
                continue
            asked = SumAsked(ask.ticket, 1, ask.step, dice.randbytes(32))
            begin_s = time.process_time()
            sent = members[slot].step(asked, [0.5] * DIRECTIONS)
            up += len(sum_step_to_pb(sent).SerializeToString())
            of_members_s += time.process_time() - begin_s
            begin_s = time.process_time()
            collector.take(SumReceived(ask.worker, sent.ticket, 1, sent.step))
            of_coordinator_s += time.process_time() - begin_s
        begin_s = time.process_time()
        collector.advance((step + 1) * STEP_MS)
        while True:
            took_s = time.process_time() - begin_s
            longest_s = max(longest_s, took_s)
            of_coordinator_s += took_s
            if not collector.is_busy:
                break
            begin_s = time.process_time()
            collector.work()
    assert collector.sums is not None
    return {
        "workers": workers,
        "dropped": dropped,
        "worker_ms": 1000 * of_members_s / workers,
        "coordinator_ms": 1000 * of_coordinator_s,
        "longest_step_ms": 1000 * longest_s,
        "bytes_up_a_worker": up / workers,
        "bytes_down_a_worker": down / workers,
    }


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    for workers in parser.parse_args().workers:
        for dropped in (0, max(1, int(DROPPED_SHARE * workers))):
            found = cost_of(workers, dropped)
            print(json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
