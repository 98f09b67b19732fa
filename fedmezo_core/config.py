"""The contract of a run, `RunConfig`: all parties agree on it, and the genesis record holds it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from fedmezo_core.errors import ConfigError

PROTOCOL_VERSION = 1
"""The only protocol version of this release (`fedmezo.v1`)."""

BASE_FORM_PATTERN = r"^(8-bit|4-bit|(onnx|gguf):[0-9a-f]{64})$"
"""Pattern of the names of a base's forms; see `Genesis.form_digest`."""

OBJECTIVE_PATTERN = r"^([A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*|[a-z0-9][a-z0-9-]{0,63})?$"
"""Pattern of an objective: module:function, or the name that a package registers for one."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"
"""Pattern of the names of runs and workers, which appear in logs, metrics and file names."""

STEPS_MAX = 4096
"""Most projected gradients in one answer, which then stays below `MESSAGE_BYTES_MAX`."""
PROBES_MAX = 1024
"""Most directions that are measured on one batch."""
COHORT_MAX = 4096
"""Most workers in one round: a slot fits into 16 bits and a commit into one message."""
MESSAGE_BYTES_MAX = 64 * 1024
"""Largest message that a worker may send, in bytes."""
COMMIT_PAIRS_MAX = 262_144
"""Most pairs in one commit (1 MiB of coefficients)."""
STALENESS_MAX = 256
"""Greatest age of an answer in rounds; far below the commits that may wait for a measurement."""
HELD_PAIRS_MAX = 8 * COMMIT_PAIRS_MAX
"""Most pairs in the rounds that a coordinator remembers for late answers (64 MiB)."""
POOL_SIZE_MAX = 65_536
"""Most seeds in a pool; the low 16 bits of a first seed are zero."""
TEMPLATE_CHARS_MAX = 65_536
"""Most characters of a template."""
COLUMN_USES_MAX = 256
"""Most columns in a template, each as often as it stands there: prompts are no longer than this
many times a row."""
VERBALIZERS_MAX = 10_000
"""Most labels of a task."""
TEXT_CHARS_MAX = 1024 * 1024
"""Most characters of all names and texts of a contract together, which then fits into a message."""

CLIP_MEDIAN_FACTOR = 1.0
"""`clip_median_factor` of a new run that does not choose another."""
CLIP_SPREAD = 1.0
"""`clip_spread` of a new run that does not choose another."""
CLIP_DROP_FACTOR = 5.0
"""`clip_drop_factor` of a new run that does not choose another."""
SECURE_COHORT_MAX = 512
"""Most workers in a sum that hides its terms: one's shares for all others fit into a message."""
SECURE_CLIP = 100.0
"""`projected_grad_abs_max` of a new run with `secure_aggregation` that does not choose another."""
RATE_MAX = 1e9
"""Greatest `learning_rate` of a new run."""
RATE_DIRECTIONS = 64
"""`rate_directions` of a new run that does not choose another."""

ALL_LINEAR = "all-linear"
"""peft's name for a LoRA adapter on every linear layer except the head."""
LAST_UP = "last-up"
"""As the only target module of a new run: the up-projection of the last block's MLP. The contract
then holds the layer's own name in the run's model."""
LAST_DOWN = "last-down"
"""In the same way, the down-projection of the last block's MLP."""
DEEP_UP = "deep-up"
"""In the same way, the up-projections of the last third of the blocks but for the last two."""
DEEP_VALUES = "deep-values"
"""In the same way, the value projections of the attention in those blocks."""
PLACES = (LAST_UP, LAST_DOWN, DEEP_UP, DEEP_VALUES)
"""All words for places."""

NEWEST_TEMPLATE_VERSION = 3
"""The `TaskConfig.template_version` of new runs."""
WALK_LENGTHS = {"fitted": 0.12, "adapter": 0.01, "modules": 0.015, "all": 0.004}
"""How far the random walk of a run may move each trained element, by what is trained.

fitted: B of an adapter whose A stays as it is; adapter: a whole adapter; modules: those in `train`;
all: everything. Where a contract has no learning rate, this gives it (decision 0028).
"""
_SQUARES = {"constant": 1.0, "linear": 1 / 3, "cosine": 3 / 8}
"""Mean squared factor of each schedule that falls to 0."""

_PLAIN_COLUMN = re.compile(r"\{([A-Za-z_][A-Za-z0-9_ ]*)\}")
_COLUMN_NAME = re.compile(r"(?!\s)[\w .\x80-\U0010ffff-]+(?<!\s)")
_BRACES = re.compile(
    r"(?P<text>(?:[^{}]|\{\{|\}\})+)|\{(?P<column>[^{}]*)\}|(?P<stray>[{}])", re.DOTALL
)

