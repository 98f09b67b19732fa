"""What the operator of a worker lets a run ask of this machine; checked before anything loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from fedmezo_core.config import RunConfig, how_to_name_a_copy
from fedmezo_core.errors import PolicyError, SnapshotError
from fedmezo_core.records import Genesis

READY_MADE = ("error-rate", "exact-match", "macro-f1", "token-f1")
"""The objectives that FedMeZO itself registers."""
_HUB_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_SHOWN_CHARS_MAX = 200
_PAIR_BYTES = 4

Count = Annotated[int, Field(ge=1)]


class RunPolicy(BaseModel):
    """Limits on the contracts that a worker serves; the defaults let ordinary runs pass.

    A limit counts what the contract says, in the contract's units.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(
        default=("*",),
        description="without model: hub names that a run may have loaded; * stands for any text",
    )
    base_digests: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = Field(
        default=(), description="digests (64 hex digits) of the bases to work on; none: any base"
    )
    runs: tuple[str, ...] = Field(default=(), description="run ids to work on; none: any run")
    objectives: tuple[str, ...] = Field(
        default=READY_MADE,
        description="objectives that may score this worker's rows, besides the setting objective",
    )
    rounds_max: Count = Field(default=100_000, description="most rounds of a run")
    local_steps_max: Count = Field(default=1024, description="most local steps in a round")
    probes_max: Count = Field(default=256, description="most directions measured on a batch")
    batch_size_min: Count = Field(
        default=1,
        description="fewest rows in a batch, whose mean is all that leaves this machine",
    )
    batch_size_max: Count = Field(default=1024, description="most rows in a batch")
    tokens_max: Count = Field(default=16_384, description="most tokens of a row")
    generated_tokens_max: int = Field(
        default=512, ge=0, description="most tokens generated for a row"
    )
    lora_rank_max: Count = Field(default=256, description="largest rank of an adapter")
    trained_elements_max: Count = Field(default=20_000_000_000, description="most trained elements")
    secure_aggregation: bool = Field(
        default=False, description="work only on runs with secure_aggregation"
    )
    secure_cohort_min: int = Field(
        default=3,
        ge=3,
        le=512,
        description="with secure_aggregation: fewest answers in a sum that this worker takes part "
        "in, so the least that a run may have as its secure_cohort_min",
    )
    disk_max: ByteSize = Field(
        default=ByteSize(16 << 30),
        description="most that each of these may take on the disk: a model from the hub, a "
        "snapshot, the journal copy, and all downloaded adapters together",
    )

    def check(
        self, genesis: Genesis, *, own_model: bool, own_objective: bool, keeps_history: bool = False
    ) -> None:
        """Refuse a run that asks for more than the policy allows; touches no file.

        own_model: this worker's operator has named what is loaded. own_objective: and the function
        that scores batches. keeps_history: the worker keeps a copy of the run's history. Raises
        `PolicyError`, which names the contract's field, its value, the limit and its setting.
        """
        config = genesis.config
        for field, value, key in self._counts(genesis):
            limit = getattr(self, key)
            if value > limit:
                raise PolicyError(
                    f"The run's {field} = {value} is more than the {limit} that this worker "
                    f"allows; take part in another run, or raise policy.{key} in its settings."
                )
        if config.batch_size < self.batch_size_min:
            raise PolicyError(
                f"The run's batch_size = {config.batch_size} is less than the "
                f"{self.batch_size_min} that this worker requires; take part in another run, or "
                "lower policy.batch_size_min in its settings."
            )
        self._check_sums(config)
        if self.runs and config.run_id not in self.runs:
            raise _not_listed("run_id", config.run_id, "runs")
        if self.base_digests and genesis.base_digest.hex() not in self.base_digests:
            raise _not_listed("base digest", genesis.base_digest.hex(), "base_digests")
        if not own_model:
            self._check_model(config.model)
        wanted = config.task.objective
        if wanted and not own_objective and wanted not in self.objectives:
            raise PolicyError(
                f"The run scores batches by {wanted}; start this worker with --objective {wanted} "
                "if you trust that code, or add it to policy.objectives in its settings."
            )
        if keeps_history and (needed := history_bytes(config)) > self.disk_max:
            raise PolicyError(
                f"The history of the run's {config.rounds} rounds may take {needed} bytes, more "
                f"than the {int(self.disk_max)} that this worker allows; leave out journal_copy, "
                "or raise policy.disk_max in its settings."
            )

    def _check_sums(self, config: RunConfig) -> None:
        if self.secure_aggregation and not config.secure_aggregation:
            raise PolicyError(
                "The run has secure_aggregation = false, and this worker shows its numbers to no "
                "coordinator; take part in another run, or set policy.secure_aggregation = false "
                "in its settings."
            )
        if config.secure_aggregation and config.secure_cohort_min < self.secure_cohort_min:
            raise PolicyError(
                f"The run's secure_cohort_min = {config.secure_cohort_min} is less than the "
                f"{self.secure_cohort_min} that this worker requires; take part in another run, or "
                "lower policy.secure_cohort_min in its settings."
            )

    def check_trained(self, elements: int) -> None:
        """Refuse what was loaded if it has more trained elements than its genesis may say."""
        if elements > self.trained_elements_max:
            raise PolicyError(
                f"The run trains {elements} elements, more than the {self.trained_elements_max} "
                "that this worker allows; take part in another run, or raise "
                "policy.trained_elements_max in its settings."
            )

    def check_snapshot(self, file_bytes: int) -> None:
        """Raise `SnapshotError` for a snapshot that is too large to be written here."""
        if file_bytes > self.disk_max:
            raise SnapshotError(
                f"The newest snapshot has {file_bytes} bytes, more than the {int(self.disk_max)} "
                "that this worker allows; raise policy.disk_max in its settings."
            )

    def _counts(self, genesis: Genesis) -> Iterator[tuple[str, int, str]]:
        """Fields of a contract with their values and the settings that limit them."""
        config, task = genesis.config, genesis.config.task
        yield "rounds", config.rounds, "rounds_max"
        yield "local_steps", config.local_steps, "local_steps_max"
        yield "probes", config.probes, "probes_max"
        yield "batch_size", config.batch_size, "batch_size_max"
        yield "task.tokens_max", task.tokens_max, "tokens_max"
        yield "task.generated_tokens_max", task.generated_tokens_max, "generated_tokens_max"
        if config.lora is not None:
            rank = max(config.lora.rank, config.lora.output_rank or 0)
            yield "lora.rank", rank, "lora_rank_max"
        yield "number of trained elements", genesis.trainable_elements, "trained_elements_max"

    def _check_model(self, name: str) -> None:
        if not is_hub_name(name):
            shown = name[:_SHOWN_CHARS_MAX]
            raise PolicyError(
                f"The run's model = {shown!r} is no name on the hub, and a coordinator chooses no "
                f"folder here; name this worker's own copy: {how_to_name_a_copy(shown)}."
            )
        if not any(fnmatchcase(name, pattern) for pattern in self.models):
            raise PolicyError(
                f"The run's model = {name!r} is not one that this worker loads by its name "
                f"(policy.models = {list(self.models)}); add it to policy.models in the worker's "
                f"settings, or name its own copy: {how_to_name_a_copy(name)}."
            )


def is_hub_name(name: str) -> bool:
    """Whether `name` can only mean a model on the hub: `owner/name` or `name`, without `..`."""
    return bool(_HUB_NAME.fullmatch(name)) and ".." not in name


def history_bytes(config: RunConfig) -> int:
    """The most bytes of the coefficients of a run's commits."""
    pairs = config.pairs_per_answer
    if config.seed_policy != "shared":
        pairs *= config.answers_max
    return config.rounds * pairs * _PAIR_BYTES


def _not_listed(field: str, value: str, key: str) -> PolicyError:
    return PolicyError(
        f"The run's {field} = {value} is not among policy.{key} of this worker's settings; take "
        "part in another run, or add it there."
    )
