"""`python -m fedmezo_coordinator`."""

import sys

from fedmezo_coordinator.programs.coordinator_command import main

sys.exit(main())
