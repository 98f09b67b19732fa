"""A form of a run's base that another runtime computes with: a folder, checked against the run.

Whoever begins a run writes it with `fedmezo export-form`. It holds `form.json`, the files that this
names with their SHA-256 digests (what the runtime computes with, the tokenizer, and the adapter
that the run begins from), and nothing that is private. The digest of a form is the SHA-256 of its
`form.json`, so it stands for all of them. A run's `base_forms` lists those that it admits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmezo_core.config import RunConfig, sentence_of
from fedmezo_core.errors import ConfigError, MismatchError, ModelError
from fedmezo_core.records import Genesis
from fedmezo_core.zo.data.encoding import RowEncoder
from fedmezo_core.zo.data.tokenizer_file import FileTokenizer
from fedmezo_core.zo.data.tokenizer_parts import digest_of_parts
from fedmezo_core.zo.plain.entries import Entry, Manifest

FORM_FILE: Final = "form.json"
TOKENIZER_FILE: Final = "tokenizer.json"
ADAPTER_FILE: Final = "adapter.safetensors"
"""The float32 adapter that the run begins from, by the names of the model's parameters."""
_HASHED_BYTES: Final = 1 << 22

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]


class FormDescription(BaseModel):
    """What `form.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    kind: Literal["onnx", "gguf"]
    files: dict[FileName, Hex]
    """SHA-256 of each file."""
    model_file: FileName
    """The file that the runtime loads; it may read the other ones."""
    base_digest: Hex
    """The digest of the base that the form was made from, with the adapter that the run begins
    from."""
    trained: list[str]
    """Names of the trained matrices, in the manifest's order."""
    rank: int
    alpha: float
    vocabulary_size: int = Field(ge=1)
    positions_max: int | None = None
    """The most tokens of a row; None: the model does not say."""
    eos_token_id: int | None = None
    unk_token: str | None = None


@dataclass(frozen=True)
class BaseForm:
    """A form that fits a run, read and checked."""

    description: FormDescription
    model_path: Path
    name: str
    """As in a run's `base_forms`: the kind, a colon, and the digest of the form in hex."""
    manifest: Manifest
    start: Mapping[str, npt.NDArray[np.float32]]
    """The adapter that the run begins from, frozen matrices too."""
    encoder: RowEncoder


def read_form(folder: Path, genesis: Genesis) -> BaseForm:
    """Read the form in `folder` for the run that `genesis` begins.

    Raises `ModelError` for a folder that is damaged or holds no form, `MismatchError` for one of
    another base, adapter or tokenizer than the run's or that the run does not admit, `ConfigError`
    for a run whose losses no form can give.
    """
    config = genesis.config
    check_can_take_forms(config)
    path = folder / FORM_FILE
    try:
        text = path.read_bytes()
        description = FormDescription.model_validate_json(text)
    except OSError as error:
        raise ModelError(
            f"There is no form of a base in {folder}: {FORM_FILE} cannot be read "
            f"({error.strerror}); name a folder that fedmezo export-form has written."
        ) from None
    except ValidationError as error:
        raise ModelError(sentence_of(error, str(path))) from None
    for name, digest in description.files.items():
        _check_file(folder / name, digest)
    missing = {description.model_file, TOKENIZER_FILE, ADAPTER_FILE} - description.files.keys()
    if missing:
        raise ModelError(f"{path} names no {min(missing)}; export the form again.")
    name = f"{description.kind}:{hashlib.sha256(text).hexdigest()}"
    if name not in config.base_forms:
        admitted = ", ".join(config.base_forms) or "none"
        raise MismatchError(
            f"The form in base_form, {name}, is not one that the run admits ({admitted}); get the "
            "run's own form, or begin a run whose base_forms names this one."
        )
    start = read_matrices(folder / ADAPTER_FILE)
    absent = [one for one in description.trained if one not in start]
    if absent:
        raise ModelError(f"{folder / ADAPTER_FILE} has no {absent[0]}; export the form again.")
    manifest = Manifest(
        tuple(
            Entry(tensor_id, one, start[one].shape, "float32")
            for tensor_id, one in enumerate(description.trained)
        )
    )
    tokenizer = FileTokenizer(
        folder / TOKENIZER_FILE,
        eos_token_id=description.eos_token_id,
        unk_token=description.unk_token,
    )
    encoder = RowEncoder(config.task, tokenizer, description.vocabulary_size)
    own = _Digests(
        manifest.digest(),
        bytes.fromhex(description.base_digest),
        digest_of_parts(encoder.tokenizer_parts()),
    )
    for what, digests in genesis.differences(own, encoder.tokenizer_parts()):
        raise MismatchError(
            f"The {what} of the form in base_form differ from the run's: {digests}; get the form "
            "that was exported for this run."
        )
    return BaseForm(description, folder / description.model_file, name, manifest, start, encoder)


@dataclass(frozen=True)
class _Digests:
    manifest_digest: bytes
    base_digest: bytes
    tokenizer_digest: bytes


def check_can_take_forms(config: RunConfig) -> None:
    """Raise `ConfigError` for a run whose measurements need more than losses at adapters."""
    if config.lora is None:
        raise ConfigError(
            "A form of the base serves runs with lora only: this run trains the base itself; begin "
            "a run with [run.lora], or measure with torch."
        )
    if config.task.objective:
        raise ConfigError(
            f"This run scores batches by {config.task.objective}, and a form of the base gives "
            "only losses; measure with torch."
        )
    if not config.task.columns_are_plain:
        raise ConfigError(
            "This run reads rows as an old version did, which needs the whole tokenizer; measure "
            "with torch."
        )


def read_matrices(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The matrices of a safetensors file, which must be finite float32; raises `ModelError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); export the form again.") from None
    for name, value in found.items():
        if value.dtype != np.float32 or value.ndim != 2 or not np.isfinite(value).all():
            raise ModelError(
                f"{path}: {name} is no matrix of finite float32 numbers; export the form again."
            )
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file in hex, as `sha256sum` prints it."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_BYTES):
            hashed.update(chunk)
    return hashed.hexdigest()


def _check_file(path: Path, wanted: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); export the form again."
        ) from None
    if found != wanted:
        raise ModelError(
            f"{path} is damaged: its SHA-256 is {found[:16]} instead of {wanted[:16]}; copy the "
            "form again."
        )