_SHOWN_CHARS_MAX = 200
"""Most characters of a value in a message."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskConfig(_Frozen):
    """How a row of data becomes a prompt and a loss."""

    kind: Literal["classification", "instruction"] = "classification"
    template: str = Field(
        default="{text}",
        max_length=TEMPLATE_CHARS_MAX,
        description="The prompt; {column} stands for the row's value.",
    )
    template_version: int = Field(
        default=1,
        ge=1,
        le=NEWEST_TEMPLATE_VERSION,
        description="How rows become tokens; new runs take the newest, 3.",
    )
    label_column: str = Field(
        default="label", max_length=1024, description="Column with the class (classification)."
    )
    verbalizers: dict[str, str] = Field(
        default_factory=dict,
        max_length=VERBALIZERS_MAX,
        description="Class as written in the data -> word that the model should answer.",
    )
    response_column: str = Field(
        default="response",
        max_length=1024,
        description="Column with the wanted answer (instruction).",
    )
    tokens_max: int = Field(default=256, ge=8, le=131_072)
    objective: str = Field(
        default="",
        max_length=1024,
        pattern=OBJECTIVE_PATTERN,
        description="What scores a batch instead of the loss, by its name or as module:function; "
        "lower is better.",
    )
    generated_tokens_max: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Tokens generated for each prompt, which the objective scores; 0: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        uses = len(self.template_parts()) // 2  # Raises `ValueError` for braces without a column.
        if not uses:
            raise ValueError(
                f"template {_shortened(self.template)} names no column; write one as {{text}}"
            )
        if uses > COLUMN_USES_MAX:
            raise ValueError(
                f"template {_shortened(self.template)} names columns {uses} times; the most is "
                f"{COLUMN_USES_MAX}"
            )
        if self.kind == "classification" and len(self.verbalizers) < 2:
            raise ValueError(
                "classification needs at least two verbalizers, "
                'for example {"negative" = " terrible", "positive" = " great"}'
            )
        if self.generated_tokens_max and not self.objective:
            raise ValueError(
                "generated_tokens_max needs an objective that scores the tokens; name one, or set "
                "it to 0"
            )
        return self

    def template_parts(self) -> list[str]:
        """The template in parts: text at even indices, names of columns at odd ones.

        Version 1 takes only `{plain_name}` as a column, and all other braces as text. From version
        2 on all braces hold a column, and `{{` and `}}` are braces of the text; raises `ValueError`
        for braces that hold no name.
        """
        if self.template_version == 1:
            return _PLAIN_COLUMN.split(self.template)
        parts = [""]
        for match in _BRACES.finditer(self.template):
            text, column, stray = match.group("text", "column", "stray")
            if stray is not None or (column is not None and not _COLUMN_NAME.fullmatch(column)):
                raise ValueError(
                    f"template {_shortened(self.template)} holds "
                    f"{repr(match.group()[:_SHOWN_CHARS_MAX])[1:-1]}, which names no column; a "
                    "name has letters, digits, spaces, dots, - and _, and a brace of the text is "
                    "written twice: {{ or }}"
                )
            if column is None:
                parts[-1] += text.replace("{{", "{").replace("}}", "}")
            else:
                parts += [column, ""]
        return parts

    @property
    def columns_are_plain(self) -> bool:
        """Whether the text of a column is only text: no control token, no `5.0` for a number 5.

        From version 3 on. Prompts also begin once, verbalizers are compared at the first token in
        which they differ, and the tokenizer's digest holds only what can change a loss.
        """
        return self.template_version >= 3

    def columns(self) -> tuple[str, ...]:
        """Columns that the template names, in the order of their first use."""
        return tuple(dict.fromkeys(self.template_parts()[1::2]))

    @property
    def holds_its_answer(self) -> bool:
        """Whether the template names the column with the answer, so that prompts give it away."""
        return self.answer_column in self.columns()

    @property
    def answer_column(self) -> str:
        """Name of the column that holds a row's label or response."""
        return self.label_column if self.kind == "classification" else self.response_column

    @property
    def data_columns(self) -> tuple[str, ...]:
        """Columns that the data must have: those that the template names, and the answer's."""
        return tuple(dict.fromkeys([*self.columns(), self.answer_column]))


