"""Write a form of a run's base for workers without torch; this itself needs torch."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.folders import whole_folder
from fedmezo_core.program import long_step
from fedmezo_core.zo.data.task import Batch, decoder_of, logits_of, plain_head
from fedmezo_core.zo.edge.adapter_file import check_architecture, gguf_name, with_whole_b
from fedmezo_core.zo.edge.base_form import (
    ADAPTER_FILE,
    FORM_FILE,
    TOKENIZER_FILE,
    FormDescription,
    check_can_take_forms,
    file_digest,
)
from fedmezo_core.zo.edge.onnx_losses import GRAPH_INPUTS, GRAPH_OUTPUT
from fedmezo_core.zo.model.loading import quiet
from fedmezo_core.zo.party import Party

ONNX_FILE: Final = "model.onnx"
GGUF_FILE: Final = "model.gguf"
_GGUF_MAGIC: Final = b"GGUF"
"""What each GGUF begins with."""
_OPSET: Final = 18
_LOGITS_TOLERANCE: Final = 1e-3
"""Largest difference of a graph's logits from torch's, as a part of the largest logit."""


def export_onnx_form(party: Party, folder: Path) -> str:
    """Write the base of `party`, at its start, as an ONNX graph into the new folder `folder`.

    The matrices of the adapter are inputs of the graph. Returns the form's name, for the run's
    `base_forms`. Raises `ModelError` if the export fails or the graph computes other logits than
    the model, `ConfigError` for a run that no form serves.
    """
    if party.config.dtype != "float32":
        raise ConfigError(
            f"ONNX Runtime computes a base of dtype float32 on a CPU, and this run has "
            f"{party.config.dtype}; begin a run with float32, or export a GGUF."
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"The package {package} is missing; install fedmezo[onnx] to export.")

    def write(into: Path) -> str:
        _write_graph(party, into / ONNX_FILE)
        _check_graph(party, into / ONNX_FILE)
        return ONNX_FILE

    return _export(party, folder, "onnx", write)


def export_gguf_form(party: Party, folder: Path, gguf: Path) -> str:
    """Write a form of the base of `party` around the file `gguf`, which llama.cpp computes with.

    As `export_onnx_form`; it also raises `ModelError` for a file that is no GGUF, or one of another
    architecture, vocabulary or shape. Whether it holds the same weights, in whatever precision,
    nobody can check: its losses only come close to the base's. The run admits it by its name.
    """

    def write(into: Path) -> str:
        try:
            shutil.copyfile(gguf, into / GGUF_FILE)
        except OSError as error:
            raise ModelError(
                f"{gguf} cannot be copied ({error.strerror}); check the path."
            ) from None
        with (into / GGUF_FILE).open("rb") as file:
            if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
                raise ModelError(f"{gguf} is no GGUF; give a GGUF of the same base.")
        _check_gguf(party, gguf)
        return GGUF_FILE

    return _export(party, folder, "gguf", write)


def _check_gguf(party: Party, path: Path) -> None:
    """Check what a GGUF says of itself: that llama.cpp can put the run's adapter into it."""
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "The package gguf is missing; install it (pip install gguf) to export a GGUF."
        ) from None
    try:
        reader: Any = gguf.GGUFReader(str(path))
        architecture = str(reader.get_field("general.architecture").contents())
        # A GGUF names the innermost dimension first: [inputs, outputs].
        shapes = {one.name: tuple(map(int, one.shape)) for one in reader.tensors}
    except Exception as error:  # the reader raises almost any type on a damaged file
        raise ModelError(
            f"{path} cannot be read ({error}); give an undamaged GGUF of the same base."
        ) from None
    check_architecture(architecture)
    vocabulary = shapes.get("token_embd.weight", (0, 0))[-1]
    if vocabulary != party.vocabulary_size:
        raise ModelError(
            f"{path} has {vocabulary} tokens, the run's base {party.vocabulary_size}; give a GGUF "
            "of the same base."
        )
    adapter = {name: own.numpy() for name, own in adapter_matrices(party.loaded.model).items()}
    for name, matrix in with_whole_b(adapter).items():
        place, _, side = gguf_name(name).rpartition(".lora_")
        wanted = matrix.shape[1 if side == "a" else 0]
        found = shapes.get(place, (0, 0))["ab".index(side)]
        if found != wanted:
            ends = "inputs" if side == "a" else "outputs"
            raise ModelError(
                f"{path}: {place} has {found} {ends}, the run's adapter {wanted}; give a GGUF of "
                "the same base."
            )


def _export(
    party: Party, folder: Path, kind: Literal["onnx", "gguf"], write: Callable[[Path], str]
) -> str:
    config = party.config
    check_can_take_forms(config)
    assert config.lora is not None
    if party.weights.round:
        raise ConfigError("A form holds the adapter that a run begins from; open the run's base.")
    tokenizer: Any = party.loaded.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None or tokenizer.split_special_tokens:
        raise ModelError(
            f"The tokenizer of {config.model} is not one of the tokenizers library, which workers "
            "without transformers need; use a model with a tokenizer.json."
        )
    with whole_folder(folder, ConfigError) as partial:
        return _written(party, partial, kind, write)


