"""FedMeZO inside Flower: a ServerApp and a ClientApp, over nothing but Flower's application layer."""

from fedmezo_core.program import check_tested

check_tested("flwr", "1.41", "1.43", "flower")
