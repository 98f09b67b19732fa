"""The server: FedMeZO's coordinator, whose rounds go to the nodes as Flower's messages."""

from fedmezo_flower.flower_server import app

__all__ = ["app"]
