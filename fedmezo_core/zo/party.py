"""One party's copy of a run: its model, task and weights, as workers and replicas have it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, MismatchError
from fedmezo_core.program import long_step
from fedmezo_core.records import Genesis
from fedmezo_core.zo.data.encoding import Dataset
from fedmezo_core.zo.data.prompts import control_tokens
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.data.tokenizer_parts import digest_of_parts
from fedmezo_core.zo.materialize import warm_up
from fedmezo_core.zo.model.compressed import check_compressible, compress_frozen
from fedmezo_core.zo.model.loading import ON_CPU, LoadedModel, SharedBases, load_model
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.weight_digest import base_digest, tokenizer_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights

log = logging.getLogger("fedmezo.party")

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names that models' configurations have for their number of positions."""
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|[^.]*pos[^.]*)$")
"""Names of embeddings that hold a vector for each position."""
MANY_CUT_ROWS = 0.1
"""Share of rows that are cut from which on a party warns."""


@dataclass(frozen=True)
class Party:
    """A model at its base weights, with everything that the run's configuration makes of it."""

    config: RunConfig
    loaded: LoadedModel
    task: Task
    weights: Weights
    manifest_digest: bytes
    base_digest: bytes
    tokenizer_digest: bytes
    tokenizer_parts: tuple[bytes, ...]
    """As in `Genesis`."""
    base_form: str = ""
    """The form of the base that this party's hello names, as in `base_forms`; empty for none."""

    @property
    def distribution(self) -> Distribution:
        """The distribution of the run's directions."""
        return Distribution[self.config.distribution.upper()]

    @property
    def rounding(self) -> Rounding:
        """How the run's commits round weights that are not float32."""
        return Rounding[self.config.rounding.upper()]

    def genesis(self) -> Genesis:
        """The record that begins the journal of a run from this base."""
        return Genesis(
            config=self.config,
            manifest_digest=self.manifest_digest,
            base_digest=self.base_digest,
            tokenizer_digest=self.tokenizer_digest,
            trainable_elements=self.loaded.manifest.element_count,
            # An adapter is float32 in every run, whatever the run's dtype.
            trainable_bytes=self.weights.byte_count,
            tokenizer_parts=self.tokenizer_parts,
        )

    @property
    def vocabulary_size(self) -> int:
        """Number of embeddings of the model."""
        return _vocabulary_size(self.loaded)

    @property
    def positions_max(self) -> int | None:
        """The most tokens of a row that the model knows positions for; None if it does not say."""
        return positions_of(self.loaded.model)

    def check_can_begin(self) -> None:
        """Refuse a new run whose rows may be longer than the model's positions.

        Raises `ConfigError`. Runs that have begun may go on: their rows may be shorter.
        """
        tokens_max, positions = self.config.task.tokens_max, self.positions_max
        if positions is not None and tokens_max > positions:
            raise ConfigError(
                f"task.tokens_max = {tokens_max} is more than the {positions} positions of "
                f"{self.config.model}; set tokens_max = {positions} or less in [run.task]."
            )

    def encode(self, path: Path | str, rows: Sequence[Example]) -> Dataset:
        """The token ids of `rows`, which are from `path` or a source of that name; logs about them.

        Raises as `Task.encode` does, and `ConfigError` for a row with more tokens than the model
        has positions, if each has a vector of its own.
        """
        with long_step(f"turning the rows of {path} into tokens"):
            dataset = self.task.encode(rows)
        longest, positions = max(one.token_count for one in dataset.examples), self.positions_max
        if positions is not None and longest > positions and self._learns_positions:
            raise ConfigError(
                f"{path} has a row of {longest} tokens, but {self.config.model} knows {positions} "
                "positions; make the rows shorter, or begin a new run with task.tokens_max = "
                f"{positions} or less."
            )
        self._tell_of_control_tokens(path, rows)
        self._tell_of_cut_rows(path, dataset)
        return dataset

    @property
    def _learns_positions(self) -> bool:
        return any(
            isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name)
            for name, module in self.loaded.model.named_modules()
        )

    def _tell_of_cut_rows(self, path: Path | str, dataset: Dataset) -> None:
        if not dataset.truncated_count:
            log.info("%s: %d rows", path, len(dataset))
            return
        left = sum(example.token_count for example in dataset.examples)
        longest, task, positions = dataset.longest_token_count, self.config.task, self.positions_max
        fits = longest if positions is None else min(longest, positions - task.generated_tokens_max)
        advice = (
            f"a new run with tokens_max = {fits} keeps {'all' if fits == longest else 'more'} of "
            "them"
            if fits > task.tokens_max
            else "the model has positions for no more, so make the rows shorter"
        )
        is_much = dataset.truncated_count >= MANY_CUT_ROWS * len(dataset)
        log.log(
            logging.WARNING if is_much else logging.INFO,
            "%s: %d rows, %d of them cut to %d tokens, which loses %.0f %% of all tokens; the "
            "longest row has %d; %s",
            path,
            len(dataset),
            dataset.truncated_count,
            task.tokens_max,
            100 * dataset.cut_token_count / (left + dataset.cut_token_count),
            longest,
            advice,
        )

    def _tell_of_control_tokens(self, path: Path | str, rows: Sequence[Example]) -> None:
        """In an old run, warn of text that the tokenizer takes for a control token."""
        task, controls = self.config.task, control_tokens(self.loaded.tokenizer)
        if task.columns_are_plain or not controls:
            return
        written = re.compile("|".join(map(re.escape, controls)))
        columns = task.columns() if task.kind == "classification" else task.data_columns
        found = [
            (row, match)
            for row in rows
            if (match := written.search("\n".join(row.values[column] for column in columns)))
        ]
        if found:
            first, match = found[0]
            log.warning(
                "%s: the text of %d rows contains %r or the like (first in %s), which the "
                "tokenizer takes for a control token; remove it from the rows if it is not meant",
                path,
                len(found),
                match[0],
                first.location,
            )

    def check_same_base(self, genesis: Genesis) -> None:
        """Refuse to go on from another base than the run's, and say what differs."""
        also = ", and begin from the same adapter, or none (--adapter)"
        also = also if genesis.config.lora else ""
        for what, digests in genesis.differences(self, self.tokenizer_parts):
            raise MismatchError(
                f"The {what} loaded here differ from the run's: {digests}; load the same files of "
                f"{genesis.config.model} as the coordinator{also}."
            )


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of a row that a model knows positions for; None if it does not say."""
    model_config: Any = model.config
    text_config = model_config.get_text_config()
    for name in _POSITIONS:
        positions = getattr(text_config, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return None


def warn_of_answers_in_prompts(task: TaskConfig) -> None:
    """Log a warning if the prompts of `task` hold the answer that the model should learn."""
    if task.holds_its_answer:
        log.warning(
            "the template names %s, the column with the answer: the prompt gives the answer away",
            task.answer_column,
        )


def open_party(
    config: RunConfig,
    model: str,
    *,
    adapter: Path | None = None,
    threads: int | None = None,
    placement: Placement = ON_CPU,
    frozen_base_bits: int | None = None,
    local_files_only: bool = False,
    bases: SharedBases | None = None,
) -> Party:
    """Load `model` (hub name or folder) for a run and digest it.

    `adapter` is the folder of the LoRA adapter that the run begins from; without it, a fresh one.
    `threads` also sets torch's thread count for this process; `placement` says where the weights
    go, which changes no bit of them; `frozen_base_bits` compresses what a LoRA run leaves frozen
    (see `compress_frozen`), after it was digested. `bases` are those that parties with an adapter
    may have in common; a compressed one is a party's own. Raises `ModelError`, `ConfigError`.
    """
    if adapter is not None and config.lora is None:
        raise ConfigError(
            "adapter: this run trains no adapter; leave it out, or begin a run with lora."
        )
    if frozen_base_bits is not None:
        check_compressible(has_adapter=config.lora is not None, placement=placement)
    base_form = _compressed_form(config, frozen_base_bits)
    device = placement.torch_device()
    if threads is not None:
        torch.set_num_threads(threads)
    # Kernels compile on a machine's first use; no round should wait for that.
    distribution = Distribution[config.distribution.upper()]
    rounding = Rounding[config.rounding.upper()]
    trained_dtype = torch.float32 if config.lora else getattr(torch, config.dtype)
    with long_step("compiling kernels"):
        warm_up(device, dtype=trained_dtype, distribution=distribution, rounding=rounding)
    with long_step(f"loading {model}"):
        loaded = load_model(
            model,
            dtype=config.dtype,
            lora=config.lora,
            adapter=adapter,
            train=config.train,
            run_seed=config.seed,
            # Compressing reads the whole base, which the device may have no room for.
            placement=placement if frozen_base_bits is None else ON_CPU,
            local_files_only=local_files_only,
            bases=bases if frozen_base_bits is None else None,
        )
    if loaded.lora is not None:
        config = config.model_copy(update={"lora": loaded.lora})
    warn_of_answers_in_prompts(config.task)
    task = Task(config.task, loaded.tokenizer, _vocabulary_size(loaded))
    weights = Weights(
        loaded.model,
        loaded.manifest,
        distribution=distribution,
        rounding=rounding,
        threads=threads,
        keeps_base=config.seed_policy == "pool",
        base_folder=placement.offload_folder,
    )
    parts = task.tokenizer_parts() if config.task.columns_are_plain else ()
    with long_step(f"digesting {model}"):
        digest = base_digest(loaded.model, threads=threads)
    party = Party(
        config=config,
        loaded=loaded,
        task=task,
        weights=weights,
        manifest_digest=loaded.manifest.digest(),
        base_digest=digest,
        tokenizer_digest=digest_of_parts(parts) if parts else tokenizer_digest(loaded.tokenizer),
        tokenizer_parts=parts,
        base_form=base_form,
    )
    if frozen_base_bits is not None:
        compress_frozen(loaded.model, loaded.manifest, frozen_base_bits, device)
    return party


def _compressed_form(config: RunConfig, frozen_base_bits: int | None) -> str:
    """The form of a base compressed to so many bits; empty where the run leaves that to parties."""
    if frozen_base_bits is None or not config.base_forms:
        return ""
    form = f"{frozen_base_bits}-bit"
    if form not in config.base_forms:
        raise ConfigError(
            f"frozen_base_bits = {frozen_base_bits}: the run admits the base itself and "
            f"{', '.join(config.base_forms)}, not {form}; leave it out, or begin a run whose "
            f"base_forms names {form}."
        )
    return form


def _vocabulary_size(loaded: LoadedModel) -> int:
    embeddings = loaded.model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])
