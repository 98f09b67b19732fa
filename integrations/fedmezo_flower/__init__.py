"""FedMeZO inside Flower: a ServerApp and a ClientApp, above Flower's application layer only."""

from fedmezo_core.program import check_tested

check_tested("flwr", "1.41", "1.43", "flower")
