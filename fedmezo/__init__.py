"""FedMeZO inside another program: a run's two sides as bytes in and bytes out.

`Coordinator` and `Session` are the two sides, for any transport; `begin_run` makes the genesis that
both need. A name imports what it needs when it is first used, so that a program that computes
nothing loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmezo.engines import Engine as Engine
    from fedmezo.engines import RestoringEngine as RestoringEngine
    from fedmezo.engines import SavingEngine as SavingEngine
    from fedmezo.genesis import decode_genesis as decode_genesis
    from fedmezo.genesis import encode_genesis as encode_genesis
    from fedmezo.library_coordinator import Coordinator as Coordinator
    from fedmezo.library_session import Session as Session
    from fedmezo.policies import Aggregator as Aggregator
    from fedmezo.policies import SeedPolicy as SeedPolicy
    from fedmezo.run_policy import RunPolicy as RunPolicy
    from fedmezo.torch_engine import TorchEngine as TorchEngine
    from fedmezo.torch_engine import begin_run as begin_run
    from fedmezo_core.config import RunConfig as RunConfig
    from fedmezo_core.config import parse_run as parse_run
    from fedmezo_core.errors import FedMezoError as FedMezoError
    from fedmezo_core.errors import MeasurementError as MeasurementError
    from fedmezo_core.errors import UnavailableError as UnavailableError
    from fedmezo_core.events import Measure as Measure
    from fedmezo_core.events import Measured as Measured
    from fedmezo_core.events import MeasureFailed as MeasureFailed
    from fedmezo_core.journal.journal import JournalStore as JournalStore
    from fedmezo_core.machines.aggregate import coefficients_of as coefficients_of
    from fedmezo_core.machines.seeds import seeds_of as seeds_of
    from fedmezo_core.records import Committed as Committed
    from fedmezo_core.records import Evaluated as Evaluated
    from fedmezo_core.records import Genesis as Genesis
    from fedmezo_core.records import Scalars as Scalars
    from fedmezo_core.records import digest64_of as digest64_of
    from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory as SumMemory
    from fedmezo_core.zo.assignment import measure as measure
    from fedmezo_core.zo.materialize import materialize as materialize
    from fedmezo_core.zo.objectives import Objective as Objective
    from fedmezo_core.zo.objectives import Predictions as Predictions
    from fedmezo_core.zo.objectives import load_objective as load_objective

_HOMES = {
    "Aggregator": "fedmezo.policies",
    "Committed": "fedmezo_core.records",
    "Coordinator": "fedmezo.library_coordinator",
    "Engine": "fedmezo.engines",
    "Evaluated": "fedmezo_core.records",
    "FedMezoError": "fedmezo_core.errors",
    "Genesis": "fedmezo_core.records",
    "JournalStore": "fedmezo_core.journal.journal",
    "Measure": "fedmezo_core.events",
    "MeasureFailed": "fedmezo_core.events",
    "Measured": "fedmezo_core.events",
    "MeasurementError": "fedmezo_core.errors",
    "Objective": "fedmezo_core.zo.objectives",
    "Predictions": "fedmezo_core.zo.objectives",
    "RestoringEngine": "fedmezo.engines",
    "RunConfig": "fedmezo_core.config",
    "RunPolicy": "fedmezo.run_policy",
    "SavingEngine": "fedmezo.engines",
    "Scalars": "fedmezo_core.records",
    "SeedPolicy": "fedmezo.policies",
    "Session": "fedmezo.library_session",
    "SumMemory": "fedmezo_core.trust.secure_aggregation.sum_memory",
    "TorchEngine": "fedmezo.torch_engine",
    "UnavailableError": "fedmezo_core.errors",
    "begin_run": "fedmezo.torch_engine",
    "coefficients_of": "fedmezo_core.machines.aggregate",
    "decode_genesis": "fedmezo.genesis",
    "digest64_of": "fedmezo_core.records",
    "encode_genesis": "fedmezo.genesis",
    "load_objective": "fedmezo_core.zo.objectives",
    "materialize": "fedmezo_core.zo.materialize",
    "measure": "fedmezo_core.zo.assignment",
    "parse_run": "fedmezo_core.config",
    "seeds_of": "fedmezo_core.machines.seeds",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
