"""Write docs/vectors from the specification: what each layer of the protocol makes of its input.

Run it to add a vector, never to fix a test: what is there stays, byte for byte.

python -m tests.golden.vectors.generate
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import StaleTicketError
from fedmezo_core.events import Ack, Assign, Finish, Refuse, SendAnswer, SendUnable, Ticket, Work
from fedmezo_core.journal.codec import encode_record
from fedmezo_core.journal.journal import Journal, MemoryStore, Row
from fedmezo_core.journal.signed_heads import Signer, signed_head_text
from fedmezo_core.machines.aggregate import Share, coefficients_of, to_binary32
from fedmezo_core.records import (
    Answered,
    Committed,
    Evaluated,
    Genesis,
    Opened,
    Record,
    Scalars,
    SeedRange,
    Started,
    digest64_of,
    first_seed_of,
    rounding_seed_of,
)
from fedmezo_core.trust.answer_signatures import AnswerSigner, answer_text
from fedmezo_core.wire.messages import (
    answer_to_pb,
    commit_to_pb,
    hello_to_pb,
    message_to_pb,
    unable_to_pb,
)
from fedmezo_core.zo.arithmetic_spec import materialize_reference
from fedmezo_core.zo.commits import Commit, commits_of
from fedmezo_core.zo.data.batches import Batches
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.data.rows import Example, label_form
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.data.tokenizer_parts import digest_of_parts
from fedmezo_core.zo.model.loading import adapter_seed
from fedmezo_core.zo.model.weight_digest import tensors_digest
from fedmezo_core.zo.noise import Distribution, Operands, Rounding, spec
from fedmezo_core.zo.plain.entries import Entry, Manifest
from fedmezo_core.zo.plain.measurements import Measurement, local_steps
from fedmezo_proto.v1 import coordinator_pb2 as wire

FOLDER = Path(__file__).parents[3] / "docs/vectors"
TOKENIZER = FOLDER / "tokenizer.json"

SEEDS = (0, 1, 0x9042D03CD6A10000, 2**64 - 1)


def u64(value: int) -> str:
    """A u64 as 16 hexadecimal digits."""
    return f"{value:016x}"


def bits(values: Any) -> str:
    """Bits of float32 or 16-bit numbers, in hexadecimal."""
    if isinstance(values, torch.Tensor):
        wide = values.dtype == torch.float32
        values = values.view(torch.uint32 if wide else torch.uint16).numpy()
    array = np.asarray(values)
    if array.dtype == np.float32:
        array = array.view(np.uint32)
    digits = array.dtype.itemsize * 2
    return " ".join(f"{int(value):0{digits}x}" for value in array.reshape(-1))


def bits_of(*values: float) -> str:
    return bits(np.array(values, dtype=np.float32))


# ---------------------------------------------------------------- 1: noise


def noise() -> dict[str, Any]:
    counters = [(0, 0, 0, 0), (1, 0, 0, 1), (0xFFFFFFFF, 1, 7, 2)]
    blocks = []
    for seed in SEEDS:
        for counter in counters:
            arrays = [np.array([word], dtype=np.uint32) for word in counter]
            words = spec.philox4x32((arrays[0], arrays[1], arrays[2], arrays[3]), seed)
            blocks.append(
                {
                    "seed": u64(seed),
                    "counter": list(counter),
                    "words": " ".join(f"{int(word[0]):08x}" for word in words),
                }
            )
    values = []
    for seed, tensor_id, start, count, columns in (
        (0x9042D03CD6A10000, 0, 0, 48, 2),
        (0x9042D03CD6A10001, 1, 0, 48, 3),
        (2**64 - 1, 5, 4090, 24, 64),
    ):
        elements = np.arange(start, start + count, dtype=np.int64)
        one: dict[str, Any] = {
            "seed": u64(seed),
            "tensor_id": tensor_id,
            "columns": columns,
            "first_element": start,
        }
        for distribution in Distribution:
            one[distribution.value] = bits(
                spec.noise(elements, seed, tensor_id, distribution, columns)
            )
        one["rounding_to_bfloat16"] = bits(
            spec.rounding_bits(elements, seed, tensor_id).astype(np.uint16)
        )
        one["rounding_to_float16"] = bits(spec.rounding_words_float16(elements, seed, tensor_id))
        values.append(one)
    return {
        "about": "Section 3 of docs/protocol.md and docs/noise-standard-v1.md: Philox4x32-10 "
        "blocks, and z(seed, tensor_id, element) as binary32 bits for consecutive elements.",
        "blocks": blocks,
        "values": values,
    }


# ---------------------------------------------------------------- 2: seeds and recipes


def seeds() -> dict[str, Any]:
    places = [(7, 1, 0), (7, 1, 1), (7, 2, 0), (2**64 - 1, 10_000_000, 4095)]
    numbers = [1e-3, 1e-4, 1e-5, 0.5, 1.0, 3e-6, 0.00012345, 1e16, 123456789012345.6, 1e22, 2.0]
    recipes = [contract(**change) for change in RECIPES]
    return {
        "about": "Sections 3 and 7 of docs/protocol.md: seeds, and the recipe that a worker makes "
        "of the contract.",
        "first_seeds": [
            {"run_seed": u64(s), "round": r, "slot": n, "first_seed": u64(first_seed_of(s, r, n))}
            for s, r, n in places
        ],
        "rounding_seeds": [
            {"run_seed": u64(s), "round": r, "rounding_seed": u64(rounding_seed_of(s, r))}
            for s, r, _ in places
        ],
        "adapter_seeds": [
            {"run_seed": u64(s), "adapter_seed": u64(adapter_seed(s))} for s in (1, 7, 2**64 - 1)
        ],
        "numbers": [
            {"binary64": f"{int(np.float64(n).view(np.uint64)):016x}", "text": repr(n)}
            for n in numbers
        ],
        "recipes": [
            {"contract": as_json(genesis_of(config))["genesis"]["config"], "recipe": config.recipe}
            for config in recipes
        ],
    }


RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"eps": 1e-5, "distribution": "rademacher", "estimator": "two_sided", "probes": 1},
    {"local_steps": 3, "rate_directions": 64, "dtype": "bfloat16", "weight_decay": 0.1},
    {
        "buffer_answers": 2,
        "seed_policy": "pool",
        "task": {
            "kind": "instruction",
            "template": "{question}",
            "template_version": 3,
            "objective": "scores:exact",
        },
    },
)


# ---------------------------------------------------------------- 3: the adapter


MODULES = {"model.layers.0.mlp.up_proj": (6, 3), "model.layers.10.mlp.up_proj": (4, 3)}
"""Name -> outputs, inputs."""
RANK = 2
BASE = {
    f"{module}.base_layer.weight": ((torch.arange(outputs * inputs) - 7) / 16)
    .reshape(outputs, inputs)
    .to(torch.bfloat16)
    for module, (outputs, inputs) in MODULES.items()
} | {"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)}
"""A base without an adapter, by its own names, in bfloat16."""


def adapter_entries(*, freeze_a: bool) -> Manifest:
    """The manifest of an adapter on `MODULES`, without a model."""
    shapes = {}
    for module, (outputs, inputs) in MODULES.items():
        start = f"base_model.model.{module}.lora_"
        if not freeze_a:
            shapes[f"{start}A.default.weight"] = (RANK, inputs)
        shapes[f"{start}B.default.weight"] = (outputs, RANK)
    names = sorted(shapes)
    return Manifest(tuple(Entry(n, name, shapes[name], "float32") for n, name in enumerate(names)))


def seeded_adapter(run_seed: int) -> dict[str, torch.Tensor]:
    """The adapter that a run begins from where no folder holds one."""
    tensors = {}
    for entry in adapter_entries(freeze_a=False):
        value = torch.zeros(entry.shape)
        if ".lora_A." in entry.name:
            scale = np.array([1.0 / math.sqrt(3.0 * entry.shape[-1])], dtype=np.float32)
            commit = Commit(np.array([adapter_seed(run_seed)], dtype=np.uint64), scale, 0)
            operands = Operands(entry.tensor_id, Distribution.GAUSSIAN, Rounding.NEAREST)
            materialize_reference(value, torch.zeros(entry.shape), [commit], operands)
        tensors[entry.name] = value
    return tensors


def adapter() -> dict[str, Any]:
    manifests = []
    for freeze_a in (True, False):
        manifest = adapter_entries(freeze_a=freeze_a)
        manifests.append(
            {
                "freeze_a": freeze_a,
                "canonical_bytes": manifest.canonical_bytes().decode("ascii"),
                "manifest_digest": manifest.digest().hex(),
                "trainable_elements": manifest.element_count,
            }
        )
    tensors = seeded_adapter(7)
    base = {f"base_model.model.{name}": value for name, value in BASE.items()}
    base |= tensors
    lines = ["fedmezo base 1"]
    for name in sorted(base):
        shape = "x".join(map(str, base[name].shape))
        lines.append(f"{json.dumps(name)}\t{str(base[name].dtype)[6:]}\t{shape}")
    header = "".join(f"{line}\n" for line in lines)
    digest = tensors_digest(header.encode("ascii"), [base[name] for name in sorted(base)])
    ids = {entry.name: entry.tensor_id for entry in adapter_entries(freeze_a=False)}
    return {
        "about": "Section 4 of docs/protocol.md: names, order and shapes of an adapter's tensors "
        "(rank 2 on the modules given), the manifest, and A of a run with seed 7.",
        "modules": [
            {"name": name, "outputs": outputs, "inputs": inputs}
            for name, (outputs, inputs) in MODULES.items()
        ],
        "rank": RANK,
        "manifests": manifests,
        "seeded": {
            "run_seed": u64(7),
            "adapter_seed": u64(adapter_seed(7)),
            "tensors": [
                {
                    "name": name,
                    "tensor_id_for_the_seed": ids[name],
                    "shape": list(tensor.shape),
                    "bits": bits(tensor),
                }
                for name, tensor in tensors.items()
                if ".lora_A." in name
            ],
        },
        "base": {
            "says": "B is zero, A as above; the other tensors are these",
            "tensors": [
                {
                    "name": name,
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "shape": list(value.shape),
                    "bits": bits(value),
                }
                for name, value in sorted(base.items())
                if ".lora_" not in name
            ],
            "header": header,
            "base_digest": digest.hex(),
        },
    }


# ---------------------------------------------------------------- 4: commits and digests


def digest_of(manifest: Manifest, tensors: Sequence[torch.Tensor]) -> bytes:
    header = b"fedmezo weights 1\n" + manifest.canonical_bytes()
    return tensors_digest(header, tensors, threads=1)


def commit_values(commit: Committed) -> dict[str, Any]:
    return {
        "pairs": [
            {
                "first_seed": u64(one.first_seed),
                "coefficients": bits_of(*one.coefficients),
            }
            for one in commit.seed_ranges
        ],
        "rounding_seed": u64(commit.rounding_seed),
        "decay": bits_of(commit.decay),
    }


def commits() -> list[Committed]:
    low = first_seed_of(7, 1, 0)
    other = first_seed_of(7, 1, 1)
    decay = to_binary32(0.999)
    return [
        Committed(
            1,
            (
                SeedRange(low, tuple(map(to_binary32, (1e-3, -2.5e-3)))),
                SeedRange(other, tuple(map(to_binary32, (0.0, 1e-9)))),
            ),
            rounding_seed_of(7, 1),
        ),
        Committed(
            2,
            (SeedRange(first_seed_of(7, 2, 0), (to_binary32(-0.125),)),),
            rounding_seed_of(7, 2),
            decay,
        ),
    ]


def weights() -> dict[str, Any]:
    records = commits()
    cases = []
    for distribution in Distribution:
        for dtype, rounding in (
            (torch.float32, Rounding.STOCHASTIC),
            (torch.bfloat16, Rounding.STOCHASTIC),
            (torch.bfloat16, Rounding.NEAREST),
            (torch.float16, Rounding.STOCHASTIC),
        ):
            base = ((torch.arange(12) - 5) / 64).reshape(6, 2).to(dtype)
            after = []
            value = base.clone()
            for commit in commits_of(records):
                materialize_reference(value, value, [commit], Operands(3, distribution, rounding))
                after.append(bits(value))
            cases.append(
                {
                    "distribution": distribution.value,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rounding": rounding.value,
                    "tensor_id": 3,
                    "shape": [6, 2],
                    "base": bits(base),
                    "after_each_commit": after,
                }
            )
    digests = []
    small = adapter_entries(freeze_a=True)
    tensors = [torch.arange(12, dtype=torch.float32) / 8, torch.full((8,), -0.5)]
    large = Manifest((Entry(0, "large", (1024, 1025), "float32"), Entry(1, "é", (), "bfloat16")))
    count = 1024 * 1025
    for manifest, values, said in (
        (small, tensors, ["element i is i / 8", "all elements are -0.5"]),
        (
            large,
            [torch.arange(count, dtype=torch.float32), torch.tensor([1.5], dtype=torch.bfloat16)],
            ["element i is i; 4 MiB and 4096 bytes, so two leaves", "1.5"],
        ),
    ):
        digest = digest_of(manifest, values)
        digests.append(
            {
                "manifest": manifest.canonical_bytes().decode("ascii"),
                "tensors": said,
                "weights_digest": digest.hex(),
                "digest64": u64(digest64_of(digest)),
            }
        )
    return {
        "about": "Sections 8 and 9 of docs/protocol.md and docs/arithmetic-standard-v1.md: two "
        "commits on one tensor, and digests of weights.",
        "commits": [commit_values(record) for record in records],
        "cases": cases,
        "digests": digests,
    }


# ---------------------------------------------------------------- 5: batches


def batches() -> dict[str, Any]:
    keys = []
    for key in (0, 1 << 64 | 2, int.from_bytes(bytes(range(16)), "little")):
        words = np.random.Philox(key=key).random_raw(9)
        keys.append(
            {
                "key_bytes": key.to_bytes(16, "little").hex(),
                "first_words": " ".join(f"{int(word):016x}" for word in words),
            }
        )
    cases = []
    for run_seed, name, size, steps, count in (
        (7, "w1", 4, 1, 10),
        (7, "w2", 4, 1, 10),
        (2**64 - 1, "clinic-a", 3, 2, 40),
        (1, "small", 16, 1, 5),
    ):
        lengths = [5 + (number * 7) % 11 for number in range(count)]
        examples = tuple(EncodedExample((1,) * length, (), 0) for length in lengths)
        made = Batches(
            lambda examples, _name: examples,
            Dataset(examples, 0),
            run_seed=run_seed,
            worker_name=name,
            batch_size=size,
            local_steps=steps,
        )
        cases.append(
            {
                "run_seed": u64(run_seed),
                "worker": name,
                "batch_size": size,
                "local_steps": steps,
                "token_counts": lengths,
                "batches": [
                    {"round": round_, "step": step, "rows": made.indices(round_, step)}
                    for round_ in range(1, 6)
                    for step in range(steps)
                ],
            }
        )
    return {
        "about": "Section 6 of docs/protocol.md: raw words of Philox4x64-10, and the rows of each "
        "batch.",
        "philox4x64": keys,
        "cases": cases,
    }


# ---------------------------------------------------------------- 6: measurements


class _Told:
    """An estimator that is told the losses; in place of `Estimator` in `local_steps`."""

    def __init__(self, losses: Sequence[tuple[float, float]], one_sided: bool) -> None:
        self._losses = list(losses)
        self._one_sided = one_sided

    def measure(
        self, _batch: Any, _local: Any, seeds: Sequence[int], eps: float
    ) -> list[Measurement]:
        measured = []
        for _ in seeds:
            plus, other = self._losses.pop(0)
            distance = eps if self._one_sided else 2.0 * eps
            grad = float(np.float32((plus - other) / distance))
            loss = other if self._one_sided else (plus + other) / 2.0
            measured.append(Measurement(plus, other, grad, loss))
        return measured


def measurements() -> dict[str, Any]:
    cases = []
    both = [(0.71, 0.69), (0.695, 0.7), (0.70125, 0.69875), (0.5, 9.5), (0.7, 0.7), (0.6, 0.65)]
    for changes in (
        {"estimator": "two_sided", "local_steps": 1, "probes": 6},
        {"estimator": "one_sided", "local_steps": 1, "probes": 6},
        {"estimator": "two_sided", "local_steps": 3, "probes": 2, "normalized_step": False},
        {"estimator": "two_sided", "local_steps": 3, "probes": 2},
        {"estimator": "two_sided", "local_steps": 3, "probes": 2, "rate_directions": 0},
        {"estimator": "one_sided", "local_steps": 6, "probes": 1},
    ):
        config = contract(projected_grad_abs_max=100.0, **changes)
        losses = both
        if config.estimator == "one_sided":
            # The loss at the weights is measured once for all probes of a step.
            losses = [(plus, both[n // config.probes][1]) for n, (plus, _) in enumerate(both)]
        first = first_seed_of(7, 1, 0)
        work = Work(tuple(range(first, first + 6)), 0.5, config.eps, False)
        found = local_steps(
            _Told(losses, config.estimator == "one_sided"),
            lambda _step: None,
            work,
            config,
        )
        grads = [measurement.projected_grad for measurement in found]
        local: list[float] = []
        for number in range(0, 6, config.probes):
            share = Share(
                work.seeds[number : number + config.probes],
                tuple(grads[number : number + config.probes]),
                work.learning_rate,
            )
            local += coefficients_of([share], config)[0]
        mean = math.fsum(measurement.loss for measurement in found) / len(found)
        cases.append(
            {
                "estimator": config.estimator,
                "local_steps": config.local_steps,
                "probes": config.probes,
                "normalized_step": config.normalized_step,
                "rate_directions": config.rate_directions,
                "classes": 2,
                "eps": repr(config.eps),
                "learning_rate": repr(work.learning_rate),
                "projected_grad_abs_max": "100.0",
                "losses": [[repr(plus), repr(other)] for plus, other in losses],
                "projected_grads": bits_of(*grads),
                "mean_loss": bits_of(mean),
                "coefficients_of_the_local_steps": bits_of(*local),
            }
        )
    base = ((torch.arange(12) - 5) / 64).reshape(6, 2)
    points = []
    first = first_seed_of(7, 1, 0)
    for local_pairs in ((), ((first, to_binary32(-3e-3)),)):
        for sign in (1.0, -1.0):
            pairs = [*local_pairs, (first + 1, sign * 1e-3)]
            commit = Commit(
                np.array([seed for seed, _ in pairs], dtype=np.uint64),
                np.array([value for _, value in pairs], dtype=np.float32),
                first,
            )
            value = torch.empty_like(base)
            operands = Operands(3, Distribution.LOW_RANK_1, Rounding.STOCHASTIC)
            materialize_reference(value, base, [commit], operands)
            points.append(
                {
                    "local_pairs": [
                        {"seed": u64(seed), "coefficient": bits_of(value)}
                        for seed, value in local_pairs
                    ],
                    "seed": u64(first + 1),
                    "step": bits_of(sign * 1e-3),
                    "weights": bits(value),
                }
            )
    logits = [[1.25, -0.5], [0.0, 3.0], [-2.0, -2.0]]
    answers = [0, 1, 1]
    row_losses = torch.nn.functional.cross_entropy(
        torch.tensor(logits, dtype=torch.float64), torch.tensor(answers), reduction="none"
    ).tolist()
    return {
        "about": "Section 7 of docs/protocol.md: losses to projected gradients and local steps, "
        "the weights that a loss is measured at, and logits to a loss.",
        "cases": cases,
        "points": {
            "distribution": "low_rank_1",
            "tensor_id": 3,
            "shape": [6, 2],
            "weights": bits(base),
            "at": points,
        },
        "classification": {
            "logits": logits,
            "labels": answers,
            "row_losses": [round(loss, 12) for loss in row_losses],
            "loss": round(sum(row_losses) / len(row_losses), 12),
            "decimals": 12,
        },
    }


# ---------------------------------------------------------------- 7: the journal


def contract(**changes: Any) -> RunConfig:
    """The contract of the worked example, with changes."""
    values: dict[str, Any] = {
        "run_id": "vectors",
        "model": "example/tiny",
        "task": {
            "template": "{text} It was",
            "template_version": 3,
            "label_column": "label",
            "verbalizers": {"negative": " terrible", "positive": " great"},
            "tokens_max": 64,
        },
        "lora": {
            "rank": RANK,
            "alpha": 2.0,
            "target_modules": ["up_proj"],
            "freeze_a": True,
        },
        "seed": 7,
        "rounds": 3,
        "local_steps": 1,
        "probes": 4,
        "estimator": "one_sided",
        "normalized_step": True,
        "distribution": "low_rank_1",
        "eps": 1e-3,
        "learning_rate": 0.5,
        "rate_directions": 64,
        "clip_median_factor": 10.0,
        "workers_min": 2,
        "quorum": 2,
        "cohort_size_max": 8,
        "digest_every_rounds": 2,
        "report_losses": True,
        "deadline_ms": 60_000,
    }
    return RunConfig.model_validate(values | changes)


def genesis_of(config: RunConfig) -> Genesis:
    manifest = adapter_entries(freeze_a=True)
    parts = tuple(bytes([number]) * 32 for number in range(1, 8))
    return Genesis(
        config=config,
        manifest_digest=manifest.digest(),
        base_digest=bytes(range(32)),
        tokenizer_digest=digest_of_parts(parts),
        trainable_elements=manifest.element_count,
        trainable_bytes=4 * manifest.element_count,
        tokenizer_parts=parts,
    )


def as_json(record: Record | Message) -> dict[str, Any]:
    """The fields of a message in protobuf's JSON form."""
    from fedmezo_proto.v1 import journal_pb2 as pb

    message = record if isinstance(record, Message) else pb.Record.FromString(encode_record(record))
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def signer() -> Signer:
    return Signer(Ed25519PrivateKey.from_private_bytes(b"vectors of fedmezo: signing key."))


