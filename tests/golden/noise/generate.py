"""Write v1.json from the specification. Run to add a domain or a type, never to fix a test: what is
there stays, byte for byte.

python tests/golden/noise/generate.py > tests/golden/noise/v1.json
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmezo_core.zo.arithmetic_spec import materialize_reference
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.noise import NOISE_VERSION, Distribution, Operands, Rounding, spec

PLACES = [
    # (seed, tensor id, first element)
    (0, 0, 0),
    (1, 0, 0),
    (0x9E3779B97F4A7C15, 7, 4090),
    (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 2**32 - 40),
    (0x0123456789ABCDEF, 271, 2**35 + 12_345),
    # block 2**32: the counter's second word is not zero
    (0x8000000000000001, 3, 2**34 - 24),
    (0x0000000100000000, 1, 2**39 - 24),
    (42, 2, 2**48 - 64),
]
COUNT = 64
COLUMNS = [1, 3, 64, 768, 4096, 11, 2**40, 5]
"""Lengths of the last dimension, one for each place."""


def hexadecimal(values: npt.NDArray[Any]) -> list[str]:
    return [f"{int(value):0{values.dtype.itemsize * 2}x}" for value in values]


def bits_of(values: torch.Tensor) -> str:
    width = torch.uint32 if values.dtype == torch.float32 else torch.uint16
    return " ".join(hexadecimal(values.view(width).numpy()))


def decayed_weights() -> list[dict[str, Any]]:
    """Commits with and without a decay, and without pairs, on a base of extreme numbers."""
    commits = [
        Commit(
            np.array([11, 2**63 + 5], dtype=np.uint64),
            np.array([1e-3, -2.5e-3], dtype=np.float32),
            rounding_seed=99,
            decay=float(np.float32(0.9999)),
        ),
        Commit(np.array([7], dtype=np.uint64), np.array([1e-6], dtype=np.float32), rounding_seed=3),
        Commit(
            np.array([], dtype=np.uint64),
            np.array([], dtype=np.float32),
            rounding_seed=2**64 - 1,
            decay=float(np.float32(0.7)),
        ),
        Commit(
            np.array([2**64 - 1], dtype=np.uint64),
            np.array([0.0], dtype=np.float32),
            rounding_seed=4,
            decay=2.0**-12,
        ),
    ]
    types = [
        (torch.float32, Rounding.NEAREST),
        *itertools.product(
            (torch.bfloat16, torch.float16), (Rounding.NEAREST, Rounding.STOCHASTIC)
        ),
    ]
    cases = []
    for distribution, (dtype, rounding) in itertools.product(Distribution, types):
        values = (torch.arange(48, dtype=torch.float32) - 24) / 512
        tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-133
        values[:8] = torch.tensor([0.0, -0.0, tiny, -3 * tiny, 1.0, -60000.0, 2.0**-14, 2.0**-126])
        base = values.to(dtype)
        out = torch.empty_like(base)
        start = 2**33 - 16
        shape: dict[str, Any] = {"columns": 7} if distribution.rank else {}
        materialize_reference(
            out, base, commits, Operands(5, distribution, rounding, start, shape.get("columns"))
        )
        cases.append(
            {
                "distribution": distribution.value,
                "dtype": str(dtype).removeprefix("torch."),
                "rounding": rounding.value,
                "base_bits": bits_of(base),
                "tensor_id": 5,
                "start": start,
                **shape,
                "commits": [
                    {
                        "seeds": hexadecimal(commit.seeds),
                        "coefficients": hexadecimal(commit.coefficients.view(np.uint32)),
                        "rounding_seed": f"{commit.rounding_seed:016x}",
                        "decay": hexadecimal(np.array([commit.decay], np.float32).view(np.uint32))[
                            0
                        ],
                    }
                    for commit in commits
                ],
                "result": bits_of(out),
            }
        )
    return cases


def main() -> None:
    noise = []
    for seed, tensor_id, start in PLACES:
        elements = np.arange(start, start + COUNT, dtype=np.int64)
        signs = spec.rademacher(elements, seed, tensor_id)
        normals = spec.gaussian(elements, seed, tensor_id)
        bits = spec.rounding_bits(elements, seed, tensor_id).astype(np.uint16)
        noise.append(
            {
                "seed": f"{seed:016x}",
                "tensor_id": tensor_id,
                "start": start,
                "rademacher": "".join("+" if sign > 0 else "-" for sign in signs),
                "gaussian": " ".join(hexadecimal(normals.view(np.uint32))),
                "rounding": " ".join(hexadecimal(bits)),
            }
        )
    added = []
    for (seed, tensor_id, start), columns in zip(PLACES, COLUMNS, strict=True):
        elements = np.arange(start, start + COUNT, dtype=np.int64)
        added.append(
            {
                "seed": f"{seed:016x}",
                "tensor_id": tensor_id,
                "start": start,
                "columns": columns,
                **{
                    distribution.value: " ".join(
                        hexadecimal(
                            spec.noise(elements, seed, tensor_id, distribution, columns).view(
                                np.uint32
                            )
                        )
                    )
                    for distribution in Distribution
                    if distribution.rank
                },
                "rounding_float16": " ".join(
                    hexadecimal(spec.rounding_words_float16(elements, seed, tensor_id))
                ),
            }
        )
    weights = []
    commits = [
        Commit(
            np.array([11, 2**63 + 5, 7, 7, 1], dtype=np.uint64),
            np.array([1e-3, -2.5e-3, 0.0, 1e-9, -0.125], dtype=np.float32),
            rounding_seed=99,
        ),
        Commit(
            np.array([2**64 - 1], dtype=np.uint64),
            np.array([3e-4], dtype=np.float32),
            rounding_seed=2**64 - 1,
        ),
    ]
    first_types = [
        (torch.float32, Rounding.NEAREST),
        (torch.bfloat16, Rounding.NEAREST),
        (torch.bfloat16, Rounding.STOCHASTIC),
    ]
    float16 = [(torch.float16, Rounding.NEAREST), (torch.float16, Rounding.STOCHASTIC)]
    full_rank = [Distribution.RADEMACHER, Distribution.GAUSSIAN]
    low_rank = [distribution for distribution in Distribution if distribution.rank]
    cases = [
        *itertools.product(full_rank, first_types),
        *itertools.product(low_rank, first_types),
        *itertools.product(Distribution, float16),
    ]
    for distribution, (dtype, rounding) in cases:
        base = (torch.arange(48, dtype=torch.float32) - 24).mul(2.0**-9).to(dtype)
        out = torch.empty_like(base)
        start = 2**33 - 16
        shape: dict[str, Any] = {"columns": 7} if distribution.rank else {}
        materialize_reference(
            out, base, commits, Operands(5, distribution, rounding, start, shape.get("columns"))
        )
        weights.append(
            {
                "distribution": distribution.value,
                "dtype": str(dtype).removeprefix("torch."),
                "rounding": rounding.value,
                "base": "element i is (i - 24) / 512, for i = 0 .. 47",
                "tensor_id": 5,
                "start": start,
                **shape,
                "commits": [
                    {
                        "seeds": hexadecimal(commit.seeds),
                        "coefficients": hexadecimal(commit.coefficients.view(np.uint32)),
                        "rounding_seed": f"{commit.rounding_seed:016x}",
                    }
                    for commit in commits
                ],
                "result": bits_of(out),
            }
        )
    golden = {
        "version": NOISE_VERSION,
        "noise": noise,
        "weights": weights,
        "noise_added": added,
        "weights_decay": decayed_weights(),
    }
    print(json.dumps(golden, indent=1))


if __name__ == "__main__":
    main()