class LoraConfig(_Frozen):
    """Train a LoRA adapter (Hu et al. 2021, peft's format) instead of all parameters."""

    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: tuple[Annotated[str, Field(max_length=4096)], ...] = Field(
        min_length=1,
        max_length=4096,
        description="Names of modules or their ends; or one regular expression; or all-linear; or, "
        f"in a new run, {', '.join(PLACES[:-1])} or {PLACES[-1]}.",
    )
    freeze_a: bool = Field(
        default=False,
        description="Train only B and keep A as it begins (LoRA-FA), for example fitted to texts.",
    )
    output_rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Make B of a fixed P [outputs, output_rank] and C [output_rank, rank], and "
        "train only C (as LoRA-XS), for example with a P fitted to texts; needs freeze_a.",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_output_rank(self) -> LoraConfig:
        if self.output_rank is not None and not self.freeze_a:
            raise ValueError(
                f"output_rank = {self.output_rank} trains C alone; set freeze_a = true too, or "
                "leave out output_rank"
            )
        return self

    @property
    def target_expression(self) -> str | None:
        """`ALL_LINEAR` or a regular expression, which peft takes as a string; None for a list.

        Names of modules consist of letters, digits, `_`, `-` and dots. A single item with any other
        character is an expression, which must match a module's whole name.
        """
        first = self.target_modules[0]
        if len(self.target_modules) > 1 or (
            first != ALL_LINEAR and re.fullmatch(r"[\w.-]+", first)
        ):
            return None
        return first


def is_folder_name(model: str) -> bool:
    """Whether a contract's `model` names a folder of its coordinator, as far as the name shows.

    A model on the hub is `owner/name`, but for a few old ones.
    """
    return "/" not in model


def how_to_name_a_copy(model: str) -> str:
    """What the operator of a worker does to give it its own copy of a run's `model`."""
    # TOML quotes in the same way, but for characters that JSON writes as two.
    key = json.dumps(model, ensure_ascii=not model.isprintable())
    return f'{key} = "FOLDER" under [models] in the worker\'s settings, or --model FOLDER'


