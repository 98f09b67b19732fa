"""The programs of this package; `python -m fedmezo_coordinator` is `fedmezo-coordinator`."""

from typing import NoReturn

from fedmezo_coordinator.serving.grpc_wakeups import this_process_has_one_loop
from fedmezo_core.program import launch


def main() -> NoReturn:
    """Run `fedmezo-coordinator`."""
    this_process_has_one_loop()
    launch("fedmezo_coordinator.programs.coordinator_command")


def relay() -> NoReturn:
    """Run `fedmezo-relay`."""
    this_process_has_one_loop()
    launch("fedmezo_coordinator.programs.relay_command")


def fedmezo() -> NoReturn:
    """Run `fedmezo`."""
    launch("fedmezo_coordinator.programs.fedmezo_command")


if __name__ == "__main__":
    main()
