"""The weights' holder where commits start from the base again."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedmezo_core.errors import ConfigError, DivergedError, MismatchError, NumericError
from fedmezo_core.records import Committed, SeedRange
from fedmezo_core.zo import devices
from fedmezo_core.zo.arithmetic_spec import materialize_reference
from fedmezo_core.zo.commits import Commit, commits_of
from fedmezo_core.zo.kept_base import KeptBase
from fedmezo_core.zo.materialize import materialize, materialize_fan
from fedmezo_core.zo.model.loading import load_model
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.weights import Weights

HOW: Any = {"distribution": Distribution.RADEMACHER, "rounding": Rounding.STOCHASTIC}

ModelOf = Callable[[str], nn.Module]


def _commit(
    number: int, *, decay: float = 1.0, from_base: bool = False, pairs: int | None = None
) -> Commit:
    generator = np.random.default_rng(number)
    pairs = number % 3 if pairs is None else pairs
    return Commit(
        generator.integers(0, 2**64, pairs, dtype=np.uint64),
        generator.normal(0, 1e-2, pairs).astype(np.float32),
        number,
        decay=decay,
        from_base=from_base,
    )


def _weights(model: nn.Module, **options: Any) -> Weights:
    return Weights(model, manifest_of(model), threads=1, **HOW, **options)


def _rebuilt(model: nn.Module, commits: Sequence[Commit]) -> bytes:
    """The digest of a model at the base after one commit that starts from it, and others."""
    plain = [
        Commit(commit.seeds, commit.coefficients, commit.rounding_seed, decay=commit.decay)
        for commit in commits
    ]
    manifest = manifest_of(model)
    for entry, tensor in zip(manifest, trained_tensors(model, manifest), strict=True):
        operands = Operands(entry.tensor_id, **HOW)
        materialize(tensor, tensor.clone(), plain, operands)
    return _weights(model).digest()


commits_before = st.lists(st.tuples(st.sampled_from([1.0, 0.5]), st.booleans()), max_size=4).map(
    lambda kinds: [_commit(k, decay=d, from_base=b) for k, (d, b) in enumerate(kinds)]
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=commits_before,
    after=st.integers(0, 2),
    decay=st.sampled_from([1.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cut=st.integers(0, 7),
)
def test_a_commit_from_the_base_forgets_what_was_before(
    before: list[Commit],
    after: int,
    decay: float,
    dtype: torch.dtype,
    cut: int,
    model_of: ModelOf,
) -> None:
    """One by one, all at once, or in two parts: base + that commit and those after it."""
    last = [_commit(20, decay=decay, from_base=True), *(_commit(21 + k) for k in range(after))]
    commits = [*before, *last]
    expected = _rebuilt(model_of("gpt2").to(dtype), last)
    cut = min(cut, len(commits))
    for parts in ([commits], [[commit] for commit in commits], [commits[:cut], commits[cut:]]):
        weights = _weights(model_of("gpt2").to(dtype), keeps_base=True)
        for part in parts:
            weights.apply(weights.round + 1, part)
        assert weights.digest() == expected
        assert weights.round == len(commits)


def test_a_late_joiner_begins_at_the_last_commit_from_the_base(model_of: ModelOf) -> None:
    last = [_commit(7, from_base=True), _commit(8)]
    weights = _weights(model_of("gpt2"), keeps_base=True)
    with pytest.raises(DivergedError, match="round 8 cannot be applied to weights at round 0"):
        weights.apply(8, last[1:])
    # The commits before it may be there, and follow on nothing.
    weights.apply(6, [_commit(6), *last])
    assert weights.round == 8
    assert weights.digest() == _rebuilt(model_of("gpt2"), last)
    for first_round, commits in ((8, [_commit(8, from_base=True)]), (7, last)):
        with pytest.raises(DivergedError, match="cannot be applied to weights at round 8"):
            weights.apply(first_round, commits)
    weights.apply(30, [_commit(30, from_base=True)])
    assert weights.round == 30
    assert weights.digest() == _rebuilt(model_of("gpt2"), [_commit(30)])


def test_the_interrupted_round_is_named(model_of: ModelOf) -> None:
    weights = _weights(model_of("gpt2"), keeps_base=True)
    huge = Commit(np.ones(2, np.uint64), np.full(2, 3e38, np.float32), 0, from_base=True)
    with pytest.raises(NumericError, match=r"Tensor 0 \(.*element"):
        weights.apply(9, [huge])
    with pytest.raises(DivergedError, match="interrupted the commit of round 9"):
        weights.digest()


def test_weights_that_did_not_keep_their_base_say_so(model_of: ModelOf) -> None:
    weights = _weights(model_of("gpt2"))
    weights.apply(1, [_commit(1)])
    digest = weights.digest()
    with pytest.raises(
        MismatchError, match=r"round 3 starts from the base weights, which were not"
    ):
        weights.apply(2, [_commit(2), _commit(3, from_base=True)])
    assert weights.digest() == digest
    weights.apply(2, [_commit(2)])


def test_materialize_refuses_what_only_the_holder_can_do() -> None:
    commit = _commit(1, from_base=True)
    for build in (materialize, materialize_reference):
        with pytest.raises(AssertionError):
            build(torch.ones(3), torch.ones(3), [commit], Operands(0, **HOW))
    with pytest.raises(AssertionError):
        materialize_fan([torch.ones(3)], torch.ones(3), [commit], Operands(0, **HOW))


def test_on_a_device(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device without kernels: the base is copied over first."""
    last = [_commit(5, decay=0.5, from_base=True), _commit(6)]
    expected = _rebuilt(model_of("gpt2").to(torch.bfloat16), last)
    monkeypatch.setattr(devices, "elsewhere", lambda device: True)
    monkeypatch.setattr(devices, "kernels", lambda device: None)
    weights = _weights(model_of("gpt2").to(torch.bfloat16), keeps_base=True)
    weights.apply(1, [_commit(1)])
    weights.apply(2, last)
    assert weights.digest() == expected


