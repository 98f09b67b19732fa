"""How a program starts, works and ends: its log, settings, long steps, exit status and errors."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from fedmezo_core.errors import ConfigError, FedMezoError, ModelError, TokenError
from fedmezo_core.service.log_lines import logs_json, shape_log, start_log
from fedmezo_core.service.service_manager import service_manager

if TYPE_CHECKING:
    from fedmezo_core.layered_settings import ProgramSettingsT

TRACEBACK_VARIABLE = "FEDMEZO_TRACEBACK"
"""Environment variable that turns the sentence for an unexpected error into a traceback."""


STEP_LINE_EVERY_S = 10.0
"""Time after which, again and again, the log says how far a long step is."""

REPEAT_AFTER_S = 1.0
"""A second signal counts from this long after the first; two at once are often one, sent twice."""
STOP_WITHIN_S = 4.0
"""Longest time that a daemon takes to stop; after that it ends, whatever it does then."""

DUMB_TERMINALS = ("", "dumb", "unknown")
"""Values of TERM that name a terminal without control sequences."""

log = logging.getLogger("fedmezo.program")


def launch(module: str) -> NoReturn:
    """Import the module of a program and end with the status of its `main`.

    Ctrl-C ends the process without a traceback while it imports, and after `main`. gRPC's own log
    shows errors alone, unless GRPC_VERBOSITY says otherwise.
    """
    # Read when grpc is imported. At its own level each failed handshake of anybody is a line.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(module).main
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(status)


def stop_signal() -> asyncio.Event:
    """An event of the running loop that SIGTERM, SIGHUP or Ctrl-C sets from now on.

    A second SIGTERM or Ctrl-C, `REPEAT_AFTER_S` later or more, ends the process at once with status
    128 + its number, even if the loop does not run. `STOP_WITHIN_S` after the first signal the
    process ends with status 0, whatever it does then. `nohup` keeps its meaning for SIGHUP. In a
    daemon without a terminal SIGHUP lets it reload instead (`on_reload`).
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    first_s: float | None = None

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s
            service_manager().stopping()
            threading.Thread(target=_end_in_time, daemon=True).start()
        elif number != signal.SIGHUP and now_s - first_s >= REPEAT_AFTER_S:
            _end_at_once(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and _reloads:
            continue
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            # The loop wakes whichever thread gets the signal. `handle` needs no loop that runs.
            loop.add_signal_handler(number, stop.set)
            signal.signal(number, handle)
    return stop


async def first_of(task: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Wait for `task` or `stop`; returns False, with the task cancelled, if `stop` came first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        return True
    task.cancel()
    with suppress(asyncio.CancelledError, FedMezoError):
        await task
    return False


def _end_in_time() -> None:
    """End this process after a while, as a power cut would: what is durable stays so.

    A thread that loads a model, or computes in native code, cannot be asked to stop.
    """
    time.sleep(STOP_WITHIN_S)
    _end_at_once(0, b"The work under way did not end in time, so it was cut off.\n")


def _end_at_once(status: int, said: bytes = b"") -> NoReturn:
    """End this process now, whatever it does."""
    with suppress(OSError):  # Nobody may read it any more.
        # A bar may stand in the terminal's last line.
        os.write(2, (b"\r\x1b[K" if can_show_bars() else b"") + said)
    os._exit(status)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this block by an exception, so that it leaves nothing behind.

    An exception in the clean-up would leave something, so a second signal raises none: it ends the
    process at once if it comes `REPEAT_AFTER_S` later or more.
    """
    first_s: float | None = None

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s
            raise SystemExit(128 + number)
        if now_s - first_s >= REPEAT_AFTER_S:
            _end_at_once(128 + number)

    ours: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGHUP)
        ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


_reloads: list[Callable[[], None]] = []
"""What SIGHUP lets this daemon do; empty if SIGHUP ends it."""


def on_reload(work: Callable[[], None]) -> None:
    """Let SIGHUP call `work` too, in the event loop, if this is a daemon that reloads."""
    if _reloads:
        _reloads.append(work)


def _has_terminal() -> bool:
    """Whether a terminal can hang up on this process, which is what SIGHUP says there."""
    with suppress(OSError), Path("/dev/tty").open("rb"):
        return True
    return False


def run_daemon(
    program: str,
    kind: type[ProgramSettingsT],
    run: Callable[[ProgramSettingsT], Coroutine[Any, Any, None]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Read the settings of a daemon and run it; returns the exit status, as `run_program` does.

    `arguments` are those of the command line; None: this process's own. The log goes to standard
    error. Without a terminal, SIGHUP makes it read its settings again.
    """
    start_log()
    # Imported here: pydantic takes a moment, in which a signal should end the program cleanly too.
    from fedmezo_core.layered_settings import changed_settings, load_settings

    given = sys.argv[1:] if arguments is None else arguments

    def load() -> ProgramSettingsT:
        return load_settings(kind, given, program=program)

    async def serve(settings: ProgramSettingsT) -> None:
        used = settings

        def reload() -> None:
            nonlocal used
            try:
                read = load()
            except (ConfigError, SystemExit) as error:
                log.error("nothing is reloaded: %s", error)
                return
            shape_log(read.log_format, read.log_level)
            used = used.model_copy(
                update={"log_format": read.log_format, "log_level": read.log_level}
            )
            waiting = changed_settings(used, read)
            log.info(
                "reloaded%s",
                f"; these need a restart: {', '.join(waiting)}" if waiting else "",
            )

        def reload_all() -> None:
            for work in _reloads:
                work()

        if not _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            _reloads[:] = [reload]
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, reload_all)
        telling = asyncio.create_task(service_manager().keep_told(current_step))
        try:
            await run(settings)
        finally:
            telling.cancel()
            _reloads.clear()

    def work() -> None:
        settings = load()
        shape_log(settings.log_format, settings.log_level)
        if settings.log_format == "text":
            show_steps_on_terminal()
        asyncio.run(serve(settings))

    return run_program(program, work)


def run_program(program: str, work: Callable[[], None]) -> int:
    """Run `work` and return the exit status of the program.

    0 if `work` returns, 2 for `ConfigError` and `TokenError`, 1 for every other `FedMezoError`, 130
    for Ctrl-C, 70 for an unexpected error. An error is printed as one sentence on standard error.
    SIGTERM and SIGHUP raise `SystemExit` with 128 + the signal's number, unless `work` handles
    them.
    """
    try:
        with _ended_by_signals():
            work()
    except FedMezoError as error:
        _say_error(program, str(error))
        return 2 if isinstance(error, (ConfigError, TokenError)) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        first_line = next(iter(str(error).splitlines()), "no message")
        _say_error(
            program,
            f"unexpected {type(error).__name__}: {first_line} This is a defect: please report it "
            f"with the output of a run with {TRACEBACK_VARIABLE}=1.",
        )
        return 70  # EX_SOFTWARE of sysexits.h
    return 0


def _say_error(program: str, sentence: str) -> None:
    if logs_json():
        log.error(sentence)
    else:
        print(f"{program}: {sentence}", file=sys.stderr)


@dataclass(slots=True, eq=False)
class LongStep:
    """A step of a program that a person may have to wait for."""

    what: str
    """What it does, such as `reading the journal`."""
    total: int | None = None
    """How much there is to do; None if nobody knows."""
    unit: str = ""
    """What is counted, in the plural; empty if nothing is."""
    done: int = 0
    _began_s: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1) -> None:
        """Note that `count` more are done."""
        self.done += count

    def become(self, what: str, total: int | None, unit: str, done: int) -> None:
        """Go on as another step, which another process takes; the time counts from the first on."""
        self.what, self.total, self.unit, self.done = what, total, unit, done

    @property
    def counted(self) -> str:
        """What is done, such as `1,200 of 3,000 records`; empty if nothing is counted."""
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{self.done:,}{of} {self.unit}" if self.unit else ""

    def __str__(self) -> str:
        """How far it is, such as `reading the journal: 1,200 of 3,000 records, 20 s so far`."""
        so_far = f"{time.monotonic() - self._began_s:.0f} s so far"
        return f"{self.what}: {', '.join(filter(None, (self.counted, so_far)))}"