GRADS = {
    1: ((3.5, -1.25, 0.5, 8.0), (2.0, 1.5, -0.75, 0.25)),
    2: ((-6.0, 0.5, 0.125, 1.0), (0.5, -2.5, 4.0, -1.0)),
    3: ((1.0, 1.0, -1.0, 2.0), (0.75, -0.5, 0.25, -3.0)),
}
"""Round -> projected gradients of w1 and of w2."""


def story() -> tuple[list[Record], list[str], list[bytes]]:
    """A whole run: its records, the weights' bits after each round from 0, and their digests."""
    config = contract()
    manifest = adapter_entries(freeze_a=True)
    tensors = [torch.zeros(entry.shape) for entry in manifest]
    digests = [digest_of(manifest, tensors)]
    states = [" | ".join(map(bits, tensors))]
    records: list[Record] = [genesis_of(config), Started(1)]
    for round_, answers in GRADS.items():
        records.append(Opened(round_, 0, ("w1", "w2")))
        wants = (round_ - 1) % config.digest_every_rounds == 0
        shares = []
        for slot, grads in enumerate(answers):
            digest64 = digest64_of(digests[-1]) if wants else None
            loss = to_binary32(0.7 - 0.01 * round_ + 0.1 * slot)
            records.append(Answered(round_, slot, Scalars(grads, loss, digest64)))
            first = first_seed_of(config.seed, round_, slot)
            used = tuple(range(first, first + 4))
            shares.append(Share(used, grads, config.learning_rate, 1, loss))
        ranges = tuple(
            SeedRange(share.seeds[0], values)
            for share, values in zip(shares, coefficients_of(shares, config), strict=True)
        )
        commit = Committed(round_, ranges, rounding_seed_of(config.seed, round_))
        records.append(commit)
        for entry, tensor in zip(manifest, tensors, strict=True):
            operands = Operands(entry.tensor_id, Distribution.LOW_RANK_1, Rounding.STOCHASTIC)
            materialize_reference(tensor, tensor, commits_of([commit]), operands)
        digests.append(digest_of(manifest, tensors))
        states.append(" | ".join(map(bits, tensors)))
    records.append(Evaluated(3, 0.625, 0.75, 40, digests[-1], 0.8125))
    return records, states, digests