def _written(
    party: Party, folder: Path, kind: Literal["onnx", "gguf"], write: Callable[[Path], str]
) -> str:
    config, tokenizer = party.config, party.loaded.tokenizer
    assert config.lora is not None
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
    save_file(adapter_matrices(party.loaded.model), folder / ADAPTER_FILE)
    model_file = write(folder)
    description = FormDescription(
        kind=kind,
        files={path.name: file_digest(path) for path in sorted(folder.iterdir())},
        model_file=model_file,
        base_digest=party.base_digest.hex(),
        trained=[entry.name for entry in party.loaded.manifest],
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        vocabulary_size=party.vocabulary_size,
        positions_max=party.positions_max,
        eos_token_id=tokenizer.eos_token_id,
        unk_token=None if tokenizer.unk_token is None else str(tokenizer.unk_token),
    )
    text = description.model_dump_json(indent=1).encode()
    (folder / FORM_FILE).write_bytes(text)
    return f"{kind}:{hashlib.sha256(text).hexdigest()}"


def adapter_matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the A and B matrices of a LoRA model, by their parameters' names."""
    return {
        name: parameter.detach().to("cpu", torch.float32).clone().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


class _Graph(nn.Module):
    """The model as a function of the graph's inputs."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        head, decoder = plain_head(model), decoder_of(model)
        if head is None or decoder is None:
            raise ModelError(
                f"{type(model).__name__} has no head apart from its decoder, which the export to "
                "ONNX needs; choose another model, or measure with torch."
            )
        self._head, self._decoder = head, decoder
        self._linears = [model.get_submodule(name.removesuffix(".weight")) for name in names]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        adapter: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Logits [places, vocabulary] at `columns` of `rows`."""
        with _computing_with(self._linears, adapter):
            hidden = self._decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            )[0]
            logits: torch.Tensor = self._head(hidden[rows, columns])
        return logits


@contextmanager
def _computing_with(
    linears: Sequence[nn.Module], weights: Sequence[torch.Tensor]
) -> Iterator[None]:
    """While open, each of `linears` multiplies by its one of `weights`."""

    def product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda inputs: functional.linear(inputs, weight)

    try:
        for linear, weight in zip(linears, weights, strict=True):
            linear.forward = product(weight)
        yield
    finally:
        for linear in linears:
            del linear.forward


def _write_graph(party: Party, path: Path) -> None:
    matrices = adapter_matrices(party.loaded.model)
    batch, rows, columns = _example(party, rows=3, tokens=7)
    dynamic = torch.export.Dim.DYNAMIC
    row_shape = {0: dynamic, 1: dynamic}
    shapes: Any = (
        row_shape, row_shape, row_shape, {0: dynamic}, {0: dynamic}, tuple({} for _ in matrices),
    )  # fmt: skip
    with long_step("exporting the base to ONNX"), quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                _Graph(party.loaded.model, list(matrices)).eval(),
                (
                    batch.input_ids, batch.attention_mask, batch.position_ids, rows, columns,
                    tuple(matrices.values()),
                ),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=_OPSET,
                input_names=[*GRAPH_INPUTS, *matrices],
                output_names=[GRAPH_OUTPUT],
                verbose=False,
            )  # fmt: skip
            program.save(str(path), external_data=True)
        except Exception as error:  # torch raises almost any type here
            reason = " ".join(str(error).split("\n", 1)[0].split())[:300]
            raise ModelError(
                f"{party.config.model} cannot be exported to ONNX ({reason}); choose another "
                "model, or measure with torch."
            ) from error


def _example(party: Party, *, rows: int, tokens: int) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """A batch of any tokens, the first row half as long, and the last place of each row."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % party.vocabulary_size
    mask = torch.ones_like(ids)
    mask[0, : tokens // 2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = Batch("export", ids, mask, positions, torch.zeros(rows), torch.zeros(rows, 0), ())
    return batch, torch.arange(rows), torch.full((rows,), tokens - 1)


def _check_graph(party: Party, path: Path) -> None:
    """Compare the graph's logits with torch's, on other rows and another adapter than exported."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = party.loaded.model
    generator = torch.Generator().manual_seed(0)
    matrices = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in adapter_matrices(model).items()
    }
    linears = [model.get_submodule(name.removesuffix(".weight")) for name in matrices]
    batch, rows, columns = _example(party, rows=2, tokens=12)
    with torch.inference_mode(), _computing_with(linears, list(matrices.values())):
        wanted = logits_of(model, batch, 1)[:, -1].float().numpy()
    feed = dict(
        zip(
            [*GRAPH_INPUTS, *matrices],
            [
                batch.input_ids, batch.attention_mask, batch.position_ids, rows, columns,
                *matrices.values(),
            ],
            strict=True,
        )
    )  # fmt: skip
    inputs = {one.name for one in session.get_inputs()}
    arrays = {name: value.numpy() for name, value in feed.items() if name in inputs}
    [found] = session.run([GRAPH_OUTPUT], arrays)
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not difference <= _LOGITS_TOLERANCE:
        raise ModelError(
            f"The exported graph of {party.config.model} computes other logits than the model "
            f"(they differ by {difference:.1e} of the largest); choose another model, or measure "
            "with torch."
        )
