"""`python -m fedmezo_coordinator`."""

import sys

from fedmezo_coordinator.cli import main

sys.exit(main())
