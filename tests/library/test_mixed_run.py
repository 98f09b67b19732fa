"""Workers with and without torch in one run: they end with the same adapter, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from fedmezo import Coordinator, Engine, Session, TorchEngine
from fedmezo_core.records import Genesis
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_engine import EdgeEngine, Losses
from fedmezo_core.zo.edge.edge_export import export_gguf_form, export_onnx_form
from fedmezo_core.zo.party import Party, open_party
from tests.core.zo.conftest import make_tokenizer
from tests.core.zo.edge.conftest import admitting, base_folder, contract, rows

__all__ = ["base_folder"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def _onnx(party: Party, folder: Path) -> str:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs fedmezo[onnx], which is not installed")
    return export_onnx_form(party, folder)


def _llama(party: Party, folder: Path) -> str:
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason="needs fedmezo[llama-cpp], which is not installed")
    from benchmarks.integrations.gguf_models import write_llama

    file = folder.with_suffix(".gguf")
    write_llama(LlamaForCausalLM.from_pretrained(party.loaded.folder), file)
    return export_gguf_form(party, folder, file)


def _edge(kind: str, genesis: Genesis, folder: Path, ending: ExitStack) -> EdgeEngine:
    form = read_form(folder, genesis)
    losses: Losses
    if kind == "onnx":
        from fedmezo_core.zo.edge.onnx_losses import OnnxLosses

        losses = OnnxLosses(form, threads=1)
    else:
        from fedmezo_core.zo.edge.llama_losses import LlamaLosses

        losses = ending.enter_context(closing(LlamaLosses(form, threads=1)))
    return EdgeEngine(genesis, kind, form, losses, rows(), threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("onnx",), ("onnx", "gguf")])
def test_a_mixed_run_ends_with_one_digest(
    kinds: tuple[str, ...], base_folder: Path, tmp_path: Path
) -> None:
    names = ("torch", *kinds)
    config = contract(rounds=3, workers_min=len(names), quorum=len(names))
    party = open_party(config, str(base_folder), threads=1)
    exports: dict[str, Callable[[Party, Path], str]] = {"onnx": _onnx, "gguf": _llama}
    forms = [exports[kind](party, tmp_path / kind) for kind in kinds]
    genesis = admitting(party, *forms).genesis()
    engines: dict[str, Engine] = {
        "torch": TorchEngine(
            genesis, "torch", base_folder, [row.values for row in rows()], threads=1
        )
    }
    coordinator = Coordinator(genesis)
    with ExitStack() as ending:
        engines |= {kind: _edge(kind, genesis, tmp_path / kind, ending) for kind in kinds}
        sessions = {name: Session(genesis, name, engine) for name, engine in engines.items()}
        downs = dict.fromkeys(sessions, b"")
        for _ in range(200):
            if coordinator.done:
                break
            for name, session in sessions.items():
                downs[name] = coordinator.exchange(session.exchange(downs[name]))
    assert coordinator.done
    assert coordinator.round == 3
    assert set(coordinator.digests) == set(names)
    assert len(set(coordinator.digests.values())) == 1
    assert engines["torch"].digest() != party.weights.digest(), "the run moved the adapter"