def test_offloaded_weights(
    model_of: ModelOf, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    last = [_commit(5, decay=0.5, from_base=True), _commit(6)]
    expected = _rebuilt(model_of("llama-tied"), last)
    in_memory = model_of("llama-tied")
    manifest = manifest_of(in_memory)
    cpu_offload(in_memory, execution_device=torch.device("cpu"))
    size = (folder_of("llama-tied") / "model.safetensors").stat().st_size
    placement = Placement("cpu", size // 2, tmp_path)
    on_disk = load_model(str(folder_of("llama-tied")), placement=placement)
    for model in (in_memory, on_disk.model):
        weights = Weights(model, manifest, threads=1, keeps_base=True, base_folder=tmp_path, **HOW)
        weights.apply(1, [_commit(1), _commit(2)])
        weights.apply(3, last)
        assert weights.digest() == expected
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- the base in its file


def test_a_kept_base_is_a_copy_that_takes_no_resident_memory(tmp_path: Path) -> None:
    tensors = [
        torch.randn(3, 5).to(torch.bfloat16),
        torch.tensor(7.0),
        torch.randn(300, 1000),
        torch.randn(2, 2).half(),
    ]
    base = KeptBase(tensors, tmp_path)
    assert list(tmp_path.iterdir()) == []
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    for index, tensor in enumerate(before):
        assert base[index].dtype == tensor.dtype
        assert torch.equal(base[index], tensor)
        base.release(index)
        assert torch.equal(base[index], tensor), "it is read again"
    # After the last reading, which also maps what lies beside it.
    for index in range(len(tensors)):
        base.release(index)
    assert _resident_bytes(base[2].data_ptr()) == 0


def _resident_bytes(address: int) -> int:
    """Of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(
        ConfigError, match=r"needs 8192 bytes in .* \(No space left on device\); make"
    ):
        KeptBase([torch.ones(3), torch.ones(1)], tmp_path)


def test_the_folder_is_on_a_disk_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    plain = tempfile.TemporaryFile

    def noted(*, dir: Path) -> Any:  # noqa: A002
        folders.append(dir)
        return plain(dir=tmp_path)

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    KeptBase([torch.ones(3)])
    monkeypatch.delenv("TMPDIR")
    KeptBase([torch.ones(3)])
    monkeypatch.setattr(os, "access", lambda *_: False)
    KeptBase([torch.ones(3)])
    assert folders[:2] == [tmp_path, Path("/var/tmp")]
    assert folders[2] == Path(tempfile.gettempdir())


# ---------------------------------------------------------------------- from the journal


def test_records_say_where_a_commit_starts_and_how_weights_decay() -> None:
    runs = (SeedRange(5, (0.5, -0.25)),)
    plain, decayed, rebased = commits_of(
        [
            Committed(1, runs, 7),
            Committed(2, runs, 8, decay=0.75),
            Committed(3, runs, 9, decay=0.5, from_base=True),
        ]
    )
    assert (plain.decay, plain.from_base) == (1.0, False)
    assert (decayed.decay, decayed.from_base) == (0.75, False)
    assert (rebased.decay, rebased.from_base) == (0.5, True)
    assert rebased.seeds.tolist() == [5, 6]
