"""What of a tokenizer can change a loss of a run, in parts, so that a difference has a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fedmezo_core.config import TaskConfig
from fedmezo_core.records import TOKENIZER_PARTS
from fedmezo_core.zo.data.prompts import TextTokenizer, control_tokens

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def tokenizer_parts(
    tokenizer: TextTokenizer, task: TaskConfig, before: Sequence[int]
) -> tuple[bytes, ...]:
    """SHA-256 digests (32 bytes each) of `TOKENIZER_PARTS`; `before` goes before every prompt.

    Each is the SHA-256 of its name, a newline, and a JSON value (keys sorted, no spaces, non-ASCII
    escaped, members left out that are null, false or an empty text):

    - vocabulary, normalizer, pre-tokenizer: these members of the JSON form of the tokenizers
      library (`model`, `normalizer`, `pre_tokenizer`), without `trim_offsets`, and without
      `unk_token` and `fuse_unk` where every byte has a token to fall back on. For a tokenizer of
      another kind, the first is its class name, its tokens with their ids, and its unknown token.
    - added tokens: for each, sorted by id, what its text is and how it takes the text around it.
      Control tokens count only if the template or a verbalizer holds their text; padding tokens,
      chat markup and the like change nothing otherwise. Also whether special tokens are split.
    - tokens before a prompt: their ids.
    - end-of-text token: its id, in runs that train or generate it.
    - decoder: this member of the JSON form and the special tokens, in runs that generate text.

    Left out is what changes no token of a prompt: padding, truncation, chat template, names.
    """
    values = _values(tokenizer, task, before)
    return tuple(_digest(name, values[name]) for name in TOKENIZER_PARTS)


def digest_of_parts(parts: Sequence[bytes]) -> bytes:
    """The digest of a whole tokenizer: SHA-256 of `fedmezo tokenizer 2`, a newline, all parts."""
    return hashlib.sha256(b"fedmezo tokenizer 2\n" + b"".join(parts)).digest()


def _values(tokenizer: TextTokenizer, task: TaskConfig, before: Sequence[int]) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    if backend is None:
        vocabulary = {text: id_ for text, id_ in tokenizer.get_vocab().items() if id_ not in added}
        form: dict[str, Any] = {
            "model": [type(tokenizer).__name__, vocabulary, tokenizer.unk_token_id]
        }
    else:
        form = json.loads(backend.to_str())
        model = form["model"]
        if model["type"] == "BPE" and model["byte_fallback"] and model["vocab"].keys() >= _BYTES:
            del model["unk_token"], model["fuse_unk"]
    own = [*task.template_parts()[::2], *task.verbalizers.values()]
    unused = {text for text in control_tokens(tokenizer) if not any(text in one for one in own)}
    generates = task.generated_tokens_max > 0
    has_end = generates or task.kind == "instruction"
    special = sorted(id_ for id_, token in added.items() if token.special)
    return {
        "vocabulary": form["model"],
        "normalizer": form.get("normalizer"),
        "pre-tokenizer": form.get("pre_tokenizer"),
        "added tokens": [
            bool(getattr(tokenizer, "split_special_tokens", False)),
            *(
                [id_, one.content, one.single_word, one.lstrip, one.rstrip, one.normalized]
                for id_, one in sorted(added.items())
                if one.content not in unused
            ),
        ],
        "tokens before a prompt": list(before),
        "end-of-text token": tokenizer.eos_token_id if has_end else None,
        "decoder": [form.get("decoder"), special] if generates else None,
    }


def _digest(name: str, value: Any) -> bytes:
    text = json.dumps(_filled(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{name}\n{text}".encode("ascii")).digest()


def _filled(value: Any) -> Any:
    """`value` without empty members, which some versions of the libraries write and some do not."""
    if isinstance(value, dict):
        return {
            key: _filled(item)
            for key, item in value.items()
            if item is not None and item is not False and item != "" and key != "trim_offsets"
        }
    return list(map(_filled, value)) if isinstance(value, list) else value
