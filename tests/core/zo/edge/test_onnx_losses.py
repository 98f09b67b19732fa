"""A graph of the base for ONNX Runtime: its losses are torch's, and bad graphs are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ModelError
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine
from fedmezo_core.zo.edge.onnx_losses import OnnxLosses
from fedmezo_core.zo.party import open_party
from tests.core.zo.edge.conftest import Run, admitting, contract, order_of, rows

WHY = "needs fedmezo[onnx], which is not installed"
pytest.importorskip("onnxruntime", reason=WHY)


def test_a_graph_that_is_none_is_refused(run_of: Callable[[RunConfig], Run]) -> None:
    run = run_of(contract())
    with pytest.raises(ModelError, match="ONNX Runtime cannot load"):
        OnnxLosses(read_form(run.form, run.genesis))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "output_rank"),
    [(None, None), ({"kind": "instruction", "tokens_max": 64}, None), (None, 3)],
)
def test_its_projected_gradients_are_torchs(
    base_folder: Path, tmp_path: Path, task: Any, output_rank: int | None
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=WHY)
    from fedmezo_core.zo.edge.edge_export import export_onnx_form

    config = contract(task=task, probes=6, output_rank=output_rank)
    party = open_party(config, str(base_folder), threads=1)
    party = admitting(party, export_onnx_form(party, tmp_path / "form"))
    genesis = party.genesis()
    form = read_form(tmp_path / "form", genesis)
    engine = EdgeEngine(genesis, "w1", form, OnnxLosses(form, threads=1), rows(), threads=1)
    order = order_of(party.config)
    batches = open_batches(party, party.encode(Path("d"), rows()), "w1")
    theirs = measure(
        party, open_estimator(party, threads=1), batches, order, digest=party.weights.digest
    )
    mine = engine.measure(order)
    ours, torchs = mine.scalars.projected_grads, theirs.scalars.projected_grads
    assert np.corrcoef(ours, torchs)[0, 1] >= 0.999
    assert mine.scalars.weights_digest64 == theirs.scalars.weights_digest64
