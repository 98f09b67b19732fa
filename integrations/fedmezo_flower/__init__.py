"""FedMeZO inside Flower: a ServerApp and a ClientApp, above Flower's application layer only."""

from typing import Final

from fedmezo_core.program import check_tested

TESTED: Final = ("flwr", "1.41", "1.43", "flower")
"""The package, the least tested version, the first untested one, and the extra that installs it."""

check_tested(*TESTED)