class RunConfig(_Frozen):
    """The run's contract; every party computes with exactly these values."""

    run_id: Name
    model: str = Field(
        min_length=1, max_length=4096, description="Hugging Face name, or a folder's name."
    )
    task: TaskConfig
    lora: LoraConfig | None = None
    seed: Seed = 1
    rounds: int = Field(default=100, ge=1, le=10_000_000)
    local_steps: int = Field(default=10, ge=1, le=STEPS_MAX)
    probes: int = Field(
        default=1,
        ge=1,
        le=PROBES_MAX,
        description="Directions measured on each batch; a step averages over them.",
    )
    estimator: Literal["two_sided", "one_sided"] = Field(
        default="two_sided",
        description="Where losses are measured: at W + eps z and W - eps z, or at W + eps z and W.",
    )
    batch_size: int = Field(default=16, ge=1, le=65_536)
    distribution: Literal["rademacher", "gaussian", "low_rank_1", "low_rank_2", "low_rank_4"] = (
        "rademacher"
    )
    eps: PositiveFloat = 1e-3
    learning_rate: PositiveFloat = 1e-6
    rate_directions: int = Field(
        default=0,
        ge=0,
        le=COMMIT_PAIRS_MAX,
        description="Directions of a commit that learning_rate is for; more make a longer step, "
        "fewer a shorter one; 0: all steps are alike.",
    )
    projected_grad_abs_max: PositiveFloat = Field(
        default=1e4, description="The clip: workers clamp to it; larger values are refused."
    )
    clip_median_factor: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Larger answers than this many times the usual size are scaled down; 0: none.",
    )
    clip_spread: float = Field(
        default=4.0,
        ge=0,
        allow_inf_nan=False,
        description="Answers of n projected gradients may be 1 + this / n times as large.",
    )
    clip_drop_factor: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Times clip_median_factor: larger answers than that many times the usual size "
        "count as zeros; 0: none.",
    )
    aggregation: Literal["mean", "trimmed_mean", "median", "sign_vote"] = Field(
        default="mean",
        description="How answers along the same directions become one (seed_policy shared).",
    )
    trimmed_share: float = Field(
        default=0.2,
        ge=0,
        lt=0.5,
        description="Share of the answers that a trimmed mean leaves out at either end.",
    )
    normalized_step: bool = Field(
        default=False,
        description="Divide projected gradients by their root mean square before the step (FZOO).",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the learning rate falls over the rounds."
    )
    warmup_rounds: int = Field(
        default=0, ge=0, description="Rounds over which the learning rate rises at first."
    )
    final_rate_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Learning rate at the end of the schedule, as a fraction of learning_rate.",
    )
    eps_follows_rate: bool = Field(
        default=False, description="Let eps rise and fall with the learning rate's schedule."
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Times learning_rate: the part of every weight that a local step removes.",
    )
    weighting: Literal["uniform", "rows"] = Field(
        default="uniform",
        description="How answers are averaged: equally, or by each worker's count of rows.",
    )
    personal_rate: Literal["frozen", "last_loss", "mean_loss", "update_distance", "random"] = Field(
        default="frozen",
        description="What a worker's own learning rate follows (FedMeZO, proposition 3.7).",
    )
    personal_rate_amplitude: PositiveFloat | None = Field(
        default=None,
        description="Greatest difference from learning_rate; by default half of learning_rate.",
    )
    seed_policy: Literal["per_worker", "shared", "pool"] = Field(
        default="per_worker",
        description="Directions: each worker's own, one set a round, or from one pool for the run.",
    )
    pool_size: int = Field(default=1024, ge=1, le=POOL_SIZE_MAX, description="Seeds in the pool.")
    pool_sampling: Literal["uniform", "weighted"] = Field(
        default="uniform",
        description="Seeds are drawn uniformly, or by the size of their projected gradients.",
    )
    rebase_every_rounds: int = Field(
        default=64,
        ge=1,
        le=1_000_000,
        description="Rounds between two commits of a pool run that start from the base.",
    )
    train: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        default=(),
        max_length=4096,
        description="Names of the modules whose own parameters are trained; empty: all.",
    )
    base_forms: tuple[Annotated[str, Field(pattern=BASE_FORM_PATTERN)], ...] = Field(
        default=(),
        max_length=64,
        description="Forms of the base that workers may measure with beside the base itself.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    journal_readers: Literal["everyone", "observers"] = Field(
        default="everyone",
        description="Who reads answers, losses and names: everyone, or observers and operators.",
    )
    data_set: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,63})?$")] = Field(
        default="",
        description="Name of the data set that workers take part with; empty: whichever they have.",
    )
    workers_min: int = Field(
        default=1, ge=1, le=COHORT_MAX, description="Workers ready before a round opens."
    )
    quorum: int = Field(default=1, ge=1, le=COHORT_MAX, description="Fewest answers to commit.")
    cohort_size_max: int = Field(default=64, ge=1, le=COHORT_MAX)
    buffer_answers: int = Field(
        default=0,
        ge=0,
        le=COHORT_MAX,
        description="A round commits with this many answers, new or late; 0: those of the round.",
    )
    staleness_max_rounds: int = Field(
        default=10,
        ge=0,
        le=STALENESS_MAX,
        description="With buffer_answers: greatest age of an answer that is taken, in rounds.",
    )
    staleness_exponent: float = Field(
        default=0.5,
        ge=0,
        le=100,
        description="With buffer_answers: an answer of age s has weight (1 + s)^-this (FedBuff).",
    )
    secure_aggregation: bool = Field(
        default=False,
        description="The coordinator learns the sum of a round's answers and no single one of them "
        "(seed_policy shared).",
    )
    secure_cohort_min: int = Field(
        default=3,
        ge=3,
        le=SECURE_COHORT_MAX,
        description="With secure_aggregation: fewest workers in a sum.",
    )
    secure_threshold_percent: int = Field(
        default=66,
        ge=50,
        le=99,
        description="With secure_aggregation: more than this part of the workers unmask a sum.",
    )
    deadline_ms: int = Field(default=600_000, ge=100, le=7 * 24 * 3600 * 1000)
    digest_every_rounds: int = Field(default=1, ge=1, le=1_000_000)
    report_losses: bool = Field(
        default=False, description="Let each answer carry the mean loss over its batches."
    )
    pause_loss_factor: float = Field(
        default=3.0,
        gt=1,
        allow_inf_nan=False,
        description="The run pauses when its loss stays above its first loss times this ...",
    )
    pause_rounds: int = Field(default=5, ge=0, description="... for this many rounds; 0: never.")
    early_stop_evaluations: int = Field(
        default=0,
        ge=0,
        description="The run ends after this many evaluations without a better loss; 0: never.",
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        task, targets = self.task, () if self.lora is None else self.lora.target_modules
        words = [*task.verbalizers.keys(), *task.verbalizers.values(), *targets, *self.train]
        characters = sum(map(len, [self.model, task.template, task.objective, *words]))
        if characters > TEXT_CHARS_MAX:
            raise ValueError(
                f"the run's names and texts have {characters} characters together; the most is "
                f"{TEXT_CHARS_MAX}, so name fewer modules or verbalizers"
            )
        if self.train and self.lora is not None:
            raise ValueError(
                "train and lora exclude each other: an adapter is all that a run with lora trains; "
                "name its modules in lora.target_modules"
            )
        if self.personal_rate in ("last_loss", "mean_loss") and not self.report_losses:
            raise ValueError(
                f"personal_rate {self.personal_rate!r} follows the workers' losses; set "
                "report_losses, or choose update_distance, which needs none"
            )
        if self.base_forms and self.lora is None:
            raise ValueError(
                "base_forms are for runs with lora, whose base stays as it is; begin one with "
                "lora, or leave base_forms out"
            )
        if self.rate_amplitude >= self.learning_rate:
            raise ValueError(
                f"personal_rate_amplitude {self.personal_rate_amplitude} would take a learning "
                f"rate to 0 or below; it must be below learning_rate = {self.learning_rate}"
            )
        if 0 < self.clip_median_factor < 1:
            raise ValueError(
                f"clip_median_factor = {self.clip_median_factor:g} would scale down usual answers; "
                "it must be 1 or more, or 0 for none"
            )
        if 0 < self.clip_drop_factor < 1:
            raise ValueError(
                f"clip_drop_factor = {self.clip_drop_factor:g} would drop answers that the clip "
                "allows; it must be 1 or more, or 0 for none"
            )
        if self.aggregation != "mean":
            self._check_aggregation()
        if self.secure_aggregation:
            self._check_secure()
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"learning_rate x weight_decay = {self.learning_rate * self.weight_decay:g} leaves "
                "nothing of the weights; it must be below 1"
            )
        if self.warmup_rounds >= self.rounds:
            raise ValueError(
                f"warmup_rounds {self.warmup_rounds} must be below rounds = {self.rounds}"
            )
        if self.quorum > self.cohort_size_max:
            raise ValueError(
                f"quorum {self.quorum} can never be met by a cohort of at most "
                f"{self.cohort_size_max}; lower quorum or raise cohort_size_max"
            )
        if self.pairs_per_answer > STEPS_MAX:
            raise ValueError(
                f"local_steps x probes = {self.pairs_per_answer} projected gradients in one "
                f"answer; the most is {STEPS_MAX}, so lower local_steps or probes"
            )
        pairs = self.pairs_per_answer * self.answers_max
        if pairs > COMMIT_PAIRS_MAX:
            most = "buffer_answers" if self.buffer_answers else "cohort_size_max"
            raise ValueError(
                f"local_steps x probes x {most} = {pairs} pairs in one round; "
                f"the most is {COMMIT_PAIRS_MAX}, so lower one of the three"
            )
        if self.buffer_answers:
            self._check_buffered(pairs)
        return self

    def _check_aggregation(self) -> None:
        """Refuse what a rule for each direction cannot be combined with."""
        if self.seed_policy != "shared":
            raise ValueError(
                f"aggregation {self.aggregation!r} compares answers along the same directions, "
                f"which workers do not have with seed_policy {self.seed_policy!r}; choose shared, "
                "or aggregation mean, which the clip protects"
            )
        if self.weighting != "uniform" or self.personal_rate != "frozen":
            raise ValueError(
                f"aggregation {self.aggregation!r} counts every answer alike; leave out weighting "
                "and personal_rate, or choose aggregation mean"
            )

    def _check_secure(self) -> None:
        """Refuse what needs single answers, which nobody sees in a run with secure aggregation."""
        single = "secure_aggregation shows the coordinator no single answer, so"
        if self.seed_policy != "shared":
            raise ValueError(
                f"{single} all must be along the same directions; set seed_policy to shared, not "
                f"{self.seed_policy}"
            )
        if self.aggregation != "mean":
            raise ValueError(
                f"{single} aggregation {self.aggregation!r} has nothing to compare; set it to mean"
            )
        if self.clip_median_factor:
            raise ValueError(
                f"{single} clip_median_factor = {self.clip_median_factor:g} has nothing to clip; "
                "set it to 0, and lower projected_grad_abs_max, to which workers clamp"
            )
        if self.report_losses:
            raise ValueError(f"{single} none may carry a loss; set report_losses to false")
        if self.personal_rate != "frozen":
            raise ValueError(
                f"{single} workers have one rate; leave personal_rate {self.personal_rate!r} out"
            )
        if self.weighting != "uniform":
            raise ValueError(f"{single} all count the same; leave weighting {self.weighting!r} out")
        for name in ("workers_min", "quorum"):
            if getattr(self, name) < self.secure_cohort_min:
                raise ValueError(
                    f"{name} = {getattr(self, name)} is too few for secure_aggregation, which adds "
                    f"up at least secure_cohort_min = {self.secure_cohort_min} answers; set it to "
                    f"{self.secure_cohort_min} or more"
                )
        if self.cohort_size_max > SECURE_COHORT_MAX:
            raise ValueError(
                f"cohort_size_max = {self.cohort_size_max} is too many for secure_aggregation, "
                f"which adds up at most {SECURE_COHORT_MAX} answers, because every two workers "
                f"exchange secrets; set it to {SECURE_COHORT_MAX} or less"
            )

    def _check_buffered(self, pairs: int) -> None:
        if self.quorum > self.buffer_answers:
            raise ValueError(
                f"quorum {self.quorum} is more than the buffer_answers = {self.buffer_answers} "
                "that a round commits with; lower quorum or raise buffer_answers"
            )
        if self.seed_policy == "shared":
            raise ValueError(
                "seed_policy 'shared' lets all workers of a round measure along the same "
                "directions, but with buffer_answers rounds overlap; choose per_worker or pool, or "
                "set buffer_answers to 0"
            )
        if self.seed_policy == "pool" and self.pool_sampling == "weighted":
            raise ValueError(
                "pool_sampling 'weighted' uses chances that change with each commit, so the seeds "
                "of a late answer could not be drawn again; choose uniform, or set buffer_answers "
                "to 0"
            )
        held = pairs * (self.staleness_max_rounds + 1)
        if held > HELD_PAIRS_MAX:
            raise ValueError(
                "local_steps x probes x buffer_answers x (staleness_max_rounds + 1) = "
                f"{held} pairs to remember; the most is {HELD_PAIRS_MAX}, so lower one of the four"
            )

    @property
    def pairs_per_answer(self) -> int:
        """Count of projected gradients in one answer; each becomes one pair of the commit."""
        return self.local_steps * self.probes

    @property
    def scalars_per_answer(self) -> int:
        """Count of projected gradients that an answer carries in the clear."""
        return 0 if self.secure_aggregation else self.pairs_per_answer

    def sum_threshold(self, members: int) -> int:
        """How many of an attempt's members it takes to unmask its sum; more than half of them."""
        return members * self.secure_threshold_percent // 100 + 1

    @property
    def answers_max(self) -> int:
        """Most answers in one commit."""
        return self.buffer_answers or self.cohort_size_max

    @property
    def staleness_max(self) -> int:
        """Greatest age of an answer at its commit, in rounds; 0 in a synchronous run."""
        return self.staleness_max_rounds if self.buffer_answers else 0

    @property
    def fit_reads_answers(self) -> bool:
        """Whether a fit of the run's adapter takes a row's answer, and not its prompt alone."""
        has_factors = self.lora is not None and self.lora.output_rank is not None
        return self.task.kind == "instruction" or has_factors

    @property
    def workers_expected(self) -> int:
        """Workers that a rate is chosen for where nobody says how many will come."""
        return max(self.workers_min, self.quorum)

    @property
    def default_rate(self) -> float:
        """A learning rate of normalised steps that is sound where nobody has measured a better one.

        Each trained element then walks by one of `WALK_LENGTHS` over the run.
        """
        trained = "modules" if self.train else "all"
        if self.lora is not None:
            trained = "fitted" if self.lora.freeze_a else "adapter"
        return self.rate_of_walk(WALK_LENGTHS[trained])

    def rate_of_walk(self, length: float) -> float:
        """The rate of normalised steps at which each trained element walks by `length` over a run.

        That is for the expected workers. More workers than it takes for `rate_directions` do not
        change the rate: they make longer steps.
        """
        workers = 1 if self.seed_policy == "shared" else self.workers_expected
        # A factor is last + (1 - last) * shape, and the shapes that fall to 0 have a mean of 1/2.
        last = self.final_rate_fraction
        square = last**2 + last * (1 - last) + (1 - last) ** 2 * _SQUARES[self.schedule]
        steps = self.rounds * self.local_steps * (1 if self.schedule == "constant" else square)
        directions = self.probes * workers
        longer = 1.0
        if self.rate_directions:
            directions = min(directions, self.rate_directions)
            longer = self.rate_directions / directions
        rate = length * math.sqrt(directions / steps) * longer
        return float(f"{rate:.2g}")

    @property
    def rate_amplitude(self) -> float:
        """Greatest difference of a worker's own rate from `learning_rate`; 0 if it has none."""
        if self.personal_rate == "frozen":
            return 0.0
        return self.personal_rate_amplitude or self.learning_rate / 2

    @property
    def recipe(self) -> str:
        """The numeric recipe: parties whose recipes differ would not compute the same bits.

        A newer feature is named only in runs that use it. So older parties still agree with newer
        ones on all other runs, and differ on those.
        """
        recipe = (
            f"fedmezo-1 philox4x32-10 {self.distribution} {self.dtype} {self.rounding} "
            f"eps={self.eps!r}"
        )
        if self.probes > 1:
            recipe += f" probes={self.probes}"
        if self.estimator != "two_sided":
            recipe += f" {self.estimator}"
        if self.normalized_step:
            recipe += " normalized"
        if self.rate_directions and self.local_steps > 1:
            recipe += f" rate_directions={self.rate_directions}"
        if self.weight_decay:
            recipe += " decay"
        if self.seed_policy == "pool":
            recipe += " pool"
        if self.buffer_answers:
            recipe += " buffered"
        if self.secure_aggregation:
            recipe += " secure"
        if self.task.template_version != 1:
            recipe += f" template={self.task.template_version}"
        if self.task.objective:
            recipe += f" objective={self.task.objective}"
        return recipe


