"""One party's copy of a run: its model, task and weights, as workers and replicas have it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, MismatchError
from fedmezo_core.program import long_step
from fedmezo_core.records import Committed, Genesis
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.materialize import warm_up
from fedmezo_core.zo.model.compressed import check_compressible, compress_frozen
from fedmezo_core.zo.model.loading import ON_CPU, LoadedModel, load_model
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.weight_digest import base_digest, tokenizer_digest
from fedmezo_core.zo.noise import Distribution, Rounding
from fedmezo_core.zo.weights import Weights

log = logging.getLogger("fedmezo.party")

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names that models' configurations have for their number of positions."""


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
        element_bytes = torch.finfo(getattr(torch, self.config.dtype)).bits // 8
        elements = self.loaded.manifest.element_count
        return Genesis(
            config=self.config,
            manifest_digest=self.manifest_digest,
            base_digest=self.base_digest,
            tokenizer_digest=self.tokenizer_digest,
            trainable_elements=elements,
            trainable_bytes=elements * element_bytes,
        )

    @property
    def positions_max(self) -> int | None:
        """The most tokens of a row that the model knows positions for; None if it does not say."""
        model_config: Any = self.loaded.model.config
        text_config = model_config.get_text_config()
        for name in _POSITIONS:
            positions = getattr(text_config, name, None)
            if isinstance(positions, int) and positions > 0:
                return positions
        return None

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

    def check_same_base(self, genesis: Genesis) -> None:
        """Refuse to go on from another base than the run's, and say what differs."""
        also = ", and begin from the same adapter, or none" if genesis.config.lora else ""
        for what, digests in genesis.differences(self):
            raise MismatchError(
                f"The {what} loaded here differ from the run's: {digests}; load the same files of "
                f"{genesis.config.model} as the coordinator{also}."
            )


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
) -> Party:
    """Load `model` (hub name or folder) for a run and digest it.

    `adapter` is the folder of the LoRA adapter that the run begins from; without it, a fresh one.
    `threads` also sets torch's thread count for this process; `placement` says where the weights
    go, which changes no bit of them; `frozen_base_bits` compresses what a LoRA run leaves frozen
    (see `compress_frozen`), after it was digested. Raises `ModelError`, `ConfigError`.
    """
    if adapter is not None and config.lora is None:
        raise ConfigError(
            "adapter: this run trains no adapter; leave it out, or begin a run with lora."
        )
    if frozen_base_bits is not None:
        check_compressible(has_adapter=config.lora is not None, placement=placement)
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
        )
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
    with long_step(f"digesting {model}"):
        digest = base_digest(loaded.model, threads=threads)
    party = Party(
        config=config,
        loaded=loaded,
        task=task,
        weights=weights,
        manifest_digest=loaded.manifest.digest(),
        base_digest=digest,
        tokenizer_digest=tokenizer_digest(loaded.tokenizer),
    )
    if frozen_base_bits is not None:
        compress_frozen(loaded.model, loaded.manifest, frozen_base_bits, device)
    return party


def commits_of(records: Sequence[Committed]) -> list[Commit]:
    """The commits of a journal, in its order, as `materialize` takes them."""
    return [
        Commit(
            seeds=np.concatenate(
                [
                    np.uint64(seed_range.first_seed)
                    + np.arange(len(seed_range.coefficients), dtype=np.uint64)
                    for seed_range in record.seed_ranges
                ]
                or [np.empty(0, dtype=np.uint64)]
            ),
            coefficients=np.array(
                [c for seed_range in record.seed_ranges for c in seed_range.coefficients],
                dtype=np.float32,
            ),
            rounding_seed=record.rounding_seed,
            decay=record.decay,
            from_base=record.from_base,
        )
        for record in records
    ]


def _vocabulary_size(loaded: LoadedModel) -> int:
    embeddings = loaded.model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])
