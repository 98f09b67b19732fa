"""Digests that show two parties whether they hold the same weights and the same tokenizer.

All are SHA-256 over plain bytes, so that another stack can compute them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedmezo_core.zo.model.manifest import trained_tensors
from fedmezo_core.zo.model.offload import unique_parameters
from fedmezo_core.zo.plain.digest_tree import CHUNK_BYTES, tree_digest, weights_header
from fedmezo_core.zo.plain.entries import Manifest


def tensors_digest(
    header: bytes, tensors: Iterable[torch.Tensor], *, threads: int | None = None
) -> bytes:
    """Two-level SHA-256 tree over `tensors`: 32 bytes.

    A tensor stands for the bytes of its elements in row-major order, little-endian, as its dtype
    stores them. The bytes are cut into chunks of `CHUNK_BYTES` (the last one of a tensor may be
    shorter; a tensor without elements has none). With `leaf = SHA-256(chunk)`,

        digest = SHA-256(header || leaf_0 || leaf_1 || ...)

    over all chunks of the first tensor, then of the second, and so on. `header` must fix the
    number, order, dtypes and shapes of the tensors. The result does not depend on `threads`
    (default: one for each core that this process may use). `tensors` is read as an iterator, so
    few of them are in memory at a time.
    """
    return tree_digest(
        header, _chunks(tensors), lambda chunk: chunk.cpu().numpy().data, threads=threads
    )


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        octets = tensor.detach().reshape(-1).view(torch.uint8)
        for first in range(0, octets.numel(), CHUNK_BYTES):
            yield octets[first : first + CHUNK_BYTES]


def weights_digest(model: nn.Module, manifest: Manifest, *, threads: int | None = None) -> bytes:
    """SHA-256 digest (32 bytes) of the trained tensors, which the parties of a run compare.

    It is the `tensors_digest` of these tensors in manifest order. The header is the line
    `fedmezo weights 1`, followed by the manifest's canonical bytes.
    """
    return tensors_digest(
        weights_header(manifest), trained_tensors(model, manifest), threads=threads
    )


def base_digest(model: nn.Module, *, threads: int | None = None) -> bytes:
    """SHA-256 digest (32 bytes) of everything that determines what the model computes.

    It is the `tensors_digest` of all parameters, trained or not (tied ones once, under the first of
    their names), and all persistent buffers, sorted together by name. The header is the line
    `fedmezo base 1`, then for each tensor a line of three fields with a tab between them: name as
    an ASCII JSON string, dtype in torch's spelling without `torch.`, shape joined by `x`. Every
    line ends in a newline.
    """
    # state_dict holds parameters and persistent buffers.
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {
        name: value
        for name, value in model.state_dict().items()
        if name not in parameter_names and isinstance(value, torch.Tensor)
    }
    parameters = unique_parameters(model)
    # The model holds only shape and dtype of an offloaded parameter.
    named: dict[str, torch.Tensor] = {
        **{name: stored.parameter for name, stored in parameters.items()},
        **buffers,
    }
    lines = ["fedmezo base 1"]
    for name in sorted(named):
        shape = "x".join(str(length) for length in named[name].shape)
        dtype = str(named[name].dtype).removeprefix("torch.")
        lines.append(f"{json.dumps(name)}\t{dtype}\t{shape}")
    header = ("\n".join(lines) + "\n").encode("ascii")
    values = (
        parameters[name].read() if name in parameters else buffers[name] for name in sorted(named)
    )
    return tensors_digest(header, values, threads=threads)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """SHA-256 digest (32 bytes) of what turns text into token ids.

    It is the SHA-256 of `fedmezo tokenizer 1`, a newline, and one JSON object (keys sorted, no
    spaces, non-ASCII escaped) with the members `special_tokens` (the special tokens map),
    `chat_template` (string, object or null), and

    - for a tokenizer of the tokenizers library, `tokenizer`: its JSON form without `truncation`,
      `padding` and `version` (run-time state), without members whose value is null, and with each
      merge written as a list of two strings;
    - for any other, `class`: its class name, and `vocabulary`: token to id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {
        "special_tokens": {
            key: [str(item) for item in value] if isinstance(value, (list, tuple)) else str(value)
            for key, value in tokenizer.special_tokens_map.items()
        },
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    if backend is not None:
        form = _without_nulls(json.loads(backend.to_str()))
        for state in ("truncation", "padding", "version"):
            form.pop(state, None)
        if "merges" in form["model"]:
            form["model"]["merges"] = [
                merge.split(" ", 1) if isinstance(merge, str) else merge
                for merge in form["model"]["merges"]
            ]
        content["tokenizer"] = form
    else:
        content["class"] = type(tokenizer).__name__
        content["vocabulary"] = tokenizer.get_vocab()
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(b"fedmezo tokenizer 1\n" + text.encode("ascii")).digest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
