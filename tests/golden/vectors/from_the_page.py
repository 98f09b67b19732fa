"""Parts of docs/protocol.md and of both standards, with nothing but Python's standard library.

The tests compare these with docs/vectors, so that the page's formulas are enough. Slow on purpose.
"""

from __future__ import annotations

import hashlib
import math
import struct
import unicodedata
from collections.abc import Iterable, Sequence

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def u64le(number: int) -> bytes:
    return struct.pack("<Q", number)


def f32(value: float) -> float:
    """`value` rounded to binary32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def f32_of(bits: str) -> float:
    value: float = struct.unpack(">f", bytes.fromhex(bits))[0]
    return value


def bits_of(values: Iterable[float]) -> str:
    return " ".join(struct.pack(">f", value).hex() for value in values)


# ---------------------------------------------------------------- section 3


def philox4x32(seed: int, counter: Sequence[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(10):
        one, two = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = two >> 32 ^ c1 ^ k0, two & MASK32, one >> 32 ^ c3 ^ k1, one & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def word_of(element: int, seed: int, tensor_id: int, domain: int, slots: int) -> tuple[int, int]:
    """An element's word, and the slot of it that is the element's."""
    row, column = divmod(element, 128)
    block = row // slots * 32 + column % 32
    counter = (block & MASK32, block >> 32, tensor_id, domain)
    return philox4x32(seed, counter)[column // 32], row % slots


def rademacher(element: int, seed: int, tensor_id: int) -> float:
    word, slot = word_of(element, seed, tensor_id, 1, 32)
    return -1.0 if word >> (31 - slot) & 1 else 1.0


def low_rank(element: int, seed: int, tensor_id: int, columns: int, rank: int) -> float:
    signs = []
    for index, domain in ((element // columns, 4), (element % columns, 5)):
        word, slot = word_of(index, seed, tensor_id, domain, 8)
        nibble = word >> (28 - 4 * slot) & 0xF
        signs.append([-1 if nibble >> (3 - k) & 1 else 1 for k in range(rank)])
    total = sum(u * v for u, v in zip(*signs, strict=True))
    return f32(total * f32_of({1: "3f800000", 2: "3f3504f3", 4: "3f000000"}[rank]))


def bits(value: float) -> int:
    return int.from_bytes(struct.pack(">f", value), "big")


def from_bits(pattern: int) -> float:
    return f32_of(f"{pattern:08x}")


def constants(text: str) -> list[float]:
    return [f32_of(word) for word in text.split()]


LOG = constants("C0000000 3F7FFFFD BF2AAB7A 3F00024D BECC6960 3EA9AE98 BE98C293 3E92824D BE32E3B3")
SIN = constants("3F490FDB BDA55DDD 3B232F49 B816C981")
COS = constants("3F800000 BE9DE9CE 3C81D848 B9A74225")


def plus(a: float, b: float) -> float:
    return f32(a + b)


def times(a: float, b: float) -> float:
    return f32(a * b)


def box_muller(a: int, b: int) -> tuple[float, float]:
    """The two values of a radius word and an angle word, each operation rounded by itself."""
    n = a >> 1 | 1
    s = (bits(f32(n)) + 0x004AFB0D) & MASK32
    exponent = f32(158 - (s >> 23))
    mantissa = from_bits((s & 0x007FFFFF) + 0x3F3504F3)
    x = plus(mantissa, -1.0)
    x2 = times(x, x)
    x4 = times(x2, x2)
    low = plus(plus(times(x, LOG[1]), LOG[0]), times(x2, plus(times(x, LOG[3]), LOG[2])))
    inner = plus(plus(times(x, LOG[7]), LOG[6]), times(x2, LOG[8]))
    high = plus(plus(times(x, LOG[5]), LOG[4]), times(x2, inner))
    series = times(x, plus(low, times(x4, high)))
    radius = f32(math.sqrt(plus(times(exponent, f32_of("3FB17218")), series)))
    turned = (b << 2 | 2) & MASK32
    signed = turned - 2**32 if turned >> 31 else turned
    y = times(f32(signed), f32_of("30000000"))
    y2 = times(y, y)

    def even(values: Sequence[float]) -> float:
        c0, c1, c2, c3 = values
        return plus(c0, times(y2, plus(c1, times(y2, plus(c2, times(y2, c3))))))

    sine, cosine = times(y, even(SIN)), even(COS)
    if b >> 30 & 1:
        cosine = -cosine
    p, q = times(radius, cosine), times(radius, sine)
    return (q, p) if b >> 31 else (p, q)


def gaussian(element: int, seed: int, tensor_id: int) -> float:
    row, column = divmod(element, 128)
    block = row * 32 + column % 32
    words = philox4x32(seed, (block & MASK32, block >> 32, tensor_id, 2))
    pair = column // 32 // 2 * 2
    return box_muller(words[pair], words[pair + 1])[column // 32 % 2]


def rounding_bits(element: int, seed: int, tensor_id: int, dtype: str) -> int:
    """16 bits of domain 3 for bfloat16, the word of domain 6 for float16."""
    if dtype == "float16":
        return word_of(element, seed, tensor_id, 6, 1)[0]
    word, slot = word_of(element, seed, tensor_id, 3, 2)
    return word >> (16 - 16 * slot) & 0xFFFF


def z(distribution: str, element: int, seed: int, tensor_id: int, columns: int) -> float:
    if distribution == "gaussian":
        return gaussian(element, seed, tensor_id)
    if distribution == "rademacher":
        return rademacher(element, seed, tensor_id)
    return low_rank(element, seed, tensor_id, columns, int(distribution[-1]))


def hash64(text: str, *numbers: int) -> int:
    digest = sha256(text.encode(), b"\0", *map(u64le, numbers))
    return int.from_bytes(digest[:8], "little")


def first_seed(run_seed: int, round_: int, slot: int) -> int:
    return hash64("fedmezo seed v1", run_seed, round_, slot) & ~0xFFFF


# ---------------------------------------------------------------- sections 4 and 9


def json_string(text: str) -> str:
    short = {'"': '\\"', "\\": "\\\\"}
    short |= {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
    written = ""
    for character in text:
        if character in short:
            written += short[character]
        elif " " <= character <= "~":
            written += character
        else:
            units = character.encode("utf-16-be")
            written += "".join(f"\\u{units[n : n + 2].hex()}" for n in range(0, len(units), 2))
    return f'"{written}"'


def manifest_bytes(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> bytes:
    """The canonical bytes for tensors of name, dtype and shape."""
    lines = ["fedmezo manifest 1"]
    for tensor_id, (name, dtype, shape) in enumerate(sorted(tensors)):
        lengths = "x".join(map(str, shape))
        lines.append(f"{tensor_id}\t{json_string(name)}\t{dtype}\t{lengths}")
    return "".join(f"{line}\n" for line in lines).encode("ascii")


def tensors_digest(header: bytes, tensors: Iterable[bytes]) -> bytes:
    chunk = 4 * 1024 * 1024
    leaves = [
        sha256(values[first : first + chunk])
        for values in tensors
        for first in range(0, len(values), chunk)
    ]
    return sha256(header, *leaves)


def weights_digest(manifest: bytes, tensors: Iterable[bytes]) -> bytes:
    return tensors_digest(b"fedmezo weights 1\n" + manifest, tensors)


# ---------------------------------------------------------------- section 5


def recipe(contract: dict[str, object]) -> str:
    """The recipe of a contract in protobuf's JSON form."""

    def word(field: str) -> str:
        prefixes = ("DISTRIBUTION_", "WEIGHT_TYPE_", "ROUNDING_", "SEED_POLICY_", "ESTIMATOR_")
        text = str(contract.get(field, ""))
        for prefix in prefixes:
            text = text.removeprefix(prefix)
        return text.lower()

    parts = ["fedmezo-1 philox4x32-10", word("distribution"), word("dtype"), word("rounding")]
    parts.append(f"eps={contract['eps']!r}")
    probes, steps = int(str(contract.get("probes", 1))), int(str(contract["local_steps"]))
    if probes > 1:
        parts.append(f"probes={probes}")
    if word("estimator") == "one_sided":
        parts.append("one_sided")
    if contract.get("normalized_step"):
        parts.append("normalized")
    if contract.get("rate_directions") and steps > 1:
        parts.append(f"rate_directions={contract['rate_directions']}")
    if contract.get("weight_decay"):
        parts.append("decay")
    if word("seed_policy") == "pool":
        parts.append("pool")
    if contract.get("buffer_answers"):
        parts.append("buffered")
    task = contract["task"]
    assert isinstance(task, dict)
    if task.get("template_version", 1) != 1:
        parts.append(f"template={task['template_version']}")
    if task.get("objective"):
        parts.append(f"objective={task['objective']}")
    return " ".join(parts)


