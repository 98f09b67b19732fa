"""Loading a model for a device: where its weights go, and what is wrong with a placement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.export import export_adapter, export_model
from fedmezo_core.zo.model.loading import LoadedModel, load_model
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.offload import stored_parameters
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.weight_digest import base_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights

COMMITS = [Commit(np.array([5, 6], np.uint64), np.array([0.02, -0.01], np.float32), 1)]
CARD = ModelCard("m", "a-run")
KINDS = ("gpt2", "llama", "llama-tied", "mixtral")
LORA = LoraConfig(rank=4, alpha=16, target_modules=("q_proj", "v_proj"))

FolderOf = Callable[[str], Path]


def _placement(folder: Path, tmp_path: Path, share: float = 0.6) -> Placement:
    """Room in memory for a share of the weights."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Placement("cpu", int(share * size), tmp_path / "offload")


def _digest_after_commits(loaded: LoadedModel) -> bytes:
    weights = Weights(
        loaded.model,
        loaded.manifest,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=1,
    )
    weights.apply(1, COMMITS)
    return weights.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_a_disk_are_the_same_model(
    kind: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = folder_of(kind)
    checkpoint = {path: path.read_bytes() for path in folder.iterdir()}
    for share in (0.6, 0.95):
        plain = load_model(str(folder))
        moved = load_model(str(folder), placement=_placement(folder, tmp_path, share))
        mapped = [stored for stored in stored_parameters(moved.model).values() if stored.offloaded]
        assert mapped
        assert all(stored.tensor is not None for stored in mapped)
        assert moved.manifest == plain.manifest
        assert base_digest(moved.model) == base_digest(plain.model)
        assert _digest_after_commits(moved) == _digest_after_commits(plain)
    assert {path: path.read_bytes() for path in folder.iterdir()} == checkpoint
    # A worker that is killed leaves nothing that its next start could take for the base.
    assert list((tmp_path / "offload").iterdir()) == []
    again = load_model(str(folder), placement=_placement(folder, tmp_path))
    assert base_digest(again.model) == base_digest(load_model(str(folder)).model)


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_an_adapter_on_a_base_in_files(kind: str, folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of(kind)
    plain = load_model(str(folder), lora=LORA, run_seed=3)
    moved = load_model(
        str(folder), lora=LORA, run_seed=3, placement=_placement(folder, tmp_path, 0.4)
    )
    files = {stored.file for stored in stored_parameters(moved.model).values() if stored.file}
    assert files == {folder / "model.safetensors"}, "what is not trained stays in the checkpoint"
    assert moved.manifest == plain.manifest
    assert base_digest(moved.model) == base_digest(plain.model)
    assert _digest_after_commits(moved) == _digest_after_commits(plain)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = [loaded.model(input_ids=ids).logits for loaded in (plain, moved)]
    assert torch.equal(*logits)
    for loaded, name in ((plain, "plain"), (moved, "moved")):
        export_adapter(loaded, tmp_path / f"{name}-adapter", CARD)
    _assert_same_files(tmp_path / "plain-adapter", tmp_path / "moved-adapter")
    if kind != "mixtral":
        for loaded, name in ((plain, "plain"), (moved, "moved")):
            export_model(loaded, tmp_path / name, CARD)
        _assert_same_model(tmp_path / "plain", tmp_path / "moved")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_offloaded_model_is_exported_with_its_commits(
    kind: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = folder_of(kind)
    plain = load_model(str(folder))
    moved = load_model(str(folder), placement=_placement(folder, tmp_path))
    for loaded, name in ((plain, "plain"), (moved, "moved")):
        _digest_after_commits(loaded)
        export_model(loaded, tmp_path / name, CARD)
    _assert_same_model(tmp_path / "plain", tmp_path / "moved")


def _assert_same_files(one: Path, other: Path) -> None:
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes()


def _assert_same_model(one: Path, other: Path) -> None:
    one_digest, other_digest = (base_digest(load_model(str(f)).model) for f in (one, other))
    assert one_digest == other_digest


def test_everything_fits(folder_of: FolderOf, tmp_path: Path) -> None:
    loaded = load_model(
        str(folder_of("llama")), placement=Placement("auto", None, tmp_path / "offload")
    )
    assert not any(stored.offloaded for stored in stored_parameters(loaded.model).values())


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "there is no cuda, because this machine, as PyTorch sees it, has no CUDA device"),
        ("cuda:3", "there is no cuda:3"),
        ("tpu", "'tpu' is no device; use auto, cpu, cuda or cuda:1"),
        ("cuda:x", "'cuda:x' is no device"),
        ("cpu:1", "'cpu:1' is no device"),
    ],
)
def test_a_device_that_is_not_there(
    device: str, words: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder_of("llama")), placement=Placement(device))
    assert words in str(caught.value)


def test_no_room_and_no_folder(folder_of: FolderOf, tmp_path: Path) -> None:
    placement = Placement("cpu", _placement(folder_of("llama"), tmp_path).device_memory_max_bytes)
    with pytest.raises(ModelError, match="name an offload_folder on a disk, or raise"):
        load_model(str(folder_of("llama")), placement=placement)


def test_a_device_with_room_for_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    model = torch.nn.Linear(1, 1)
    for device_map in ({"model": "cpu", "lm_head": "cpu"}, {}):
        setattr(model, "hf_device_map", device_map)  # noqa: B010
        with pytest.raises(ModelError, match="The device's memory holds no layer of tiny"):
            Placement("cuda").check("tiny", model)
    setattr(model, "hf_device_map", {"model": "cpu", "lm_head": 0})  # noqa: B010
    Placement("auto").check("tiny", model)
    # transformers leaves no map where all is on one device.
    Placement("auto").check("tiny", torch.nn.Linear(1, 1, device="meta"))


def test_a_folder_that_cannot_be_written_to(folder_of: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"offload_folder: cannot write to .*file"):
        load_model(str(folder_of("llama")), placement=Placement("cpu", 1000, tmp_path / "file"))