def journal() -> dict[str, Any]:
    records, states, digests = story()
    entries = Journal(MemoryStore()).append([encode_record(record) for record in records])
    run_id = contract().run_id
    heads = {0: entries[0].head.hex()}
    signatures = []
    for record, entry in zip(records, entries, strict=True):
        if isinstance(record, Committed):
            heads[record.round] = entry.head.hex()
            signatures.append(
                {
                    "round": record.round,
                    "text": signed_head_text(run_id, record.round, entry.head).decode(),
                    "signature": signer().sign(run_id, record.round, entry.head).hex(),
                }
            )
    return {
        "about": "Sections 5 and 8 of docs/protocol.md: the records of a run of three rounds and "
        "two workers, the chain and the head after each, what is signed, and the weights after "
        "each round. Fields are in protobuf's JSON form.",
        "records": [
            {
                "seqno": entry.row.seqno,
                "fields": as_json(record),
                "record": entry.row.body.hex(),
                "chain": entry.row.chain.hex(),
                "head": entry.head.hex(),
            }
            for record, entry in zip(records, entries, strict=True)
        ],
        "public_key": signer().public_key.hex(),
        "signatures": signatures,
        "manifest": adapter_entries(freeze_a=True).canonical_bytes().decode("ascii"),
        "rounds": [
            {
                "round": round_,
                "head": heads[round_],
                "tensors": state,
                "weights_digest": digest.hex(),
                "digest64": u64(digest64_of(digest)),
            }
            for round_, (state, digest) in enumerate(zip(states, digests, strict=True))
        ],
    }


