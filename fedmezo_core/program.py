"""How a program starts and ends: its log, settings, exit status, and one sentence for errors."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fedmezo_core.errors import ConfigError, FedMezoError, ModelError
from fedmezo_core.layered_settings import Settings, load_settings

TRACEBACK_VARIABLE = "FEDMEZO_TRACEBACK"
"""Environment variable that turns the sentence for an unexpected error into a traceback."""


def run_daemon(
    program: str,
    kind: type[Settings],
    run: Callable[[Settings], Coroutine[Any, Any, None]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Read the settings of a daemon and run it; returns the exit status, as `run_program` does.

    `arguments` are those of the command line; None: this process's own. The log goes to standard
    error.
    """
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s"
    )
    logging.getLogger("fedmezo").setLevel(logging.INFO)
    given = sys.argv[1:] if arguments is None else arguments
    return run_program(
        program, lambda: asyncio.run(run(load_settings(kind, given, program=program)))
    )


def run_program(program: str, work: Callable[[], None]) -> int:
    """Run `work` and return the exit status of the program.

    0 if `work` returns, 2 for `ConfigError`, 1 for every other `FedMezoError`, 130 for Ctrl-C, 70
    for an unexpected error. An error is printed as one sentence on standard error.
    """
    try:
        work()
    except FedMezoError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        first_line = next(iter(str(error).splitlines()), "no message")
        print(
            f"{program}: unexpected {type(error).__name__}: {first_line} This is a defect: please "
            f"report it with the output of a run with {TRACEBACK_VARIABLE}=1.",
            file=sys.stderr,
        )
        return 70  # EX_SOFTWARE of sysexits.h
    return 0


@contextmanager
def worker_packages(purpose: str) -> Iterator[None]:
    """Turn a failed import in this block into a `ModelError` that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ModelError(
            f"The package {error.name} is missing; install fedmezo[worker] to {purpose}."
        ) from None