def _check_no_booleans(
    values: Mapping[str, Any], kind: type[BaseModel], where: str, prefix: str = ""
) -> None:
    """Refuse true and false where a number stands; pydantic takes them for 1 and 0."""
    for key, value in values.items():
        field = kind.model_fields.get(key)
        if field is None:
            continue
        table = _table_in(field.annotation)
        if isinstance(value, Mapping) and table is not None:
            _check_no_booleans(value, table, where, f"{prefix}{key}.")
        elif isinstance(value, bool) and _is_number(field.annotation):
            raise ConfigError(
                f"{where}: {prefix}{key} = {str(value).lower()} is not allowed: use a number."
            )


def _is_number(annotation: object) -> bool:
    """Whether a type is that of numbers alone, or of none."""
    parts = [part for part in get_args(annotation) if part is not type(None)] or [annotation]
    return all(part in (int, float) for part in parts)


def sentence_of(
    error: ValidationError,
    where: str,
    prefix: Sequence[str] = (),
    kind: type[BaseModel] | None = None,
) -> str:
    """One sentence: the first unknown key, else all missing keys, else the first other problem.

    It names the key, the given value and what is allowed. `where` is the file that the value comes
    from, or empty, and `prefix` the path to the validated part. With `kind`, the model that was
    asked for, it says which known key is nearest to an unknown one.
    """
    problems = error.errors(include_url=False)
    # Unknown keys come first: a misspelt one is a usual cause of a missing one.
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    missing = [_key_of(problem, prefix) for problem in problems if problem["type"] == "missing"]
    rest = len(problems) - (1 if unknown else len(missing) or 1)
    more = f" ({rest} more after this one)" if rest else ""
    start = f"{where}: " if where else ""
    if unknown:
        near = None if kind is None else _nearest_key(unknown[0]["loc"], kind)
        remedy = f"write {near}, or remove it" if near else "remove it or check its spelling"
        return f"{start}{_key_of(unknown[0], prefix)} is not a known setting; {remedy}{more}."
    if missing:
        names = " and ".join([", ".join(missing[:-1])] * (len(missing) > 1) + missing[-1:])
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        return f"{start}{names} {are} missing; set {them}{more}."
    problem = problems[0]
    key = _key_of(problem, prefix)
    message = _allowed(problem)
    if not key:
        return f"{start}{message}{more}."
    given = problem.get("input")
    shown = f" = {_shortened(given)}" if isinstance(given, (str, int, float, bool)) else ""
    return f"{start}{key}{shown} is not allowed: {message}{more}."


