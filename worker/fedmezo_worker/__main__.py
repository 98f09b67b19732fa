"""`fedmezo-worker`, also as `python -m fedmezo_worker`."""

from typing import NoReturn

from fedmezo_core.program import launch


def main() -> NoReturn:
    """Run `fedmezo-worker`."""
    launch("fedmezo_worker.worker_command")


if __name__ == "__main__":
    main()