# ---------------------------------------------------------------- section 6


def philox4x64(key: bytes, count: int) -> list[int]:
    """The first words for a key of 16 bytes."""
    words: list[int] = []
    number = 0
    while len(words) < count:
        number += 1
        k0, k1 = struct.unpack("<QQ", key)
        c0, c1, c2, c3 = number, 0, 0, 0
        for _ in range(10):
            one, two = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = two >> 64 ^ c1 ^ k0, two & MASK64, one >> 64 ^ c3 ^ k1, one & MASK64
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK64, (k1 + 0xBB67AE8584CAA73B) & MASK64
        words += [c0, c1, c2, c3]
    return words[:count]


def batch(
    run_seed: int,
    worker: str,
    token_counts: Sequence[int],
    batch_size: int,
    local_steps: int,
    round_: int,
    step: int,
) -> list[int]:
    rows = len(token_counts)
    size = min(batch_size, rows)
    count = rows // size
    number, place = divmod((round_ - 1) * local_steps + step, count)
    key = sha256(b"fedmezo batches v1\0", u64le(number), u64le(run_seed), worker.encode())[:16]
    words = philox4x64(key, rows + count)
    order = sorted(range(rows), key=words.__getitem__)[: size * count]
    batches: list[list[int]] = []
    for first in range(0, len(order), 8 * size):
        window = sorted(order[first : first + 8 * size], key=token_counts.__getitem__)
        batches += [window[start : start + size] for start in range(0, len(window), size)]
    return batches[sorted(range(count), key=words[rows:].__getitem__)[place]]