def _nearest_key(place: tuple[int | str, ...], kind: type[BaseModel]) -> str | None:
    """The key of `kind`, or of the table in it, that is spelt most like the one at `place`."""
    for part in place[:-1]:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue  # A name within a table of tables.
        inner = _table_in(field.annotation)
        if inner is None:
            return None
        kind = inner
    near = get_close_matches(str(place[-1])[:_SHOWN_CHARS_MAX], kind.model_fields, n=1)
    return near[0] if near else None


def _table_in(annotation: object) -> type[BaseModel] | None:
    """The kind of the table in a type such as `Table | None` or `dict[str, Table]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_in(part))), None)


def _shortened(value: str | float) -> str:
    """A value as it is written in code, or its beginning if it is long."""
    written = repr(value)
    is_long = len(written) > _SHOWN_CHARS_MAX
    return f"{written[:_SHOWN_CHARS_MAX]} ..." if is_long else written


def _key_of(problem: ErrorDetails, prefix: Sequence[str]) -> str:
    # Some kinds of values have no word of their own on the path to them.
    return ".".join(_shown_part(str(part)) for part in [*prefix, *problem["loc"]] if part != "")


def _shown_part(part: str) -> str:
    """A part of a key as it is, or as code if it is long or has characters that do not print."""
    is_plain = part.isprintable() and len(part) <= _SHOWN_CHARS_MAX
    return part if is_plain else _shortened(part)


_ALLOWED = {
    "bool_parsing": "use true or false",
    "bool_type": "use true or false",
    "byte_size": "use a number of bytes, as in 8GiB",
    "byte_size_unit": "use a number of bytes, as in 8GiB",
    "dict_type": "use a table of keys and values",
    "finite_number": "use a number that is finite",
    "float_parsing": "use a number",
    "float_type": "use a number",
    "greater_than": "use more than {gt}",
    "greater_than_equal": "use {ge} or more",
    "int_from_float": "use a whole number",
    "int_parsing": "use a whole number",
    "int_parsing_size": "use a whole number of fewer digits",
    "int_type": "use a whole number",
    "less_than": "use less than {lt}",
    "less_than_equal": "use {le} or less",
    "literal_error": "use {expected}",
    "model_type": "use a table of keys and values",
    "path_type": "use the path of a file or folder",
    "string_pattern_mismatch": "it must match {pattern}",
    "string_too_long": "use at most {max_length} characters",
    "string_too_short": "use at least {min_length} characters",
    "string_type": "use text, in quotes",
    "too_long": "use at most {max_length} items",
    "too_short": "use at least {min_length} items",
    "tuple_type": "use a list",
    "value_error": "{error}",
}
"""What is allowed, for pydantic's types of errors; keys in braces are those of its contexts."""


