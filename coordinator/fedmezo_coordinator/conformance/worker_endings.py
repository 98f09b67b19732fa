"""Sequences after which a worker must stop: each needs a worker that is started anew."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from fedmezo_coordinator.conformance.report import CheckFailedError, Report, require
from fedmezo_coordinator.conformance.scripted_server import Line, scripted
from fedmezo_coordinator.conformance.worker_battery import WorkerBattery, WorkerTest
from fedmezo_core.errors import ConfigError, MismatchError
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import ZERO_HASH, head_after
from fedmezo_core.records import Genesis, Started
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1 import journal_pb2

UNKNOWN_VALUE = 99
"""A value that no enumeration of the contract has."""


ENDED_S = 5.0
"""Time that the battery takes, after the worker has ended, to see what it sent before."""


LAST_WORDS_S = 0.5
"""Time in which what a worker sent before its end arrives."""


class Running(Protocol):
    """A worker that was started."""

    async def status(self) -> int:
        """Its exit status, once it has ended."""


Start = Callable[[str], AbstractAsyncContextManager[Running]]
"""Starts a worker of the coordinator at an address, and ends it with the block."""


Ending = Callable[[WorkerTest, Start], Awaitable[None]]
"""A sequence with a worker of its own, which must stop at its end."""


class _Process:
    """A worker's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def status(self) -> int:
        return await self._process.wait()