ShowStep = Callable[[LongStep, threading.Event], None]
"""Shows how far a step is until the event says that it is over; runs in a thread of its own."""


def _log_step(step: LongStep, over: threading.Event) -> None:
    while not over.wait(STEP_LINE_EVERY_S):
        step_log.info(str(step))


step_log = logging.getLogger("fedmezo.steps")
_steps: list[LongStep] = []
_show_step: ShowStep = _log_step


def show_steps_with(show: ShowStep) -> None:
    """Let `show` show this process's long steps from now on, instead of lines of the log."""
    global _show_step
    _show_step = show


def can_show_bars() -> bool:
    """Whether standard error is a terminal on which a bar can be drawn."""
    if sys.stderr is None or not sys.stderr.isatty():  # None in a process that began without one.
        return False
    return os.environ.get("TERM", "") not in DUMB_TERMINALS


def show_steps_on_terminal() -> None:
    """Show this process's long steps as bars from now on, if standard error is a terminal."""
    if can_show_bars():
        from fedmezo_core.service.bars import keep_log_above_bars, show_bar

        keep_log_above_bars()
        show_steps_with(show_bar)


@contextmanager
def long_step(what: str, total: int | None = None, unit: str = "") -> Iterator[LongStep]:
    """Show how far this block is, if it takes long; the block calls `advance` if it counts.

    A program shows its steps in its log, on a terminal with bars, or as `show_steps_with` says. The
    arguments are the fields of `LongStep`.
    """
    step, over = LongStep(what, total, unit), threading.Event()
    # Its lines are of the same run as those of the caller.
    show = functools.partial(contextvars.copy_context().run, _show_step, step, over)
    showing = threading.Thread(target=show, name="step", daemon=True)
    _steps.append(step)
    showing.start()
    try:
        yield step
    finally:
        over.set()
        _steps.remove(step)
        showing.join()  # A terminal should be as it was.


def newest_step() -> LongStep | None:
    """The newest long step of this process that goes on; None if there is none."""
    return next(iter(_steps[-1:]), None)


def current_step() -> str:
    """How far the newest long step of this process is; empty if there is none."""
    return str(newest_step() or "")


@contextmanager
def worker_packages(purpose: str) -> Iterator[None]:
    """Turn a failed import in this block into a `ModelError` that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ModelError(
            f"The package {error.name} is missing; install fedmezo[worker] to {purpose}."
        ) from None


def check_tested(package: str, at_least: str, below: str, extra: str) -> None:
    """Refuse an installed package whose version was not tested with this one.

    `at_least` and `below` bound the tested versions, as "1.41"; `extra` installs one of them.
    Raises `ConfigError`, which says what is installed and what to install instead.
    """
    install = f"install fedmezo[{extra}], which takes {package} >= {at_least}, < {below}"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ConfigError(f"The package {package} is missing; {install}.") from None
    if not _release(at_least) <= _release(found) < _release(below):
        raise ConfigError(f"{package} {found} was not tested with this FedMeZO version; {install}.")


def _release(version_text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version_text)[:2])
