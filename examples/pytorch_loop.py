"""A federation inside one PyTorch program: a coordinator, and a session for each file of rows.

    python examples/pytorch_loop.py MODEL_FOLDER ROWS.jsonl ROWS.jsonl ...

The rows have a `text`, and a `label` that is `negative` or `positive`. Between rounds each
`engine.model` is a torch module like any other.
"""

from __future__ import annotations

import sys

import torch

import fedmezo
from fedmezo import Coordinator, Session, TorchEngine

TASK = {
    "template": "{text} It was",
    "verbalizers": {"negative": " terrible", "positive": " great"},
    "tokens_max": 64,
}


def main(model: str, *files: str) -> None:
    """Train with one worker for each file, and check that all end with the same weights."""
    contract = {"run_id": "loop", "model": model, "task": TASK, "rounds": 5, "batch_size": 4}
    contract |= {"workers_min": len(files), "quorum": len(files)}
    # For a model and rows of one's own the rows would be held-out ones, not a worker's.
    genesis = fedmezo.begin_run(contract, model, rate_rows=files[0])
    coordinator = Coordinator(genesis)
    engines = {
        f"worker-{k}": TorchEngine(genesis, f"worker-{k}", model, file)
        for k, file in enumerate(files)
    }
    sessions = {name: Session(genesis, name, engine) for name, engine in engines.items()}
    for name, session in sessions.items():
        for up in session.connect():
            coordinator.receive(name, up)
    while not coordinator.done:
        for name, session in sessions.items():
            for down in coordinator.outgoing(name):
                for up in session.receive(down):
                    coordinator.receive(name, up)
        norms = [
            sum(float(p.square().sum()) for p in engine.model.parameters()) ** 0.5
            for engine in engines.values()
        ]
        print(f"round {coordinator.round}, norms of the weights {norms}")
    digests = {digest.hex() for digest in coordinator.digests.values()}
    print(f"{len(sessions)} workers, {len(digests)} digest: {digests}")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
