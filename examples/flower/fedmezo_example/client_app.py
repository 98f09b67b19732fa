"""A node: it hands each message to the worker that stays on this machine."""

from fedmezo_flower.flower_client import app

__all__ = ["app"]
