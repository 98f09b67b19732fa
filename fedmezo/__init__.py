"""FedMeZO inside another program: a run's two sides as bytes in and bytes out.

`Coordinator` and `Session` are the two sides, for any transport. `begin_run` gives the genesis that
both need. This module imports what a name needs when the name is used, so that a program without
torch pays nothing for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmezo.engines import Engine as Engine
    from fedmezo.genesis import decode_genesis as decode_genesis
    from fedmezo.genesis import encode_genesis as encode_genesis
    from fedmezo.library_coordinator import Coordinator as Coordinator
    from fedmezo.library_session import Session as Session
    from fedmezo.torch_engine import TorchEngine as TorchEngine
    from fedmezo.torch_engine import begin_run as begin_run

_HOMES = {
    "Coordinator": "fedmezo.library_coordinator",
    "Engine": "fedmezo.engines",
    "Session": "fedmezo.library_session",
    "TorchEngine": "fedmezo.torch_engine",
    "begin_run": "fedmezo.torch_engine",
    "decode_genesis": "fedmezo.genesis",
    "encode_genesis": "fedmezo.genesis",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
