"""One form of a base, alone in its process and without torch: gradients, memory and time as JSON.

It reads `{"folder", "genesis", "rows", "batch_rows", "batches", "seeds"}` from standard input:
`genesis` is the record in hexadecimal, `seeds` says how many directions of each batch at which eps.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.integrations.edge_memory import peak_resident_mb
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.records import Genesis
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.edge.array_losses import edge_batch
from fedmezo_core.zo.edge.array_weights import ArrayWeights
from fedmezo_core.zo.edge.base_form import BaseForm, read_form
from fedmezo_core.zo.edge.edge_engine import PASS_TOKENS_MAX, Losses
from fedmezo_core.zo.plain.measurements import measurements_of, points_of


def main() -> None:
    """Print one line of JSON: `gradients` by eps and batch, `measurement_s` and `peak_mb`."""
    asked = json.load(sys.stdin)
    genesis = decode_record(bytes.fromhex(asked["genesis"]))
    assert isinstance(genesis, Genesis)
    form = read_form(Path(asked["folder"]), genesis)
    rows, batch_rows = read_rows(Path(asked["rows"]), genesis.config.task), asked["batch_rows"]
    examples = form.encoder.encode(rows[: batch_rows * asked["batches"]]).examples
    losses = _losses(form)
    weights = ArrayWeights(form.start, form.manifest, genesis.config, threads=1)
    gradients: dict[str, list[list[float]]] = {}
    spent_s, measured = 0.0, 0
    for eps, seeds in asked["seeds"].items():
        gradients[eps] = []
        for first in range(0, len(examples), batch_rows):
            chosen = examples[first : first + batch_rows]
            batch = edge_batch(
                chosen,
                "b",
                len(chosen),
                form.description.vocabulary_size,
                tokens_max=PASS_TOKENS_MAX,
            )
            begin_s = time.process_time()
            of_batch = []
            for seed in range(seeds):
                points = points_of([], [seed], float(eps), one_sided=False)
                found = list(losses(map(weights.moved, points), batch))
                [one] = measurements_of(found, float(eps), "b", one_sided=False)
                of_batch.append(one.projected_grad)
            spent_s += time.process_time() - begin_s
            measured += seeds
            gradients[eps].append(of_batch)
    assert "torch" not in sys.modules
    result = {
        "gradients": gradients,
        "measurement_s": spent_s / measured,
        "peak_mb": peak_resident_mb(),
    }
    print(json.dumps(result))


def _losses(form: BaseForm) -> Losses:
    if form.description.kind == "onnx":
        from fedmezo_core.zo.edge.onnx_losses import OnnxLosses

        return OnnxLosses(form, threads=1)
    from fedmezo_core.zo.edge.llama_losses import LlamaLosses

    return LlamaLosses(form, threads=1)


if __name__ == "__main__":
    main()
