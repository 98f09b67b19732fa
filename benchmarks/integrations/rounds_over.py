"""What every way into a run is measured on: one model, two workers, and a proxy that counts."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.figures import Figure
from fedmezo_core.zo.model.loading import quiet
from tests.core.zo.conftest import make_tokenizer
from tests.integration.support.harness import Program, run_values
from tests.integration.support.parties import write_rows

WORKERS = ("w1", "w2")
LOCAL_STEPS = 16
BATCH_SIZE = 4
CHUNK_BYTES = 65_536
PATIENCE_S = 1800.0
"""Longest time that the rounds may take."""


def contract(rounds: int) -> dict[str, Any]:
    """A run's contract, as it stands in a TOML file."""
    return run_values(
        model="model",
        rounds=rounds,
        local_steps=LOCAL_STEPS,
        batch_size=BATCH_SIZE,
        workers_min=len(WORKERS),
        quorum=len(WORKERS),
    )


def save_subject(folder: Path) -> Path:
    """A random GPT-2 of 0.86 million parameters (3.4 MB in float32), and rows for each worker."""
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=384,
        n_positions=64,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    with quiet():
        model.save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
    for skew, worker in enumerate(WORKERS):
        write_rows(folder / f"{worker}.jsonl", skew=skew)
    return folder / "model"


@dataclass
class Counted:
    """A counting proxy: whoever connects to `address` reaches the target."""

    address: str
    up_bytes: int = 0
    """Bytes from those who connect, above TCP."""
    down_bytes: int = 0


@contextmanager
def counting(target: str) -> Iterator[Counted]:
    """Forward connections to `target`, host:port, and count their bytes."""
    host, _, port = target.rpartition(":")
    lock = threading.Lock()

    def copy(source: socket.socket, sink: socket.socket, *, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                with lock:
                    counted.up_bytes += len(data) if up else 0
                    counted.down_bytes += 0 if up else len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, int(port))) as there:
                upwards = threading.Thread(
                    target=copy, args=(self.request, there), kwargs={"up": True}, daemon=True
                )
                upwards.start()
                copy(there, self.request, up=False)
                upwards.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        counted = Counted(f"127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield counted
        finally:
            server.shutdown()


async def measured(
    way: str, program: Program, first: str, last: str, rounds: int, proxy: Counted
) -> list[Figure]:
    """What the `rounds` between two lines of a program took, as figures.

    `way` begins the figures' names; `first` and `last` are patterns of the lines.
    """
    await program.says(first)
    begin_s, up, down = time.monotonic(), proxy.up_bytes, proxy.down_bytes
    await program.says(last, PATIENCE_S)
    seconds, each = time.monotonic() - begin_s, rounds * len(WORKERS)
    return [
        Figure(f"{way}: a round", seconds / rounds, "s"),
        Figure(f"{way}: up, for a worker and round", (proxy.up_bytes - up) / each, "B"),
        Figure(f"{way}: down, for a worker and round", (proxy.down_bytes - down) / each, "B"),
    ]
