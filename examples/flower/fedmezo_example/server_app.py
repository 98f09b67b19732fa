"""The server: FedMeZO's coordinator, whose rounds go to the nodes as Flower's messages."""

from fedmezo_flower.server_app import app

__all__ = ["app"]
