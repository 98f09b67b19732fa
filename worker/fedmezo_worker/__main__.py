"""`python -m fedmezo_worker`."""

import sys

from fedmezo_worker.cli import main

sys.exit(main())