def template_parts(template: str) -> list[str]:
    parts, at = [""], 0
    while at < len(template):
        if template[at : at + 2] in ("{{", "}}"):
            parts[-1] += template[at]
            at += 2
        elif template[at] == "{":
            end = template.index("}", at)
            parts += [template[at + 1 : end], ""]
            at = end + 1
        else:
            parts[-1] += template[at]
            at += 1
    return parts


def label_form(label: str) -> str:
    label = unicodedata.normalize("NFC", label.replace("\ufeff", ""))
    if label.lower() in ("true", "false"):
        return label.lower()
    whole, point, rest = label.partition(".")
    digits = whole[1:] if whole[:1] in ("+", "-") else whole
    is_whole = digits.isascii() and digits.isdecimal() and point and rest and not rest.strip("0")
    return whole if is_whole else label


# ---------------------------------------------------------------- sections 7 and 8


def answer_text(
    genesis_head: bytes,
    ticket: tuple[int, int, int],
    head: bytes,
    grads: Sequence[float],
    mean_loss: float | None,
    weights_digest64: int | None,
    rows: int | None,
) -> bytes:
    """What a worker signs of its answer."""
    optional = (mean_loss, weights_digest64, rows)
    flags = sum(2**place for place, value in enumerate(optional) if value is not None)
    text = b"fedmezo answer v1\n" + genesis_head
    text += struct.pack("<I", ticket[0]) + u64le(ticket[1]) + struct.pack("<I", ticket[2])
    text += head + bytes([flags])
    text += struct.pack("<f", 0.0 if mean_loss is None else mean_loss)
    text += u64le(weights_digest64 or 0) + u64le(rows or 0)
    return text + struct.pack("<I", len(grads)) + b"".join(struct.pack("<f", g) for g in grads)


def projected_grad(plus: float, other: float, distance: float, clip: float) -> float:
    return max(-clip, min(clip, f32((plus - other) / distance)))


def local_coefficients(
    grads: Sequence[float], rate: float, normalized: bool, rate_directions: int, loss: float
) -> list[float]:
    """The coefficients of one local step's pairs."""
    count = len(grads)
    size = math.sqrt(math.fsum(grad * grad for grad in grads) / count)
    used = [grad / size if size > 0 else 0.0 for grad in grads] if normalized else list(grads)
    quotients = [-(rate * grad * 1) / count for grad in used]
    if rate_directions:
        gain = math.fsum(-(q * grad) for q, grad in zip(quotients, grads, strict=True))
        limit = 2.0 * loss
        factor = count * (gain + limit) / (count * gain + rate_directions * limit)
        quotients = [quotient * factor for quotient in quotients]
    return [f32(quotient) for quotient in quotients]


def stored(acc: float, dtype: str, random_bits: int | None) -> int:
    """The stored bits of a commit's result; nearest even without `random_bits`."""
    t = bits(acc)
    if dtype == "float32":
        return t
    if dtype == "bfloat16":
        nearest = 0x7FFF + (t >> 16 & 1)
        return t + (nearest if random_bits is None else random_bits) >> 16
    if random_bits is None:
        return int.from_bytes(struct.pack(">e", acc), "big")
    magnitude = t & 0x7FFFFFFF
    if magnitude >= 0x38800000:
        half = min((magnitude + (random_bits >> 19) >> 13) - (112 << 10), 0x7C00)
    else:
        units = abs(acc) * 2.0**24
        whole = math.floor(units)
        half = whole + (f32(random_bits >> 8) * 2.0**-24 < units - whole)
    return t >> 16 & 0x8000 | half


def value_of(pattern: int, dtype: str) -> float:
    if dtype == "float32":
        return from_bits(pattern)
    if dtype == "bfloat16":
        return from_bits(pattern << 16)
    value: float = struct.unpack(">e", pattern.to_bytes(2, "big"))[0]
    return value


def added(
    values: Sequence[float],
    pairs: Iterable[tuple[int, float]],
    distribution: str,
    tensor_id: int,
    columns: int,
    decay: float = 1.0,
) -> list[float]:
    """The elements of a float32 tensor after pairs of a seed and a coefficient."""
    pairs = list(pairs)
    result = []
    for element, value in enumerate(values):
        acc = f32(value * decay) if decay != 1.0 else value
        for seed, coefficient in pairs:
            noise = z(distribution, element, seed, tensor_id, columns)
            acc = f32(acc + f32(coefficient * noise))
        result.append(acc)
    return result
