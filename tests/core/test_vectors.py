"""docs/vectors are what the specification says, what the product computes, and what the page says.

`tests/golden/vectors/from_the_page.py` is the page's formulas once more, without the product.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.journal.journal import Journal, MemoryStore
from fedmezo_core.journal.signed_heads import Witness
from fedmezo_core.machines.rounds import RoundMachine
from fedmezo_core.records import Genesis
from fedmezo_core.trust.answer_signatures import is_signed
from fedmezo_core.wire.messages import assigned_from_pb, event_from_pb
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.golden.vectors import from_the_page as page
from tests.golden.vectors import generate

PAGE = (generate.FOLDER.parent / "protocol.md").read_text()
DISTRIBUTIONS = ("rademacher", "gaussian", "low_rank_1", "low_rank_2", "low_rank_4")


def vectors(name: str) -> Any:
    return json.loads((generate.FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", generate.FILES)
def test_the_files_are_what_the_specification_gives(name: str) -> None:
    assert (generate.FOLDER / f"{name}.json").read_text() == generate.serialized(name)


def test_the_page_names_every_file_and_its_numbers() -> None:
    for name in (*generate.FILES, "tokenizer"):
        assert f"(vectors/{name}.json)" in PAGE
    everything = "".join(path.read_text() for path in sorted(generate.FOLDER.iterdir()))
    everything += (generate.FOLDER.parent / "noise-standard-v1.md").read_text()
    quoted = re.findall(r"`([0-9a-f]{8}|[0-9a-f]{16})`", PAGE)
    assert len(quoted) > 6
    for number in quoted:
        assert number in everything, f"docs/protocol.md quotes {number}, which no vector has"


# ---------------------------------------------------------------- the page's formulas


def test_noise_by_the_page() -> None:
    found = vectors("noise")
    for block in found["blocks"]:
        words = page.philox4x32(int(block["seed"], 16), block["counter"])
        assert " ".join(f"{word:08x}" for word in words) == block["words"]
    for one in found["values"]:
        seed, first, columns = int(one["seed"], 16), one["first_element"], one["columns"]
        elements = range(first, first + len(one["rademacher"].split()))
        for distribution in DISTRIBUTIONS:
            wanted = one[distribution]
            values = [page.z(distribution, e, seed, one["tensor_id"], columns) for e in elements]
            assert page.bits_of(values) == wanted
        for dtype, digits in (("bfloat16", 4), ("float16", 8)):
            words = [page.rounding_bits(e, seed, one["tensor_id"], dtype) for e in elements]
            found_bits = " ".join(f"{word:0{digits}x}" for word in words)
            assert found_bits == one[f"rounding_to_{dtype}"]


def test_seeds_and_recipes_by_the_page() -> None:
    found = vectors("seeds")
    for one in found["first_seeds"]:
        seed = page.first_seed(int(one["run_seed"], 16), one["round"], one["slot"])
        assert f"{seed:016x}" == one["first_seed"]
    for one in found["rounding_seeds"]:
        seed = page.hash64("fedmezo rounding v1", int(one["run_seed"], 16), one["round"])
        assert f"{seed:016x}" == one["rounding_seed"]
    for one in found["adapter_seeds"]:
        seed = page.hash64("fedmezo lora v1", int(one["run_seed"], 16))
        assert f"{seed:016x}" == one["adapter_seed"]
    for one in found["recipes"]:
        assert page.recipe(one["contract"]) == one["recipe"]


def test_manifests_and_digests_by_the_page() -> None:
    found = vectors("adapter")
    rank = found["rank"]
    for one in found["manifests"]:
        tensors = []
        for module in found["modules"]:
            start = f"base_model.model.{module['name']}.lora_"
            tensors.append((f"{start}B.default.weight", "float32", (module["outputs"], rank)))
            if not one["freeze_a"]:
                tensors.append((f"{start}A.default.weight", "float32", (rank, module["inputs"])))
        canonical = page.manifest_bytes(tensors)
        assert canonical.decode() == one["canonical_bytes"]
        assert page.sha256(canonical).hex() == one["manifest_digest"]
    values: dict[str, bytes] = {}
    for tensor in [*found["base"]["tensors"], *found["seeded"]["tensors"]]:
        values[tensor["name"]] = b"".join(
            bytes.fromhex(word)[::-1] for word in tensor["bits"].split()
        )
    for module in found["modules"]:
        name = f"base_model.model.{module['name']}.lora_B.default.weight"
        values[name] = bytes(4 * module["outputs"] * rank)
    header = found["base"]["header"].encode("ascii")
    digest = page.tensors_digest(header, [values[name] for name in sorted(values)])
    assert digest.hex() == found["base"]["base_digest"]
    small, large = vectors("weights")["digests"]
    first = struct.pack("<12f", *(n / 8 for n in range(12)))
    second = struct.pack("<8f", *[-0.5] * 8)
    digest = page.weights_digest(small["manifest"].encode(), [first, second])
    assert digest.hex() == small["weights_digest"]
    assert f"{int.from_bytes(digest[:8], 'little'):016x}" == small["digest64"]
    count = 1024 * 1025
    many = np.arange(count, dtype="<f4").tobytes()
    digest = page.weights_digest(large["manifest"].encode(), [many, b"\xc0\x3f"])
    assert digest.hex() == large["weights_digest"]


def test_commits_by_the_page() -> None:
    found = vectors("weights")
    for case in found["cases"]:
        dtype, digits = case["dtype"], 8 if case["dtype"] == "float32" else 4
        patterns = [int(word, 16) for word in case["base"].split()]
        for commit, wanted in zip(found["commits"], case["after_each_commit"], strict=True):
            pairs = [
                (int(run["first_seed"], 16) + k, page.f32_of(word))
                for run in commit["pairs"]
                for k, word in enumerate(run["coefficients"].split())
            ]
            decay, rounding_seed = page.f32_of(commit["decay"]), int(commit["rounding_seed"], 16)
            values = [page.value_of(pattern, dtype) for pattern in patterns]
            results = page.added(values, pairs, case["distribution"], 3, 2, decay)
            patterns = []
            for element, acc in enumerate(results):
                random_bits = None
                if case["rounding"] == "stochastic" and dtype != "float32":
                    random_bits = page.rounding_bits(element, rounding_seed, 3, dtype)
                patterns.append(page.stored(acc, dtype, random_bits))
            assert " ".join(f"{pattern:0{digits}x}" for pattern in patterns) == wanted


def test_a_seeded_adapter_by_the_page() -> None:
    found = vectors("adapter")["seeded"]
    seed = page.hash64("fedmezo lora v1", int(found["run_seed"], 16))
    for tensor in found["tensors"]:
        rank, inputs = tensor["shape"]
        scale = page.f32(1 / math.sqrt(3 * inputs))
        tensor_id = tensor["tensor_id_for_the_seed"]
        values = [
            page.times(page.gaussian(e, seed, tensor_id), scale) for e in range(rank * inputs)
        ]
        assert page.bits_of(values) == tensor["bits"]


def test_batches_by_the_page() -> None:
    found = vectors("batches")
    for one in found["philox4x64"]:
        wanted = one["first_words"].split()
        words = page.philox4x64(bytes.fromhex(one["key_bytes"]), len(wanted))
        assert [f"{word:016x}" for word in words] == wanted
    for case in found["cases"]:
        for batch in case["batches"]:
            rows = page.batch(
                int(case["run_seed"], 16),
                case["worker"],
                case["token_counts"],
                case["batch_size"],
                case["local_steps"],
                batch["round"],
                batch["step"],
            )
            assert rows == batch["rows"]


def test_text_by_the_page() -> None:
    found = vectors("text")
    for one in found["templates"]:
        assert page.template_parts(one["template"]) == one["parts"]
    for one in found["labels"]:
        assert page.label_form(one["label"]) == one["form"]
    for one in found["json_strings"]:
        text = "".join(map(chr, one["code_points"]))
        assert page.json_string(text) == one["json"]
    parts = b"".join(map(bytes.fromhex, found["tokenizer_parts"]))
    digest = page.sha256(b"fedmezo tokenizer 2\n", parts)
    assert digest.hex() == found["tokenizer_digest"]
    # Two parts that need no tokenizer: nothing comes before a prompt, nothing is generated.
    assert page.sha256(b"tokens before a prompt\n[]").hex() == found["tokenizer_parts"][4]
    assert page.sha256(b"end-of-text token\nnull").hex() == found["tokenizer_parts"][5]


def test_measurements_by_the_page() -> None:
    found = vectors("measurements")
    for case in found["cases"]:
        eps, probes = float(case["eps"]), case["probes"]
        one_sided = case["estimator"] == "one_sided"
        losses = [(float(plus), float(other)) for plus, other in case["losses"]]
        distance = eps if one_sided else 2 * eps
        clip = page.f32(float(case["projected_grad_abs_max"]))
        grads = [page.projected_grad(plus, other, distance, clip) for plus, other in losses]
        assert page.bits_of(grads) == case["projected_grads"]
        means = [other if one_sided else (plus + other) / 2 for plus, other in losses]
        assert page.bits_of([math.fsum(means) / len(means)]) == case["mean_loss"]
        local: list[float] = []
        for first in range(0, len(grads), probes):
            local += page.local_coefficients(
                grads[first : first + probes],
                float(case["learning_rate"]),
                case["normalized_step"],
                case["rate_directions"],
                math.log(case["classes"]),
            )
        assert page.bits_of(local) == case["coefficients_of_the_local_steps"]
    points = found["points"]
    values = [page.f32_of(word) for word in points["weights"].split()]
    for at in points["at"]:
        pairs = [(int(p["seed"], 16), page.f32_of(p["coefficient"])) for p in at["local_pairs"]]
        pairs.append((int(at["seed"], 16), page.f32_of(at["step"])))
        assert page.bits_of(page.added(values, pairs, "low_rank_1", 3, 2)) == at["weights"]
    logits = found["classification"]
    rows = [
        math.log(math.fsum(math.exp(value - row[label]) for value in row))
        for row, label in zip(logits["logits"], logits["labels"], strict=True)
    ]
    assert [round(loss, logits["decimals"]) for loss in rows] == logits["row_losses"]


def test_a_run_by_the_page() -> None:
    found = vectors("journal")
    chain, head = bytes(32), bytes(32)
    tensors = [[0.0] * 12, [0.0] * 8]
    manifest = found["manifest"].encode()
    rounds = iter(found["rounds"])

    def check_round() -> None:
        wanted = next(rounds)
        assert head.hex() == wanted["head"]
        assert " | ".join(map(page.bits_of, tensors)) == wanted["tensors"]
        octets = [struct.pack(f"<{len(values)}f", *values) for values in tensors]
        assert page.weights_digest(manifest, octets).hex() == wanted["weights_digest"]

    for one in found["records"]:
        body = bytes.fromhex(one["record"])
        chain = page.sha256(chain, page.u64le(one["seqno"]), body)
        if body[0] in (0x0A, 0x2A):
            head = page.sha256(head, body)
        assert (chain.hex(), head.hex()) == (one["chain"], one["head"])
        if "genesis" in one["fields"]:
            check_round()
        if "committed" in one["fields"]:
            commit = one["fields"]["committed"]
            pairs = [
                (int(run["first_seed"]) + k, page.f32(coefficient))
                for run in commit["runs"]
                for k, coefficient in enumerate(run["coefficients"])
            ]
            tensors = [
                page.added(values, pairs, "low_rank_1", tensor_id, 2)
                for tensor_id, values in enumerate(tensors)
            ]
            check_round()


# ---------------------------------------------------------------- the product


def test_the_products_kernels_give_these_weights() -> None:
    found = vectors("weights")
    for case in found["cases"]:
        dtype = getattr(torch, case["dtype"])
        words = [int(word, 16) for word in case["base"].split()]
        width: Any = np.uint32 if dtype == torch.float32 else np.uint16
        value = torch.from_numpy(np.array(words, dtype=width)).view(dtype).reshape(6, 2)
        operands = Operands(
            3, Distribution[case["distribution"].upper()], Rounding[case["rounding"].upper()]
        )
        for given, wanted in zip(found["commits"], case["after_each_commit"], strict=True):
            seeds, coefficients = [], []
            for run in given["pairs"]:
                for k, word in enumerate(run["coefficients"].split()):
                    seeds.append(int(run["first_seed"], 16) + k)
                    coefficients.append(page.f32_of(word))
            commit = Commit(
                np.array(seeds, dtype=np.uint64),
                np.array(coefficients, dtype=np.float32),
                int(given["rounding_seed"], 16),
                page.f32_of(given["decay"]),
            )
            materialize(value, value, [commit], operands, threads=1)
            assert generate.bits(value) == wanted


def test_signed_answers_by_the_page() -> None:
    found = vectors("signatures")
    genesis_head, key = bytes.fromhex(found["genesis_head"]), bytes.fromhex(found["public_key"])
    assert found["genesis_head"] == vectors("journal")["rounds"][0]["head"]
    for one in found["answers"]:
        loss, digest64 = one["mean_loss"], one["weights_digest64"]
        text = page.answer_text(
            genesis_head,
            (one["epoch"], int(one["round"], 16), one["slot"]),
            bytes.fromhex(one["head"]),
            [page.f32_of(bits) for bits in one["projected_grads"].split()],
            None if loss is None else page.f32_of(loss),
            None if digest64 is None else int(digest64, 16),
            one["rows"],
        )
        assert text.hex() == one["text"], one["says"]
        assert is_signed(key, text, bytes.fromhex(one["signature"]))


def test_the_run_is_a_sound_journal_and_its_heads_are_signed() -> None:
    found = vectors("journal")
    bodies = [bytes.fromhex(one["record"]) for one in found["records"]]
    store = MemoryStore()
    Journal(store).append(bodies)
    machine = RoundMachine()
    for entry in Journal(store).load():
        record = decode_record(entry.row.body)
        assert encode_record(record) == entry.row.body
        machine.apply(record)
    assert machine.round == machine.config.rounds
    witness = Witness(machine.config.run_id, bytes.fromhex(found["public_key"]))
    for signed, state in zip(found["signatures"], found["rounds"][1:], strict=True):
        head = bytes.fromhex(state["head"])
        witness.check(signed["round"], head, bytes.fromhex(signed["signature"]))


def test_a_worker_understands_every_message_down() -> None:
    found = vectors("session")
    genesis = decode_record(bytes.fromhex(vectors("journal")["records"][0]["record"]))
    assert isinstance(genesis, Genesis)
    for one in found["messages"]:
        body = bytes.fromhex(one["bytes"])
        if one["direction"] == "down":
            event_from_pb(wire.SessionResponse.FromString(body), genesis.config)
        else:
            assert wire.SessionRequest.FromString(body).WhichOneof("kind")
    pooled = wire.SessionResponse.FromString(bytes.fromhex(found["seed_offsets"]["bytes"]))
    seeds = assigned_from_pb(pooled.assign, genesis.config).work.seeds
    assert [f"{seed:016x}" for seed in seeds] == found["seed_offsets"]["seeds"]
    first = bytes.fromhex(found["first_poll"]["bytes"])
    poll = wire.PollSessionRequest.FromString(first)
    assert poll.messages[0].hello.worker == "w1"


def test_the_vectors_need_no_files_but_their_own() -> None:
    assert sorted(path.stem for path in generate.FOLDER.iterdir()) == sorted(
        [*generate.FILES, "tokenizer"]
    )
    assert all(path.suffix == ".json" for path in Path(generate.FOLDER).iterdir())
