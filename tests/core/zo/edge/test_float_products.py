"""Products by a GGUF's weights are float32, in parts too, and what goes wrong is said."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from fedmezo_core.errors import MeasurementError, ModelError
from fedmezo_core.zo.edge import float_products
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine
from fedmezo_core.zo.edge.edge_export import export_gguf_form
from fedmezo_core.zo.edge.float_products import FloatProducts
from fedmezo_core.zo.party import open_party
from tests.core.zo.edge.conftest import admitting, contract, order_of, rows

WHY = "needs fedmezo[llama-cpp], which is not installed"
pytest.importorskip("gguf", reason=WHY)
pytest.importorskip("llama_cpp", reason=WHY)


@pytest.fixture
def engine(base_folder: Path, tmp_path: Path) -> Iterator[EdgeEngine]:
    """An engine on llama.cpp with a base of 4 bits."""
    from benchmarks.integrations.gguf_models import write_llama
    from fedmezo_core.zo.edge.llama_losses import LlamaLosses

    party = open_party(contract(), str(base_folder), threads=1)
    model = LlamaForCausalLM.from_pretrained(base_folder)
    write_llama(model, tmp_path / "base.gguf", type_name="Q4_0")
    party = admitting(party, export_gguf_form(party, tmp_path / "form", tmp_path / "base.gguf"))
    genesis = party.genesis()
    form = read_form(tmp_path / "form", genesis)
    losses = LlamaLosses(form, threads=2)
    yield EdgeEngine(genesis, "w1", form, losses, rows(), threads=1)
    losses.close()


def test_parts_of_a_product_are_those_of_the_whole(
    engine: EdgeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_of(contract())
    whole = engine.measure(order).scalars
    monkeypatch.setattr(float_products, "_PART_FLOATS", 7 * 32)
    in_parts = engine.measure(order).scalars
    assert in_parts.mean_loss == pytest.approx(whole.mean_loss, rel=1e-6)
    np.testing.assert_allclose(in_parts.projected_grads, whole.projected_grads, atol=1e-4)


def test_a_product_that_fails_ends_the_measurement(
    engine: EdgeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_self: Any, _node: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(FloatProducts, "_replace", fail)
        with pytest.raises(MeasurementError, match=r"product in float32 \(MemoryError\)"):
            engine.measure(order_of(contract()))
    assert "no room" in caplog.text, "a foreign exception's message stays in the worker's log"
    assert engine.measure(order_of(contract())), "the next measurement begins anew"


def test_a_library_without_the_operations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import _ggml

    monkeypatch.setattr(_ggml, "libggml", SimpleNamespace(ggml_init=_ggml.libggml.ggml_init))
    with pytest.raises(ModelError, match=r"cannot be told to compute in float32 .*ggml_free"):
        FloatProducts(threads=1)


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [one for one in float_products._Tensor._fields_ if one[0] != "flags"]
    other = type("_Tensor", (ctypes.Structure,), {"_fields_": [("first", ctypes.c_int64), *fields]})
    monkeypatch.setattr(float_products, "_Tensor", other)
    with pytest.raises(ModelError, match="its tensors have another layout"):
        FloatProducts(threads=1)
