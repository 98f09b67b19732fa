"""`fedmezo-worker`, also as `python -m fedmezo_worker`."""

import sys
from typing import NoReturn

from fedmezo_core.program import launch


def main() -> NoReturn:
    """Run `fedmezo-worker`, or its `preflight`."""
    if sys.argv[1:2] == ["preflight"]:
        launch("fedmezo_worker.preflight.worker_preflight")
    launch("fedmezo_worker.worker_command")


if __name__ == "__main__":
    main()