# ---------------------------------------------------------------- 8: messages of a session


def session() -> dict[str, Any]:
    records, _, digests = story()
    entries = Journal(MemoryStore()).append([encode_record(record) for record in records])
    genesis = records[0]
    assert isinstance(genesis, Genesis)
    config = genesis.config
    rows: dict[int, Row] = {}
    heads = {0: entries[0].head}
    for record, entry in zip(records, entries, strict=True):
        if isinstance(record, Committed):
            rows[record.round], heads[record.round] = entry.row, entry.head

    def assign(round_: int, *, wants: bool, **other: Any) -> Assign:
        first = first_seed_of(config.seed, round_, 0)
        values = {"learning_rate": config.learning_rate, "eps": config.eps} | other
        work = Work(tuple(range(first, first + 4)), want_digest=wants, **values)
        return Assign("w1", Ticket(1, round_, 0), work, 60_000)

    def down(message: Assign | Ack | Refuse | Finish) -> wire.SessionResponse:
        return message_to_pb(message, config, heads.__getitem__)

    signature = signer().sign(config.run_id, 0, heads[0])
    welcome = wire.SessionResponse(
        welcome=wire.Welcome(epoch=1, round=0, head=heads[0], signature=signature)
    )
    loss = to_binary32(0.69)
    first_answer = SendAnswer(
        Ticket(1, 1, 0), Scalars(GRADS[1][0], loss, digest64_of(digests[0])), None
    )
    second_answer = SendAnswer(
        Ticket(1, 2, 0), Scalars(GRADS[2][0], to_binary32(0.68), None), digest64_of(heads[1])
    )
    stale = StaleTicketError("Round 1 was committed.")
    steps: list[tuple[str, str, wire.SessionRequest | wire.SessionResponse]] = [
        ("up", "introduces w1, which holds the base", hello_to_pb(genesis, "w1", 0, heads[0])),
        ("down", "no commit is missing", welcome),
        ("down", "round 1 wants the digest", down(assign(1, wants=True))),
        ("up", "with the digest, so without head64", answer_to_pb(first_answer)),
        ("down", "the answer is durable", down(Ack("w1", Ticket(1, 1, 0)))),
        (
            "down",
            "w2 has answered too",
            commit_to_pb(rows[1], signer().sign(config.run_id, 1, heads[1])),
        ),
        ("down", "round 2 wants no digest", down(assign(2, wants=False))),
        ("up", "without the digest, so with head64", answer_to_pb(second_answer)),
        ("up", "the same answer again: acknowledged again", answer_to_pb(second_answer)),
        ("down", "", down(Ack("w1", Ticket(1, 2, 0)))),
        (
            "down",
            "an answer to an old ticket was refused",
            down(Refuse("w1", Ticket(1, 1, 0), type(stale).__name__, str(stale))),
        ),
        (
            "down",
            "another learning rate and eps than the contract's",
            down(assign(3, wants=True, learning_rate=0.25, eps=5e-4)),
        ),
        (
            "up",
            "the loss is not a number",
            unable_to_pb(SendUnable(Ticket(1, 3, 0), "a loss is NaN")),
        ),
        ("down", "the run is over", down(Finish("w1", 3))),
        (
            "up",
            "the last message",
            wire.SessionRequest(
                weights_report=wire.WeightsReport(round=3, weights_digest=digests[3])
            ),
        ),
    ]
    pooled = Work((0x50000, 0x50007, 0x50007, 0x50003), 0.5, config.eps, False)
    poll = wire.PollSessionRequest(
        messages=[hello_to_pb(genesis, "w1", 0, heads[0])], wait_ms=30_000
    )
    return {
        "about": "Section 10 of docs/protocol.md: one worker's messages in the run of journal.json "
        "(an example of each kind; not one real conversation). Fields are in protobuf's JSON form.",
        "messages": [
            {
                "direction": direction,
                "says": says,
                "fields": as_json(message),
                "bytes": message.SerializeToString(deterministic=True).hex(),
            }
            for direction, says, message in steps
        ],
        "seed_offsets": {
            "says": "an assignment from a pool: seed k is first_seed + seed_offsets[k]",
            "bytes": down(Assign("w1", Ticket(1, 1, 0), pooled, 60_000))
            .SerializeToString(deterministic=True)
            .hex(),
            "seeds": [u64(seed) for seed in pooled.seeds],
        },
        "first_poll": {
            "says": "the first call of a session without a stream",
            "bytes": poll.SerializeToString(deterministic=True).hex(),
        },
    }


