"""llama.cpp's losses are torch's for the same base, whatever module the adapter is on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmezo_core.config import LoraConfig, RunConfig
from fedmezo_core.errors import ModelError
from fedmezo_core.zo.assignment import measure, open_batches, open_estimator
from fedmezo_core.zo.edge.adapter_file import AdapterFile, GgufShape
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine
from fedmezo_core.zo.edge.edge_export import export_gguf_form
from fedmezo_core.zo.edge.llama_losses import LlamaLosses
from fedmezo_core.zo.party import open_party
from tests.core.zo.edge.conftest import Run, admitting, contract, order_of, quantised, rows

WHY = "needs fedmezo[llama-cpp], which is not installed"
pytest.importorskip("gguf", reason=WHY)


def test_an_adapter_that_has_no_place_in_a_gguf_is_refused(tmp_path: Path) -> None:
    matrix = np.zeros((4, 8), np.float32)
    good = {"base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight": matrix}
    bad = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight": matrix}
    path = tmp_path / "adapter.gguf"
    with pytest.raises(ModelError, match="has no place for the adapter's matrix"):
        AdapterFile(path, bad, GgufShape("llama", 4, 2), alpha=16)
    with pytest.raises(ModelError, match="of the architecture mamba cannot take"):
        AdapterFile(path, good, GgufShape("mamba", 4, 2), alpha=16)


def test_matrices_are_overwritten_in_place(tmp_path: Path) -> None:
    import gguf

    names = [f"m.layers.{k}.self_attn.v_proj.lora_B.default.weight" for k in range(3)]
    start = {name: np.full((6, 2), k, np.float32) for k, name in enumerate(names)}
    file = AdapterFile(tmp_path / "a.gguf", start, GgufShape("qwen2", 4, 2), alpha=16)
    moved = {**start, names[1]: np.arange(12, dtype=np.float32).reshape(6, 2)}
    file.write(moved)
    reader: Any = gguf.GGUFReader(str(file.path))
    found = {one.name: np.array(one.data) for one in reader.tensors}
    for k, name in enumerate(names):
        assert np.array_equal(found[f"blk.{k}.attn_v.weight.lora_b"], moved[name])


def test_a_damaged_gguf_is_refused(run_of: Callable[[RunConfig], Run]) -> None:
    pytest.importorskip("llama_cpp", reason=WHY)
    run = run_of(contract())
    form = read_form(run.form, run.genesis)
    form.model_path.write_bytes(b"GGUF and more")
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load"):
        LlamaLosses(form)


def open_files() -> list[str]:
    """Files without a name that this process has open for adapters."""
    links = [str(path.resolve()) for path in Path("/proc/self/fd").iterdir()]
    return [link for link in links if "fedmezo-adapter" in link]


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q4_0"])
@pytest.mark.parametrize("task", [None, {"kind": "instruction", "tokens_max": 64}])
@pytest.mark.parametrize(
    ("targets", "output_rank"),
    [
        (("q_proj", "v_proj"), None),
        (("k_proj", "o_proj", "down_proj"), None),
        (("q_proj", "v_proj"), 3),
    ],
)
def test_its_projected_gradients_are_torchs(
    base_folder: Path,
    tmp_path: Path,
    task: Any,
    targets: tuple[str, ...],
    output_rank: int | None,
    type_name: str,
) -> None:
    """Whatever type the weights have; llama.cpp's own products of Q4_0 drown this eps."""
    pytest.importorskip("llama_cpp", reason=WHY)
    from benchmarks.integrations.gguf_models import write_llama

    lora = LoraConfig(
        rank=4, alpha=16, target_modules=targets, freeze_a=True, output_rank=output_rank
    )
    config = contract(task=task, probes=6, eps=1e-3).model_copy(update={"lora": lora})
    model = quantised(base_folder, tmp_path / "base", type_name)
    write_llama(model, tmp_path / "base.gguf", type_name=type_name)
    party = open_party(config, str(tmp_path / "base"), threads=1)
    party = admitting(party, export_gguf_form(party, tmp_path / "form", tmp_path / "base.gguf"))
    genesis = party.genesis()
    form = read_form(tmp_path / "form", genesis)
    losses = LlamaLosses(form, threads=1)
    engine = EdgeEngine(genesis, "w1", form, losses, rows(), threads=1)
    order = order_of(party.config)
    batches = open_batches(party, party.encode(Path("d"), rows()), "w1")
    theirs = measure(
        party, open_estimator(party, threads=1), batches, order, digest=party.weights.digest
    )
    mine = engine.measure(order)
    assert open_files()
    del engine, losses
    gc.collect()
    assert not open_files(), "a forgotten engine leaves nothing"
    ours, torchs = mine.scalars.projected_grads, theirs.scalars.projected_grads
    assert np.corrcoef(ours, torchs)[0, 1] >= 0.999
    assert mine.scalars.mean_loss == pytest.approx(theirs.scalars.mean_loss, rel=1e-3)
    assert mine.scalars.weights_digest64 == theirs.scalars.weights_digest64
