"""One base in memory for the adapters of several runs."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import MismatchError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.model import loading
from fedmezo_core.zo.model.loading import SharedBases
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.party import Party, open_party
from tests.integration.support.harness import config_of

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "target_modules": ["all-linear"]}


@pytest.fixture
def folder(tmp_path: Path, folder_of: Callable[[str], Path]) -> Path:
    """A copy of a small model's folder that a test may spoil."""
    return Path(shutil.copytree(folder_of("llama-tied"), tmp_path / "model"))


def contract(**changes: Any) -> RunConfig:
    return config_of(**{"lora": LORA} | changes)


def opened(folder: Path, bases: SharedBases | None, **changes: Any) -> Party:
    return open_party(contract(**changes), str(folder), threads=1, bases=bases)


def storages(party: Party) -> set[int]:
    return {parameter.data_ptr() for parameter in party.loaded.model.parameters()}


def own(party: Party) -> list[str]:
    """The names of the parameters of an adapter."""
    return [name for name, _ in party.loaded.model.named_parameters() if ".lora_" in name]


def commit() -> Commit:
    return Commit(np.array([5], np.uint64), np.array([0.03], np.float32), 1)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "opt", "mixtral"])
def test_two_adapters_have_all_else_in_common_and_keep_their_bits(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    folder, bases = folder_of(kind), SharedBases()
    one, two = opened(folder, bases), opened(folder, bases, seed=9)
    alone = opened(folder, None, seed=9)
    assert one.base_digest != two.base_digest == alone.base_digest
    assert two.tokenizer_digest == alone.tokenizer_digest
    assert two.loaded.manifest == alone.loaded.manifest
    assert len(storages(two) - storages(one)) == len(own(two))
    for party in (one, two, alone):
        party.weights.apply(1, [commit()])
    assert one.weights.digest() != two.weights.digest() == alone.weights.digest()
    rows = torch.arange(12).view(2, 6)
    with torch.no_grad():
        first, second, third = (p.loaded.model(rows).logits for p in (one, two, alone))
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


def test_who_trains_the_base_itself_has_one_of_its_own(folder: Path) -> None:
    bases = SharedBases()
    adapted = opened(folder, bases)
    whole, part = opened(folder, bases, lora=None), opened(folder, bases, lora=None, train=["mlp"])
    assert storages(adapted).isdisjoint(storages(whole) | storages(part))
    whole.weights.apply(1, [commit()])
    assert opened(folder, bases).base_digest == adapted.base_digest


def test_another_dtype_or_other_files_are_another_base(folder: Path) -> None:
    bases = SharedBases()
    first = opened(folder, bases)
    assert storages(first).isdisjoint(storages(opened(folder, bases, dtype="bfloat16")))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert storages(first).isdisjoint(storages(opened(folder, bases)))


def test_a_program_reads_a_base_once_for_all_its_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    loader: Any = loading._auto_model

    class Counting:
        @staticmethod
        def from_pretrained(source: str, **given: Any) -> Any:
            read.append(source)
            return loader.from_pretrained(source, **given)

    monkeypatch.setattr(loading, "_auto_model", Counting)
    bases = SharedBases(keeps=True)
    digests = set()
    for _ in range(2):
        digests.add(opened(folder, bases).base_digest)
        gc.collect()
    assert len(read) == len(digests) == 1


def test_a_name_on_the_hub_is_one_base_until_its_revision_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def from_pretrained(self, source: str, **given: Any) -> Any:
            assert (source, given.pop("local_files_only")) == ("owner/model", False)
            return self.loader.from_pretrained(folder, **given)

    revisions = ["one", "one", "one", "one", "two", "two", "two"]
    monkeypatch.setattr(loading, "_cached_folder", lambda *_: None)
    monkeypatch.setattr(
        loading, "cached_file", lambda *_, **__: str(folder / revisions.pop(0) / "config.json")
    )
    for name in ("_auto_model", "AutoTokenizer"):
        monkeypatch.setattr(loading, name, Hub(getattr(loading, name)))
    bases = SharedBases()
    one, same, other = (opened(Path("owner/model"), bases) for _ in range(3))
    assert not revisions
    assert storages(one) & storages(same)
    assert storages(one).isdisjoint(storages(other))


def test_an_offloaded_base_is_its_own(folder: Path, tmp_path: Path) -> None:
    bases = SharedBases()
    placement = Placement("cpu", 1000, tmp_path / "offload")
    for _ in range(2):
        party = open_party(contract(), str(folder), placement=placement, bases=bases)
        assert party.loaded.base is None


def test_the_base_goes_with_the_last_that_has_it(folder: Path) -> None:
    bases = SharedBases()
    parties = [opened(folder, bases) for _ in range(2)]
    head = weakref.ref(frozen(parties[0]))
    parties.pop(0)
    gc.collect()
    assert head() is frozen(parties[0])
    parties.clear()
    gc.collect()
    assert head() is None


def frozen(party: Party) -> nn.Parameter:
    model: Any = party.loaded.model
    weight: nn.Parameter = model.get_input_embeddings().weight
    return weight


def test_who_loads_a_base_that_somebody_wrote_to_is_refused(folder: Path) -> None:
    bases = SharedBases()
    first = opened(folder, bases)
    with torch.no_grad():
        frozen(first).view(-1)[0].add_(1.0)
    with pytest.raises(MismatchError, match="The base weights loaded here differ"):
        opened(folder, bases).check_same_base(first.genesis())