def starting(command: str) -> Start:
    """Starts a worker by a command, in which `{address}` stands for the address.

    Its output goes to standard error. Raises `ConfigError` for a command that cannot be started.
    """

    @asynccontextmanager
    async def start(address: str) -> AsyncIterator[Running]:
        try:
            program, *arguments = (
                word.replace("{address}", address) for word in shlex.split(command)
            )
            process = await asyncio.create_subprocess_exec(
                program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=2
            )
        except (OSError, ValueError) as error:  # ValueError: no words, or a quote without its end
            raise ConfigError(
                f"The worker's command {command!r} cannot be started ({error}); check --start."
            ) from None
        try:
            yield _Process(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    return start


async def run_worker_battery(
    test: WorkerTest,
    report: Report,
    listen: str,
    start: Start | None,
    announce: Callable[[str], None],
) -> None:
    """Make all checks of a worker. `announce` is told the address that it must connect to.

    Without `start`, a person starts the worker once, and the sequences after which a worker must
    stop are skipped.
    """
    battery = WorkerBattery(test, report)
    async with scripted(battery.server, listen) as address:
        announce(address)
        if start is None:
            await battery.run()
        else:
            async with start(address) as running:
                await _whole_run(battery, running, report, test)
    # The weights of `test.model` have moved on, so nothing is compared with them here.
    fresh = dataclasses.replace(test, model=None)
    for name, section, ending in ENDINGS:
        if start is None:
            report.skip(name, section, "only with --start, which starts a worker for each of these")
            continue
        with report.check(name, section):
            try:
                await ending(fresh, start)
            except TimeoutError:
                raise CheckFailedError(f"nothing came for {test.patience_s:g} s") from None


async def _whole_run(
    battery: WorkerBattery, running: Running, report: Report, test: WorkerTest
) -> None:
    """Lead a worker through a run, at the end of which its process must end."""
    leading = asyncio.create_task(battery.run())
    ending = asyncio.create_task(running.status())
    try:
        await asyncio.wait({leading, ending}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({leading}, timeout=ENDED_S)
        if leading.done():
            leading.result()
            with report.check("ends with exit status 0 when the run is over", 10):
                found = await _ended(ending, test.patience_s)
                require(found == 0, f"the status is {found}")
        else:
            seen = f"it ended with status {ending.result()} in the check before this"
            report.expect(battery.now, 10, False, seen)
    finally:
        leading.cancel()
        ending.cancel()
        await asyncio.gather(leading, ending, return_exceptions=True)


async def _ended(ending: asyncio.Task[int], patience_s: float) -> int:
    try:
        return await asyncio.wait_for(asyncio.shield(ending), patience_s)
    except TimeoutError:
        raise CheckFailedError(f"it still runs after {patience_s:g} s") from None


@asynccontextmanager
async def _begun(test: WorkerTest, start: Start) -> AsyncIterator[tuple[WorkerBattery, Running]]:
    """A worker at the beginning of a run of its own."""
    battery = WorkerBattery(test, Report("worker"))
    async with (
        scripted(battery.server, "127.0.0.1:0") as address,
        start(address) as running,
    ):
        yield battery, running


# ---------------------------------------------------------------- another run


def _another(change: Callable[[Genesis], Genesis]) -> Ending:
    async def ending(test: WorkerTest, start: Start) -> None:
        await _refuses_run(test, start, encode_record(change(test.genesis)))

    return ending


def _with_unknown(field: str) -> Ending:
    async def ending(test: WorkerTest, start: Start) -> None:
        record = journal_pb2.Record.FromString(encode_record(test.genesis))
        setattr(record.genesis.config, field, UNKNOWN_VALUE)
        await _refuses_run(test, start, record.SerializeToString(deterministic=True))

    return ending


async def _refuses_run(test: WorkerTest, start: Start, body: bytes) -> None:
    """The worker may say hello with what it has itself, but must not agree to this genesis."""
    genesis = journal_pb2.Record.FromString(body).genesis
    battery = WorkerBattery(test, Report("worker"))
    battery.progress.body, battery.progress.heads = body, [head_after(ZERO_HASH, body)]
    async with (
        scripted(battery.server, "127.0.0.1:0") as address,
        start(address) as running,
    ):
        ending = asyncio.create_task(running.status())
        while not ending.done():
            opening = asyncio.create_task(battery.server.lines.get())
            await asyncio.wait({ending, opening}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                break
            line = opening.result()
            message = await line.receive(test.patience_s)
            line.end(MismatchError("A digest differs from the run's."))
            hello = wire.Hello() if message is None else message.hello
            digests = ("manifest_digest", "base_digest", "tokenizer_digest")
            if all(getattr(hello, name) == getattr(genesis, name) for name in digests):
                ending.cancel()
                raise CheckFailedError("it said hello with digests that are not its model's")
        require(await _ended(ending, test.patience_s) != 0, "it ended with exit status 0")


# ---------------------------------------------------------------- another history


def _in_session(
    lie: Callable[[WorkerBattery, Line], Awaitable[None]],
) -> Ending:
    """An ending after an honest first round."""

    async def ending(test: WorkerTest, start: Start) -> None:
        async with _begun(test, start) as (battery, running):
            line = await battery.online()
            await battery.commit(line)
            await battery.asked(line, wants=True)
            await lie(battery, line)
            await _stops(battery, line, running, test)

    return ending


async def _stops(battery: WorkerBattery, line: Line, running: Running, test: WorkerTest) -> None:
    """The worker must not answer what is assigned after a lie, and end with an error."""
    line.send(battery.assignment(wants=True))
    leaving = asyncio.create_task(battery.ends(line))
    ending = asyncio.create_task(running.status())
    try:
        # A worker that polls may end without another call.
        await asyncio.wait({leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({leaving}, timeout=LAST_WORDS_S)
        if leaving.done():
            leaving.result()
        require(await _ended(ending, test.patience_s) != 0, "it ended with exit status 0")
    finally:
        leaving.cancel()
        ending.cancel()
        await asyncio.gather(leaving, ending, return_exceptions=True)


async def _not_a_number(battery: WorkerBattery, line: Line) -> None:
    record = journal_pb2.Record.FromString(encode_record(battery.made(battery.progress.round + 1)))
    record.committed.runs[0].coefficients[0] = math.nan
    line.send(_notice(record.SerializeToString(deterministic=True)))


async def _too_many_pairs(battery: WorkerBattery, line: Line) -> None:
    record = journal_pb2.Record.FromString(encode_record(battery.made(battery.progress.round + 1)))
    record.committed.runs[0].coefficients.append(1e-3)
    line.send(_notice(record.SerializeToString(deterministic=True)))


def _assigned(
    change: Callable[[wire.Assign], object],
) -> Callable[[WorkerBattery, Line], Awaitable[None]]:
    """An assignment that no coordinator of this version sends."""

    async def lie(battery: WorkerBattery, line: Line) -> None:
        message = battery.assignment()
        change(message.assign)
        line.send(message)

    return lie


async def _unknown_message(_battery: WorkerBattery, line: Line) -> None:
    line.send(wire.SessionResponse())


async def _no_commit(_battery: WorkerBattery, line: Line) -> None:
    line.send(_notice(encode_record(Started(1))))


async def _other_acknowledged(battery: WorkerBattery, line: Line) -> None:
    ticket = wire.Ticket(epoch=battery.progress.epoch, round=battery.progress.round + 1)
    line.send(wire.SessionResponse(ack=wire.Ack(ticket=ticket, head=b"\x01" * 32)))


def _notice(record: bytes) -> wire.SessionResponse:
    return wire.SessionResponse(commit=wire.CommitNotice(record=record))


async def _other_welcome(test: WorkerTest, start: Start) -> None:
    """The welcome names another head at the round that the worker holds."""
    async with _begun(test, start) as (battery, running):
        line = await battery.next_line()
        await battery.hello(line)
        welcome = battery.welcome_of(0)
        welcome.welcome.head = b"\x01" * 32
        line.send(welcome)
        await _stops(battery, line, running, test)


async def _broken_promise(test: WorkerTest, start: Start) -> None:
    """The missed commits do not lead to the head that the welcome names."""
    async with _begun(test, start) as (battery, running):
        line = await battery.next_line()
        await battery.hello(line)
        await battery.commit(None)
        welcome = battery.welcome_of(1)
        welcome.welcome.head = b"\x01" * 32
        line.send(welcome, battery.notice(1))
        await _stops(battery, line, running, test)


ENDINGS: tuple[tuple[str, int, Ending], ...] = (
    (
        "refuses a run with another base",
        4,
        _another(lambda genesis: dataclasses.replace(genesis, base_digest=b"\x01" * 32)),
    ),
    (
        "refuses a run with another manifest",
        4,
        _another(lambda genesis: dataclasses.replace(genesis, manifest_digest=b"\x01" * 32)),
    ),
    (
        "refuses a run with another tokenizer",
        6,
        _another(lambda genesis: dataclasses.replace(genesis, tokenizer_digest=b"\x01" * 32)),
    ),
    ("refuses a contract with an unknown distribution", 15, _with_unknown("distribution")),
    ("refuses a contract with an unknown estimator", 15, _with_unknown("estimator")),
    ("stops at a coefficient that is no number", 8, _in_session(_not_a_number)),
    ("stops at a commit with too many pairs", 8, _in_session(_too_many_pairs)),
    ("stops at a record that is no commit", 5, _in_session(_no_commit)),
    (
        "stops at an assignment without steps",
        10,
        _in_session(_assigned(lambda assign: setattr(assign, "steps", 0))),
    ),
    (
        "stops at an assignment of more steps than the contract has",
        10,
        _in_session(_assigned(lambda assign: setattr(assign, "steps", assign.steps + 1))),
    ),
    (
        "stops at an assignment with offsets of another count",
        10,
        _in_session(_assigned(lambda assign: assign.seed_offsets.extend(range(4097)))),
    ),
    (
        "stops at an assignment with an eps of 0",
        10,
        _in_session(_assigned(lambda assign: setattr(assign, "eps", 0.0))),
    ),
    ("stops at a message that it does not know", 15, _in_session(_unknown_message)),
    ("stops at an acknowledgement of another history", 10, _in_session(_other_acknowledged)),
    ("stops at a welcome of another history", 10, _other_welcome),
    ("stops at commits that do not lead to the welcome's head", 10, _broken_promise),
)
"""Name of each check, the section of the page that promises it, and how it is made."""