def _allowed(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    if context.get("min_length") == 1:
        return "it must not be empty"
    words = _ALLOWED.get(problem["type"])
    return problem["msg"] if words is None else words.format(**context)


def _default_aggregation(values: Mapping[str, Any]) -> str:
    """How a new run combines answers along the same directions, where its settings do not say."""
    counts_alike = not values.keys() & {"weighting", "personal_rate"}
    is_shared = values.get("seed_policy") == "shared"
    return "trimmed_mean" if is_shared and counts_alike else "mean"


def asks_for_sums(values: Mapping[str, Any]) -> bool:
    """Whether a contract's values, perhaps from the environment, ask for secure aggregation."""
    return values.get("secure_aggregation") in (True, "true")


def _secure_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a new run with secure aggregation needs, where its settings do not say."""
    fewest = values.get("secure_cohort_min", 3)
    return {
        "seed_policy": "shared",
        "aggregation": "mean",
        "clip_median_factor": 0.0,
        "projected_grad_abs_max": SECURE_CLIP,
        "workers_min": fewest,
        "quorum": fewest,
    }


def parse_run(
    values: dict[str, Any],
    where: str,
    begun: RunConfig | None = None,
    *,
    rate_comes_later: bool = False,
    walk_length: float | None = None,
) -> RunConfig:
    """The contract in `values`; raises a `ConfigError` with key, value and what is allowed.

    A new run reads rows by the newest version, its answers are clipped by the usual size, those
    along the same directions are trimmed, and its steps grow with the directions of a commit. One
    with secure aggregation gets what that needs. Its template may not give the answer away unless
    an objective scores the run. Without a learning rate it takes normalised steps of its
    `default_rate`. With `begun`, the contract of the run that `values` describe again, that run's
    version, clip, aggregation and steps stay and nothing of this is checked. With
    `rate_comes_later`, plain steps may lack a rate too: `default_rate` holds its place.
    `walk_length`, if given, takes the place of the one of `WALK_LENGTHS`.
    """
    newer = {
        "clip_median_factor": CLIP_MEDIAN_FACTOR,
        "clip_spread": CLIP_SPREAD,
        "clip_drop_factor": CLIP_DROP_FACTOR,
        "rate_directions": RATE_DIRECTIONS,
        "aggregation": _default_aggregation(values),
    }
    if asks_for_sums(values):
        newer |= _secure_defaults(values)
    if begun:
        newer = {key: getattr(begun, key) for key in newer}
    values = {**newer, **values}
    task = values.get("task")
    if isinstance(task, dict):
        version = begun.task.template_version if begun else NEWEST_TEMPLATE_VERSION
        values = {**values, "task": {"template_version": version, **task}}
    if begun is None:
        _check_no_booleans(values, RunConfig, where)
    has_no_rate = begun is None and "learning_rate" not in values
    # What is compared with the rate waits until there is one.
    waits = ("personal_rate_amplitude", "weight_decay") if has_no_rate else ()
    try:
        config = RunConfig.model_validate({k: v for k, v in values.items() if k not in waits})
        if has_no_rate:
            is_plain = "normalized_step" in values and not config.normalized_step
            if is_plain and not rate_comes_later:
                raise ConfigError(
                    f"{where}: learning_rate is missing, and no rate of plain steps suits two "
                    "tasks; run fedmezo probe to measure one, or leave out normalized_step."
                )
            rate = config.default_rate if walk_length is None else config.rate_of_walk(walk_length)
            own = {"normalized_step": not is_plain, "learning_rate": rate}
            config = RunConfig.model_validate({**values, **own})
    except ValidationError as error:
        raise ConfigError(sentence_of(error, where, kind=RunConfig)) from None
    if begun is None and not config.learning_rate <= RATE_MAX:
        raise ConfigError(
            f"{where}: learning_rate = {config.learning_rate:g} is not allowed: use "
            f"{RATE_MAX:g} or less."
        )
    if begun is None and config.task.holds_its_answer and not config.task.objective:
        raise ConfigError(
            f"{where}: task.template = {_shortened(config.task.template)} is not allowed: it names "
            f"{config.task.answer_column}, the column with the answer, so every prompt would give "
            "its answer away; take that column out of the template."
        )
    return config
