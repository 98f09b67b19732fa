"""Texts to token ids. The run's own text may hold control tokens; the text of a row may not."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from tokenizers import Tokenizer

TextTokenizer: TypeAlias = Any
"""A tokenizer of transformers, or a `FileTokenizer`, which has what is used of one."""

_TEXTS_PER_CALL = 1024
_CHARS_PER_CALL = 1 << 20
"""No more texts are tokenised together once they have so many characters."""


def control_tokens(tokenizer: TextTokenizer) -> dict[str, int]:
    """The texts of `tokenizer` that stand for more than themselves, with their token ids.

    These are its special tokens, and its other added tokens that are a word between marks, such as
    `<tool_call>`. Other added tokens are ordinary text that is one token: runs of spaces, letters.
    """
    # transformers leaves this without a type.
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        token.content: id_
        for id_, token in added.items()
        if token.special or _is_marked_word(token.content)
    }


def _is_marked_word(text: str) -> bool:
    return any(map(str.isalnum, text)) and not (text[0].isalnum() or text[-1].isalnum())


class PromptEncoder:
    """Turns texts of the run and of its rows into token ids.

    A text comes in pieces: the run's own text at even indices, the values of columns at odd ones,
    as in `TaskConfig.template_parts`. With `columns_are_plain`, no control token comes from a
    column, nor from a column and its neighbours together. Where the joined text gives none anyway,
    its tokens are those of the tokenizer.
    """

    def __init__(self, tokenizer: TextTokenizer, *, columns_are_plain: bool) -> None:
        self._tokenizer = tokenizer
        self._controls = control_tokens(tokenizer) if columns_are_plain else {}
        # The unknown token also stands for characters that the vocabulary lacks.
        unknown = str(tokenizer.unk_token) if tokenizer.unk_token in self._controls else None
        self._unknown = unknown
        self._ids = {id_ for text, id_ in self._controls.items() if text != unknown}
        self._written: dict[tuple[str, ...], list[int]] = {}

    @cached_property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before every text, such as `<s>`."""
        plain = self.of_texts(["a"])[0]
        special: list[int] = self._tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return special[:start]
        return []

    def of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as the tokenizer reads them, without its own special tokens."""
        encoding = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        tokens: list[list[int]] = encoding["input_ids"]
        return tokens

    def of_pieces(self, texts: Iterable[Sequence[str]]) -> Iterator[list[int]]:
        """Token ids of texts that come in pieces; only some of the texts are held at a time."""
        together: list[Sequence[str]] = []
        characters = 0
        for pieces in texts:
            together.append(pieces)
            characters += sum(map(len, pieces))
            if len(together) == _TEXTS_PER_CALL or characters >= _CHARS_PER_CALL:
                yield from self._of_some(together)
                together, characters = [], 0
        if together:
            yield from self._of_some(together)

    def _of_some(self, texts: Sequence[Sequence[str]]) -> Iterator[list[int]]:
        encoded = self.of_texts(["".join(pieces) for pieces in texts])
        for pieces, tokens in zip(texts, encoded, strict=True):
            is_plain = not self._holds_a_rows_control(pieces, tokens)
            yield tokens if is_plain else self._with_plain_columns(pieces)

    def _holds_a_rows_control(self, pieces: Sequence[str], tokens: Sequence[int]) -> bool:
        own = tuple(pieces[::2])
        # It may well be the end-of-text token. Columns side by side can spell it too.
        if (unknown := self._unknown) is not None and (
            "".join(pieces).count(unknown) != sum(part.count(unknown) for part in own)
        ):
            return True
        found = [] if self._ids.isdisjoint(tokens) else [id_ for id_ in tokens if id_ in self._ids]
        if own not in self._written:
            ids = [id_ for part in self.of_texts(own) for id_ in part]
            self._written[own] = [id_ for id_ in ids if id_ in self._ids]
        return found != self._written[own]

    def _with_plain_columns(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of a text in which a column or its neighbourhood spells a control token."""
        if self._renamed is None:
            return self._in_runs(pieces)
        tokenizer, names, ids = self._renamed
        text = "".join(
            text if index % 2 else self._spelling.sub(lambda found: names[found[0]], text)
            for index, text in enumerate(pieces)
        )
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return [ids.get(id_, id_) for id_ in encoded]

    @cached_property
    def _spelling(self) -> re.Pattern[str]:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def _renamed(self) -> tuple[Any, dict[str, str], dict[int, int]] | None:
        """A copy of the tokenizer in which control tokens have names that no row can guess.

        Gives the copy, the names by the tokens' own texts, and the tokens' ids by the copy's. None
        for a tokenizer that is not the tokenizers library's.
        """
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        secret = secrets.token_hex(16)
        names = {text: f"x{secret}x{index}x" for index, text in enumerate(self._controls)}
        form = json.loads(backend.to_str())
        for token in form["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = form["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(text, text): id_ for text, id_ in vocabulary.items()}
        else:  # Unigram: pieces with their scores. It would take a control token for any piece.
            model["vocab"] = [[names.get(text, text), *rest] for text, *rest in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            model["merges"] = [
                (left, right)
                for left, right in model["merges"]
                if not {left, right, left + right} & names.keys()
            ]
        for unused in ("truncation", "padding", "post_processor", "decoder"):
            form[unused] = None
        copy: Any = Tokenizer.from_str(json.dumps(form))
        ids = {copy.token_to_id(names[text]): id_ for text, id_ in self._controls.items()}
        return copy, names, ids

    def _in_runs(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of a text that is cut at the run's control tokens, each run of text for itself.

        Only for tokenizers without a renamed copy: at a cut some put a space before the text.
        """
        runs: list[str] = [""]
        between: list[int] = []
        for index, piece in enumerate(pieces):
            end = 0
            for found in () if index % 2 else self._spelling.finditer(piece):
                runs[-1] += piece[end : found.start()]
                runs.append("")
                between.append(self._controls[found[0]])
                end = found.end()
            runs[-1] += piece[end:]
        tokens: list[int] = []
        slow: Any = self._tokenizer
        for run, control in itertools.zip_longest(runs, between):
            # transformers 4 takes this option here, but not where it is called with many texts.
            tokens += slow.convert_tokens_to_ids(slow.tokenize(run, split_special_tokens=True))
            tokens += [] if control is None else [control]
        return tokens
