"""The tokenizer of a run without transformers: the tokenizers library on a tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fedmezo_core.errors import ModelError


class FileTokenizer:
    """What encoding uses of a transformers tokenizer, from the JSON form of its backend."""

    split_special_tokens = False

    def __init__(self, path: Path, *, eos_token_id: int | None, unk_token: str | None) -> None:
        """Read `path`; the end-of-text and unknown tokens are those of the model's tokenizer.

        Raises `ModelError` for a file that the tokenizers library cannot read.
        """
        self.eos_token_id = eos_token_id
        self.unk_token = unk_token
        try:
            self.backend_tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{path} cannot be read ({error}); export it again.") from None
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens, each under its id."""
        found: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return found

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, **_ignored: object
    ) -> dict[str, Any]:
        """The token ids of one text or of several, under `input_ids`."""
        if isinstance(text, str):
            return {"input_ids": self._ids([text], add_special_tokens)[0]}
        return {"input_ids": self._ids(text, add_special_tokens)}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The texts that the vocabulary has for `ids`."""
        return [self.backend_tokenizer.id_to_token(id_) for id_ in ids]

    def _ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self.backend_tokenizer.encode_batch(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]
