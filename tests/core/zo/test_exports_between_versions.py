"""An export computes the same in every version of its readers, whatever was trained.

`make test-lowest` names the interpreter of the newest versions as the other one, and exports go
both ways. Elsewhere the other one is this one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedmezo_core.config import LoraConfig
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.export import export_adapter, export_model
from fedmezo_core.zo.model.loading import load_model, quiet
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights

OTHER_PYTHON = os.environ.get("FEDMEZO_TEST_OTHER_PYTHON", sys.executable)
ROOT = Path(__file__).parents[3]
IDS = torch.arange(20)[None]
KINDS = ("llama", "llama-tied", "gpt2", "qwen3", "mixtral")
TIED_HEADS = ("llama-tied", "gpt2")
MADE = (*(f"{kind}-full" for kind in KINDS), *(f"{kind}-head" for kind in TIED_HEADS))
ADAPTERS = tuple(f"{kind}-adapter" for kind in TIED_HEADS)


def write_exports(bases: Path, out: Path) -> None:
    """Train each base a step, all of it or an adapter of its tied head, and export it."""
    card = ModelCard("the-base", "a-run")
    for kind in KINDS:
        loaded = load_model(str(bases / kind))
        _train(loaded)
        export_model(loaded, out / f"{kind}-full", card)
        _save(out / f"{kind}-full.npy", loaded.model)
    for kind in TIED_HEADS:
        lora = LoraConfig(rank=4, alpha=16, target_modules=("lm_head",))
        loaded = load_model(str(bases / kind), lora=lora)
        _train(loaded)
        export_model(loaded, out / f"{kind}-head", card)
        export_adapter(loaded, out / f"{kind}-adapter", card)
        for name in ("head", "adapter"):
            _save(out / f"{kind}-{name}.npy", loaded.model)


def read_exports(bases: Path, out: Path, found: Path) -> None:
    """Load what `write_exports` has written into `out`, and write the logits to `found`."""
    import peft

    with quiet():
        for name in MADE:
            _save(found / f"{name}.npy", AutoModelForCausalLM.from_pretrained(out / name))
        for name in ADAPTERS:
            base: Any = AutoModelForCausalLM.from_pretrained(bases / name.removesuffix("-adapter"))
            adapted = peft.PeftModel.from_pretrained(base, str(out / name))
            _save(found / f"{name}.npy", adapted)


def _train(loaded: Any) -> None:
    weights = Weights(
        loaded.model,
        loaded.manifest,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.NEAREST,
    )
    seeds, coefficients = np.arange(2, dtype=np.uint64), np.array([2e-2, -1e-2], np.float32)
    weights.apply(1, [Commit(seeds, coefficients, 1)])


def _save(path: Path, model: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        np.save(path, model.eval()(IDS).logits.float().numpy())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        shutil.copytree(folder_of(kind), folder / kind)
    settings = json.loads((folder / "llama" / "config.json").read_text())
    # Versions have two spellings of this; who does not know one computes with 10,000.
    settings.pop("rope_parameters", None)
    settings["rope_theta"] = 500.0
    (folder / "llama" / "config.json").write_text(json.dumps(settings))
    return folder


def _by_the_other(call: str, *arguments: Path) -> None:
    paths = [str(ROOT / name) for name in ("", "proto", "coordinator", "worker")]
    given = ", ".join(f"Path({str(argument)!r})" for argument in arguments)
    program = (
        "from pathlib import Path; "
        f"from tests.core.zo.test_exports_between_versions import {call}; {call}({given})"
    )
    without = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [OTHER_PYTHON, "-c", program],
        env={**without, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("other_writes", [True, False], ids=["from the other", "to the other"])
def test_an_export_computes_the_same(other_writes: bool, bases: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "out", tmp_path / "found"
    if other_writes:
        _by_the_other("write_exports", bases, out)
        read_exports(bases, out, found)
    else:
        write_exports(bases, out)
        _by_the_other("read_exports", bases, out, found)
    for name in (*MADE, *ADAPTERS):
        expected: npt.NDArray[np.float32] = np.load(out / f"{name}.npy")
        assert np.allclose(np.load(found / f"{name}.npy"), expected, atol=1e-3), name
        untrained: Any = AutoModelForCausalLM.from_pretrained(bases / name.rpartition("-")[0])
        with torch.inference_mode():
            assert not np.allclose(untrained(IDS).logits.numpy(), expected, atol=1e-2), name
