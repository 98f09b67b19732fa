"""The adapter for llama.cpp: the matrices of the peft adapter, at their places in a GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.zo.model.model_card import GGUF_ADAPTER_FILE
from tests.home.conftest import LORA, FinishedRun

pytestmark = pytest.mark.slow


def test_it_holds_the_matrices_of_the_adapter(
    lora_run: FinishedRun, exported: Callable[..., Path]
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, which is not installed")
    folder = exported(lora_run, "--as", "gguf", name="gguf")
    peft = load_file(exported(lora_run, "--as", "adapter") / "adapter_model.safetensors")
    reader: Any = gguf.GGUFReader(str(folder / GGUF_ADAPTER_FILE))
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.lora.alpha").contents() == LORA["alpha"]
    found = {one.name: np.array(one.data) for one in reader.tensors}
    assert len(found) == len(peft)
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn"
        for module, place in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
            for side in "AB":
                wanted = peft[f"{name}.{module}.lora_{side}.weight"]
                if module == "q_proj" and side == "B":
                    # Of the rows of queries, a GGUF pairs neighbours: 4 heads, halves of 4.
                    wanted = wanted.reshape(4, 2, 4, -1).swapaxes(1, 2).reshape(wanted.shape)
                assert np.array_equal(
                    found[f"blk.{layer}.{place}.weight.lora_{side.lower()}"], wanted
                )
    assert "--lora FOLDER/adapter.gguf" in (folder / "README.md").read_text()


def test_runs_that_have_no_such_adapter(
    full_run: FinishedRun, exported: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--as gguf: this run trains no adapter"):
        exported(full_run, "--as", "gguf")
    with pytest.raises(ConfigError, match="--adapter-only is --as adapter, not gguf"):
        exported(full_run, "--as", "gguf", "--adapter-only")
    assert not list(tmp_path.iterdir())


def test_an_architecture_whose_adapters_are_not_known(
    exported: Callable[..., Path], lora_run_of_gpt2: FinishedRun, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="architecture gpt2 cannot take the run's adapter"):
        exported(lora_run_of_gpt2, "--as", "gguf")
    assert not list(tmp_path.iterdir())
