"""Workers with real models in this process: the product's agent and engine over real gRPC."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedmezo_core.errors import FedMezoError
from fedmezo_core.events import Measure, Measured
from fedmezo_core.records import Genesis
from fedmezo_core.zo.model.loading import quiet
from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.party import Party
from fedmezo_worker.data_sets import DataSet
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.core.zo.conftest import make_tokenizer

TEXTS = {
    "positive": [
        "A gripping film.",
        "The music is lovely!",
        "It was not bad.",
        "Beautifully acted.",
    ],
    "negative": [
        "An evening wasted.",
        "The plot is terrible.",
        "The jokes are worse.",
        "It was bad.",
    ],
}


def write_rows(
    path: Path, *, skew: int = 0, count: int = 24, more: dict[str, str] | None = None
) -> Path:
    """Labelled rows; `skew` turns the balance of the classes, each row has `more` columns."""
    rows = []
    for number in range(count):
        label = "positive" if number % (2 + skew) == 0 else "negative"
        rows.append({"text": f"{TEXTS[label][number % 4]} {number}", "label": label} | (more or {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_model(folder: Path, *, layers: int = 1, change: float = 0.0, scale: float = 1.0) -> None:
    """A random GPT-2 of 10 k parameters; `change` is added to one element, `scale` times all."""
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=384,
        n_positions=64,
        n_embd=16,
        n_layer=layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
        model.transformer.h[0].mlp.c_fc.weight[1, 2] += change
    with quiet():
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)


_LOADING = threading.Lock()
"""transformers cannot load two models at once in one process."""


class GatedEngine(Engine):
    """An engine whose measurements wait at a gate, so that a test decides who is in mid-round."""

    def __init__(self, thread: ThreadPoolExecutor | None = None) -> None:
        super().__init__(thread)
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()

    async def measure(self, order: Measure) -> Measured:
        """Wait for the gate, then measure."""
        if not self.gate.is_set():
            self.waiting.set()
            await self.gate.wait()
        return await super().measure(order)

    def _load(self, settings: WorkerSettings, genesis: Genesis) -> None:
        with _LOADING:
            super()._load(settings, genesis)

    @property
    def party(self) -> Party:
        """The model and weights that were loaded."""
        return self.loaded.party

    def flip_a_bit(self) -> None:
        """Turn the lowest bit of one element, as a failing memory cell would."""
        loaded = self.party.loaded
        tensor = next(iter(trained_tensors(loaded.model, loaded.manifest)))
        bits: Any = tensor.detach().view(-1).numpy().view("uint32")
        bits[3] ^= 1


@dataclass
class Working:
    """One worker at work."""

    name: str
    engine: GatedEngine
    task: asyncio.Task[None]

    async def outcome(self) -> FedMezoError | None:
        """How it ended."""
        try:
            await self.task
        except FedMezoError as error:
            return error
        return None


class Workers:
    """In-process workers of one test; all are ended with it."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._all: list[Working] = []

    def start(
        self, address: str, name: str, data: Path | dict[str, DataSet], **more: Any
    ) -> Working:
        """Let a worker join; it works until the run is finished."""
        values: dict[str, Any] = {
            "coordinator": address,
            "name": name,
            "data": data,
            "model": str(self._model),
            "threads": 1,
        }
        settings = WorkerSettings(**(values | more))
        engine = GatedEngine()
        working = Working(name, engine, asyncio.create_task(work(settings, engine)))
        self._all.append(working)
        return working

    def start_all(self, address: str, data: Sequence[Path]) -> list[Working]:
        """Workers w1, w2, ... one for each data file."""
        return [self.start(address, f"w{k}", path) for k, path in enumerate(data, start=1)]

    async def end(self) -> None:
        """End all, wherever they are."""
        for working in self._all:
            working.engine.gate.set()
            working.task.cancel()
        for working in self._all:
            with suppress(asyncio.CancelledError, FedMezoError):
                await working.task
            await working.engine.close()
