"""Readable transcripts of whole rounds, in `tests/golden/rounds/`.

A line that begins with `> ` is an event. The lines below it are the machine's answer: records to
append, then messages to send. After a change that is meant to change them:

    FEDMEZO_REWRITE_GOLDEN=1 pytest tests/core/machines/test_rounds_golden.py

and commit the new files only if you can say what caused each difference.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from fedmezo_core.events import Ack, Assign, Expel, Finish, Ready, Refuse, RoundMessage
from fedmezo_core.records import Answered, Committed, Diverged, Opened, Record, Scalars, Started
from tests.core.machines.rounds_driver import WRONG_DIGEST64, RoundsDriver

FOLDER = Path(__file__).parents[2] / "golden" / "rounds"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_a_transcript_is_what_happens(path: Path) -> None:
    written = path.read_text()
    played = play(written)
    if os.environ.get("FEDMEZO_REWRITE_GOLDEN") == "1":
        path.write_text(played)
    else:
        assert played == written


def test_there_are_transcripts() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 5


def play(text: str) -> str:
    """The script again, with what the machine answers to each command."""
    run: RoundsDriver | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("#") or not line:
            lines.append(line)
        if not line.startswith("> "):
            continue
        lines.append(line)
        command, *words = shlex.split(line[2:])
        if command == "run":
            values = dict(word.split("=") for word in words)
            run = RoundsDriver(**{key: int(value) for key, value in values.items()})
            continue
        assert run is not None, "a script begins with a run"
        ready = perform(run, command, words)
        lines += [f"    append {shown(record)}" for record in ready.records]
        lines += [f"    send   {shown(message)}" for message in ready.messages]
        lines.append(f"    {state_of(run)}")
    return "\n".join(lines) + "\n"


def perform(run: RoundsDriver, command: str, words: list[str]) -> Ready:
    """One command of a script."""
    options = dict(word.split("=") for word in words if "=" in word)
    numbers = {"round_" if k == "round" else k: int(v) for k, v in options.items() if k != "grads"}
    match command:
        case "ready":
            return run.ready(words[0])
        case "lost":
            return run.lost(words[0])
        case "answer":
            grads = tuple(float(g) for g in options.get("grads", "1,-2").split(","))
            if "flipped" in words:
                numbers["digest"] = WRONG_DIGEST64
            return run.answer(words[0], grads=grads, **numbers)
        case "unable":
            return run.unable(words[0], **numbers)  # type: ignore[arg-type]
        case "tick":
            return run.tick(int(words[0]))
        case "replica":
            return run.replica(int(words[0]))
        case "restart":
            return run.restart()
    raise AssertionError(f"no such command: {command}")


def state_of(run: RoundsDriver) -> str:
    """One line of state."""
    machine = run.machine
    awaited = " ".join(machine.roster.awaited) or "-"
    return (
        f"= {machine.phase.value}, epoch {machine.epoch}, committed {machine.round}, "
        f"awaited {awaited}"
    )


def shown(item: Record | RoundMessage) -> str:
    """A record or message on one line."""
    match item:
        case Started(epoch):
            return f"started epoch={epoch}"
        case Opened(round_, first_slot, workers):
            return f"opened round={round_} first_slot={first_slot} workers={','.join(workers)}"
        case Answered(round_, slot, Scalars(grads, _, digest64)):
            return (
                f"answered round={round_} slot={slot} grads={_list(grads)} digest={digest64 or 0:x}"
            )
        case Committed(round_, runs):
            pairs = " ".join(f"{r.first_seed:016x}:{_list(r.coefficients)}" for r in runs)
            places = ",".join(f"{place.round}/{place.slot}" for place in item.answers)
            return f"committed round={round_} {pairs}" + (f" answers={places}" if places else "")
        case Diverged(round_, party, found, expected):
            return f"diverged round={round_} party={party} found={found:x} expected={expected:x}"
        case Assign(worker, ticket, work, deadline_ms):
            return (
                f"assign {worker} ticket={ticket.epoch}/{ticket.round}/{ticket.slot} "
                f"seed={work.seeds[0]:016x} want_digest={work.want_digest} "
                f"deadline_ms={deadline_ms}"
            )
        case Ack(worker, ticket):
            return f"ack {worker} ticket={ticket.epoch}/{ticket.round}/{ticket.slot}"
        case Refuse(worker, _, reason, message):
            return f"refuse {worker} {reason}: {message}"
        case Expel(worker, message):
            return f"expel {worker}: {message}"
        case Finish(worker, round_):
            return f"finish {worker} round={round_}"
    raise AssertionError(item)


def _list(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