# ---------------------------------------------------------------- 10: signed answers


def signatures() -> dict[str, Any]:
    records, _, digests = story()
    entries = Journal(MemoryStore()).append([encode_record(record) for record in records])
    head = entries[0].head
    other = next(e.head for e, r in zip(entries, records, strict=True) if isinstance(r, Committed))
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(64, 96)))
    answer_signer = AnswerSigner(key, head)
    digest64 = digest64_of(digests[0])
    largest = Scalars((float.fromhex("0x1.fffffep127"), -0.0), -0.0, 2**64 - 1, 2**40)
    cases = [
        ("a digest round", Ticket(1, 1, 0), head, Scalars(GRADS[1][0], None, digest64)),
        ("no digest", Ticket(1, 2, 1), other, Scalars(GRADS[2][0], None, None)),
        ("losses", Ticket(1, 2, 1), other, Scalars(GRADS[2][0], to_binary32(0.69), None)),
        ("a loss of 0 is there", Ticket(1, 2, 1), other, Scalars(GRADS[2][0], 0.0, None)),
        ("rows", Ticket(3, 2, 1), other, Scalars(GRADS[2][0], None, None, 24)),
        ("largest numbers", Ticket(2**32 - 1, 2**64 - 1, 2**32 - 1), other, largest),
    ]
    return {
        "about": "Section 7 of docs/protocol.md: what is signed of an answer in the run of "
        "journal.json, and the signature. The private key is the bytes 64 to 95.",
        "genesis_head": head.hex(),
        "public_key": answer_signer.public_key.hex(),
        "answers": [
            {
                "says": says,
                "epoch": ticket.epoch,
                "round": u64(ticket.round),
                "slot": ticket.slot,
                "head": at.hex(),
                "projected_grads": bits_of(*scalars.projected_grads),
                "mean_loss": None if scalars.mean_loss is None else bits_of(scalars.mean_loss),
                "weights_digest64": None
                if scalars.weights_digest64 is None
                else u64(scalars.weights_digest64),
                "rows": scalars.rows,
                "text": answer_text(head, ticket, at, scalars).hex(),
                "signature": answer_signer.sign(ticket, at, scalars).hex(),
            }
            for says, ticket, at, scalars in cases
        ],
    }


