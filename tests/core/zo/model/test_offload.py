"""Offloaded weights: the same manifest, digests and commits as if they were all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from fedmezo_core.errors import ModelError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.model.offload import (
    execution_device,
    move_into_mapped_memory,
    put_back,
    stored_parameters,
    unique_parameters,
)
from fedmezo_core.zo.model.weight_digest import base_digest, weights_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
COMMITS = [
    Commit(np.array([5, 6], np.uint64), np.array([0.02, -0.01], np.float32), 1),
    Commit(np.array([7], np.uint64), np.array([0.03], np.float32), 2),
]
KINDS = ("gpt2", "llama", "llama-tied")


def _to_memory(model: nn.Module, _folder: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def _to_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))
    move_into_mapped_memory(model, folder)


def _in_part(model: nn.Module, folder: Path) -> None:
    parts = [name for name, _ in model.named_children()]
    # Tied to what is in the first part, as transformers' own maps keep them together.
    stay = {parts[0], parts[-1]}
    inner = getattr(model, parts[0])
    device_map: dict[str, Any] = {name: "cpu" for name in stay if name != parts[0]}
    for name, child in inner.named_children():
        if isinstance(child, nn.ModuleList):
            device_map |= {
                f"{parts[0]}.{name}.{k}": "disk" if k else "cpu" for k in range(len(child))
            }
        else:
            device_map[f"{parts[0]}.{name}"] = "cpu"
    dispatch_model(model, device_map, offload_dir=folder / "weights")
    move_into_mapped_memory(model, folder)


WAYS: dict[str, Callable[[nn.Module, Path], None]] = {
    "memory": _to_memory,
    "disk": _to_disk,
    "part": _in_part,
}


def _weights(model: nn.Module) -> Weights:
    return Weights(
        model,
        manifest_of(model),
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=1,
    )


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_is_the_plain_one(
    kind: str,
    way: str,
    dtype: torch.dtype,
    model_of: Callable[[str], nn.Module],
    tmp_path: Path,
) -> None:
    plain, moved = model_of(kind).to(dtype), model_of(kind).to(dtype)
    WAYS[way](moved, tmp_path)
    assert any(parameter.is_meta for parameter in moved.parameters())
    assert manifest_of(moved) == manifest_of(plain)
    assert base_digest(moved) == base_digest(plain)
    assert execution_device(moved) == torch.device("cpu")
    ours, theirs = _weights(plain), _weights(moved)
    for weights in (ours, theirs):
        weights.apply(1, COMMITS)
    assert ours.digest() == theirs.digest()
    assert ours.digest() != weights_digest(model_of(kind).to(dtype), ours.manifest)
    assert torch.equal(_logits(plain), _logits(moved)), "the next forward pass sees the commits"
    assert base_digest(moved) == base_digest(plain), "and leaves them"


def test_tied_weights_have_one_home(model_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    for name, way in WAYS.items():
        model = model_of("gpt2")
        (tmp_path / name).mkdir()
        way(model, tmp_path / name)
        stored = stored_parameters(model)
        assert stored["lm_head.weight"].storage_key == stored["transformer.wte.weight"].storage_key
        assert "transformer.wte.weight" not in unique_parameters(model)


def test_files_are_read_and_never_written(
    model_of: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = model_of("llama")
    plain = base_digest(model)
    disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert base_digest(model) == plain
    with pytest.raises(ModelError, match=r"lm_head\.weight is kept in a file, which is only read"):
        trained_tensors(model, manifest_of(model))
    before = _contents(tmp_path / "weights")
    move_into_mapped_memory(model, tmp_path)
    _weights(model).apply(1, COMMITS)
    assert base_digest(model) != plain
    assert _contents(tmp_path / "weights") == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"], "the mapped file has no name"


def test_a_full_disk_is_one_sentence(
    model_of: Callable[[str], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ModelError, match=r"need \d+ bytes in .* \(No space left on device\)"):
        move_into_mapped_memory(model, tmp_path)


def test_a_forward_pass_that_raised_leaves_no_old_weights(
    model_of: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    plain, model = model_of("gpt2"), model_of("gpt2")
    _to_memory(model, tmp_path)

    def fail(*_: Any) -> None:
        raise ValueError("in the head")

    head: Any = model.lm_head
    head._old_forward = fail
    with pytest.raises(ValueError, match="in the head"):
        _logits(model)
    head._old_forward = type(head).forward.__get__(head)
    assert not head.weight.is_meta
    put_back(model)
    assert head.weight.is_meta
    for weights in (_weights(plain), _weights(model)):
        weights.apply(1, COMMITS)
    assert torch.equal(_logits(plain), _logits(model))


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
