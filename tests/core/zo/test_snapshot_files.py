"""Snapshot files: what is written is what another party installs, or it says why not."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmezo_core.errors import DivergedError, SnapshotDamagedError, SnapshotError
from fedmezo_core.wire.snapshots import Snapshot
from fedmezo_core.zo import snapshot_files
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.model.manifest import manifest_of
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.plain.snapshot_header import sha256_of
from fedmezo_core.zo.snapshot_files import install_snapshot, write_snapshot
from fedmezo_core.zo.weights import Weights

HEAD = b"h" * 32

ModelOf = Callable[[str], nn.Module]


def weights_of(model: nn.Module, **options: Any) -> Weights:
    return Weights(
        model,
        manifest_of(model),
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=1,
        **options,
    )


def commit_of(number: int, *, from_base: bool = False) -> Commit:
    return Commit(
        np.array([number << 16], dtype=np.uint64),
        np.array([1e-3], dtype=np.float32),
        number,
        from_base=from_base,
    )


def written(folder: Path, weights: Weights) -> tuple[Path, Snapshot]:
    snapshot = write_snapshot(
        folder, weights, run_id="tiny", head=HEAD, weights_digest=weights.digest()
    )
    return folder / f"tiny-{weights.round}.safetensors", snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_installed_and_goes_on_alike(
    model_of: ModelOf, tmp_path: Path, dtype: torch.dtype
) -> None:
    ours, theirs = (weights_of(model_of("gpt2").to(dtype)) for _ in range(2))
    ours.apply(1, [commit_of(1), commit_of(2)])
    path, snapshot = written(tmp_path / "new" / "folder", ours)
    assert snapshot == Snapshot(2, HEAD, ours.digest(), sha256_of(path), path.stat().st_size)
    assert snapshot.file_sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    install_snapshot(path, theirs, snapshot)
    assert theirs.round == 2
    for weights in (ours, theirs):
        weights.apply(3, [commit_of(3)])
    assert theirs.digest() == ours.digest()


def test_weights_from_a_snapshot_still_know_their_base(model_of: ModelOf, tmp_path: Path) -> None:
    ours, theirs = (
        weights_of(model_of("gpt2"), keeps_base=True, base_folder=tmp_path) for _ in range(2)
    )
    ours.apply(1, [commit_of(1)])
    path, snapshot = written(tmp_path, ours)
    install_snapshot(path, theirs, snapshot)
    for weights in (ours, theirs):
        weights.apply(2, [commit_of(2, from_base=True)])
    assert theirs.digest() == ours.digest()


def test_a_flipped_bit_in_the_weights_is_found_and_the_weights_are_used_no_more(
    model_of: ModelOf, tmp_path: Path
) -> None:
    ours, theirs = weights_of(model_of("gpt2")), weights_of(model_of("gpt2"))
    path, snapshot = written(tmp_path, ours)
    octets = bytearray(path.read_bytes())
    octets[-5] ^= 1
    path.write_bytes(octets)
    with pytest.raises(SnapshotDamagedError, match="snapshot of round 0 have digest"):
        install_snapshot(path, theirs, snapshot)
    with pytest.raises(DivergedError):
        theirs.digest()


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -4])
def test_a_file_cut_short_is_no_snapshot(
    model_of: ModelOf, tmp_path: Path, kept_bytes: int
) -> None:
    ours, theirs = weights_of(model_of("gpt2")), weights_of(model_of("gpt2"))
    path, snapshot = written(tmp_path, ours)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(SnapshotDamagedError, match="is no safetensors file that can be read"):
        install_snapshot(path, theirs, snapshot)
    assert theirs.digest() == ours.digest(), "nothing was touched"


_VALUES: tuple[Any, ...] = (
    "",
    "F32",
    "x" * 300,
    0,
    -1,
    1,
    2**63,
    2**64,
    None,
    True,
    [],
    [0],
    [2**40, 2**40],
)


def _change(rng: random.Random, part: Any) -> None:
    """Change one value somewhere in the JSON of a header."""
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    key = rng.choice(keys) if keys else None
    if key is None:
        return
    if isinstance(part[key], (dict, list)) and rng.random() < 0.8:
        _change(rng, part[key])
    elif rng.random() < 0.2:
        del part[key]
    else:
        part[key] = copy.deepcopy(rng.choice(_VALUES))


def test_a_hand_made_header_is_installed_or_refused_in_a_sentence(tmp_path: Path) -> None:
    path, snapshot = written(tmp_path, weights_of(nn.Linear(3, 2)))
    octets = path.read_bytes()
    begin = 8 + int.from_bytes(octets[:8], "little")
    header, data = json.loads(octets[8:begin]), octets[begin:]
    refused = 0
    for seed in range(200):
        rng, changed = random.Random(seed), copy.deepcopy(header)
        for _ in range(rng.choice((1, 1, 2, 3))):
            _change(rng, changed)
        text = json.dumps(changed).encode()
        length = rng.choice([len(text)] * 9 + [0, len(text) - 1, 2**63, 2**64 - 1])
        path.write_bytes(length.to_bytes(8, "little") + text + data)
        try:
            install_snapshot(path, weights_of(nn.Linear(3, 2)), snapshot)
        except SnapshotDamagedError:
            refused += 1
    assert refused > 100


def test_a_snapshot_of_another_round_head_or_model_is_refused_before_anything_is_touched(
    model_of: ModelOf, tmp_path: Path
) -> None:
    ours, theirs = weights_of(model_of("gpt2")), weights_of(model_of("gpt2"))
    path, snapshot = written(tmp_path, ours)
    for changed, named in (
        (replace(snapshot, round=1), "round"),
        (replace(snapshot, head=b"x" * 32), "head"),
        (replace(snapshot, weights_digest=b"x" * 32), "weights_digest"),
    ):
        with pytest.raises(SnapshotDamagedError, match=rf"\({named}\)"):
            install_snapshot(path, theirs, changed)
    other = weights_of(model_of("gpt2").to(torch.bfloat16))
    with pytest.raises(SnapshotDamagedError, match="manifest_digest"):
        install_snapshot(path, other, snapshot)
    assert theirs.digest() == ours.digest()


def test_a_full_disk_leaves_nothing_behind_and_says_so(
    model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(model_of("gpt2"))

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot_files, "sync", full)
    with pytest.raises(SnapshotError, match=r"cannot be written to .* \(No space left on device\)"):
        written(tmp_path, weights)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(model_of: ModelOf, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    with pytest.raises(SnapshotError, match=r"cannot be written to .*taken"):
        written(tmp_path / "taken", weights_of(model_of("gpt2")))