# ---------------------------------------------------------------- 9: text


def text() -> dict[str, Any]:
    backend = Tokenizer.from_file(str(TOKENIZER))
    make: Any = PreTrainedTokenizerFast  # transformers leaves its constructor without types
    tokenizer = make(tokenizer_object=backend, eos_token="<eos>")
    config = contract().task
    task = Task(config, tokenizer, 384)
    rows = [
        {"text": "A gripping film.", "label": "positive"},
        {"text": "An evening wasted, <eos> and it was bad!", "label": "negative"},
        {"text": "The plot is terrible and the jokes are worse; " * 8, "label": "negative"},
    ]
    examples = [Example(row, "rows.jsonl", n) for n, row in enumerate(rows, start=1)]
    instruction = TaskConfig(
        kind="instruction",
        template="Question: {question}\nAnswer:",
        template_version=3,
        response_column="response",
        tokens_max=24,
    )
    questions = [
        {"question": "good?", "response": " It was lovely."},
        {"question": "what?", "response": " the jokes are worse and the plot is terrible" * 3},
    ]
    asked = [Example(row, "rows.jsonl", n) for n, row in enumerate(questions, start=1)]

    def encoded(which: Task, given: list[Example]) -> list[dict[str, Any]]:
        return [
            {"row": row.values, "prompt": list(one.prompt), "response": list(one.response)}
            for row, one in zip(given, which.encode(given).examples, strict=True)
        ]

    second = Task(instruction, tokenizer, 384)
    templates = ["{text} It was", "{a}{{b}} {c d}", "{{{text}}}"]
    labels = ["1", "1.0", "01", "TRUE", "true", "\ufeffpositive", "e\u0301"]
    labels += ["-1.00", "+1.0", "01.0", "1.", " 1.0", "1.50", "tRuE", "\u0661.0"]
    strings = ["plain /", '"\\', "\n\r\t\b\f\x00\x1f", "~\x7f\u00e9", "\u20ac\U0001f600"]
    return {
        "about": "Section 6 of docs/protocol.md: templates, labels, prompts and the digest of a "
        "tokenizer. The tokenizer is docs/vectors/tokenizer.json, with end-of-text token <eos>.",
        "templates": [
            {
                "template": template,
                "parts": TaskConfig(
                    template=template, template_version=3, verbalizers={"a": "x", "b": "y"}
                ).template_parts(),
            }
            for template in templates
        ],
        "labels": [{"label": label, "form": label_form(label)} for label in labels],
        "classification": {
            "template": config.template,
            "verbalizers": config.verbalizers,
            "tokens_max": config.tokens_max,
            "verbalizer_tokens": list(task.verbalizer_ids),
            "examples": encoded(task, examples),
        },
        "instruction": {
            "template": instruction.template,
            "tokens_max": instruction.tokens_max,
            "end_of_text_token": tokenizer.eos_token_id,
            "examples": encoded(second, asked),
        },
        "json_strings": [
            {"code_points": [ord(character) for character in one], "json": json.dumps(one)}
            for one in strings
        ],
        "tokenizer_parts": [part.hex() for part in task.tokenizer_parts()],
        "tokenizer_digest": digest_of_parts(task.tokenizer_parts()).hex(),
    }


FILES = {
    "noise": noise,
    "seeds": seeds,
    "adapter": adapter,
    "weights": weights,
    "batches": batches,
    "text": text,
    "measurements": measurements,
    "journal": journal,
    "session": session,
    "signatures": signatures,
}
"""Name of a file -> what makes it, in the order in which an implementation needs them."""


def serialized(name: str) -> str:
    """The text of a file."""
    return json.dumps(FILES[name](), indent=1, ensure_ascii=True) + "\n"


def main() -> None:
    for name in FILES:
        (FOLDER / f"{name}.json").write_text(serialized(name))


if __name__ == "__main__":
    main()
