"""`python -m fedmezo_worker`."""

import sys

from fedmezo_worker.worker_command import main

sys.exit(main())
