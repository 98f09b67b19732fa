"""A tiny LoRA run on a llama, its torch party, and forms of its base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_core.events import Measure, Ticket, Work
from fedmezo_core.records import Genesis
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.edge.edge_export import export_gguf_form
from fedmezo_core.zo.party import Party, open_party
from tests.core.zo.conftest import SENTENCES, make_model


def contract(
    *,
    freeze_a: bool = True,
    output_rank: int | None = None,
    task: dict[str, Any] | None = None,
    **more: Any,
) -> RunConfig:
    classes = {"verbalizers": {"0": " terrible", "1": " great"}}
    return RunConfig(
        run_id="r",
        model="tiny",
        task=TaskConfig(
            template_version=3,
            template="{text} All in all, it was",
            **(classes if task is None else task),
        ),
        lora=LoraConfig(
            rank=4,
            alpha=16,
            target_modules=("q_proj", "v_proj"),
            freeze_a=freeze_a,
            output_rank=output_rank,
        ),
        **{"batch_size": 3, "local_steps": 2, "eps": 1e-2, "rounds": 4, **more},
    )


def rows() -> list[Example]:
    return [
        Example(
            {"text": text[: 20 + 9 * k], "label": "01"[k % 2], "response": text[: k + 5]}, "d", k
        )
        for k, text in enumerate(SENTENCES * 2)
    ]


def order_of(config: RunConfig, *, want_digest: bool = True) -> Measure:
    seeds = tuple(range(100, 100 + config.local_steps * config.probes))
    return Measure(Ticket(1, 2, 0), Work(seeds, 1e-2, config.eps, want_digest))


@dataclass(frozen=True)
class Run:
    """A run that admits a form, the torch party of its base, and the form's folder."""

    genesis: Genesis
    party: Party
    form: Path


def admitting(party: Party, *forms: str) -> Party:
    """The party of the same run, but with a contract that admits `forms`."""
    config = party.config.model_copy(update={"base_forms": forms})
    return replace(party, config=config)


@pytest.fixture(scope="session")
def base_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model: Any = make_model("llama-tied")
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantised(folder: Path, into: Path, type_name: str) -> LlamaForCausalLM:
    """The model in `folder` with the values that GGUF's type keeps of its matrices, saved."""
    import gguf

    from benchmarks.integrations.gguf_models import kind_of

    model = LlamaForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        own = "token_embd.weight" if "embed_tokens" in name else name
        kind = kind_of(own, parameter.shape, type_name)
        kept = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind)
        parameter.data.copy_(torch.from_numpy(kept))
    shutil.copytree(folder, into)
    model.save_pretrained(into)
    return model


@pytest.fixture(scope="session")
def base_gguf(base_folder: Path) -> Path:
    """The base as a GGUF."""
    pytest.importorskip("gguf", reason="needs the package gguf, which is not installed")
    from benchmarks.integrations.gguf_models import write_llama

    path = base_folder.parent / "base.gguf"
    write_llama(LlamaForCausalLM.from_pretrained(base_folder), path)
    return path


@pytest.fixture
def run_of(base_folder: Path, base_gguf: Path, tmp_path: Path) -> Callable[[RunConfig], Run]:
    """A run with a form that the runtime of the test's own does not read."""

    def make(config: RunConfig) -> Run:
        party = open_party(config, str(base_folder), threads=1)
        folder = tmp_path / "form"
        party = admitting(party, export_gguf_form(party, folder, base_gguf))
        return Run(party.genesis(), party, folder)

    return make


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)
