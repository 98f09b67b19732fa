"""How a program ends: with a status and, if something is wrong, one sentence instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fedmezo_core.errors import ConfigError, FedMezoError

TRACEBACK_VARIABLE = "FEDMEZO_TRACEBACK"


def run_program(program: str, work: Callable[[], None]) -> int:
    """Run `work`; 0 if it returns, 1 for our errors, 2 for wrong settings, 130 for Ctrl-C."""
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
            f"{program}: unexpected {type(error).__name__}: {first_line} This is a defect: please report "
            f"it with the output of a run with {TRACEBACK_VARIABLE}=1.",
            file=sys.stderr,
        )
        return 70  # EX_SOFTWARE of sysexits.h
    return 0
