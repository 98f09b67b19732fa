"""The settings of `fedmezo-worker`: from flags, FEDMEZO_WORKER_* and a TOML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import ByteSize, Field, PrivateAttr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedmezo.run_policy import RunPolicy
from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import (
    ROW_STATES_MAX,
    Address,
    CheckpointKey,
    ProgramSettings,
    UserPath,
    UserPathText,
)
from fedmezo_core.records import Genesis
from fedmezo_core.zo.privacy.accounting import PrivacyBudget
from fedmezo_worker.data_sets import (
    SETTINGS_OF_ROWS,
    Data,
    DataSet,
    check_rows_to_evaluate_on,
    check_whole_budget,
    chosen,
    no_such_data_set,
)

_OF_CONNECTIONS = (
    "coordinator",
    "heldout",
    "evaluate_every_rounds",
    "evaluations",
    "journal_copy",
    "checkpoint_key",
    "download_rate",
    "tls",
    "tls_ca",
    "join",
    "state",
    "give_up_after_s",
    "models_max",
)
"""Settings without a meaning for a worker that others bring the messages to."""


class WorkerSettings(ProgramSettings):
    """A worker of a federated run: measures on its own data, sends only scalars.

    Settings come from flags, then from FEDMEZO_WORKER_* in the environment, then from the TOML file
    that --config names.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMEZO_WORKER_")

    coordinator: Address = Field(
        default="127.0.0.1:7465", description="host:port of the coordinator"
    )
    serve: UserPath | None = Field(
        default=None,
        description="connect to no coordinator: listen on this socket in the file system, where an "
        "app of another stack, such as Flower, brings the coordinator's bytes",
    )
    join: str = Field(
        default="",
        repr=False,
        description="the operator's join string: become a member, the first time, and "
        "connect to the fleet's coordinator",
    )
    state: UserPath | None = Field(
        default=None,
        description="folder for this member's keys and certificate; none: with join, one in "
        "$XDG_STATE_HOME or ~/.local/state",
    )
    name: str = Field(
        default="",
        description="this worker's name, unique in the run: a-z, 0-9 and -; with join, none: the "
        "join string's, or this machine's",
    )
    data: Data = Field(
        description="its private rows: a JSONL, CSV or Parquet file, or a folder of them; in a "
        "TOML file also tables [data.NAME], for runs that ask for a data set by its name"
    )
    columns: dict[str, str] = Field(
        default={},
        description="names that the data has for columns of the run, where they differ: "
        '{"the run\'s": "the data\'s"}',
    )
    heldout: UserPath | None = Field(
        default=None,
        description="rows of its own to evaluate the model on, in files as for data; stays here",
    )
    evaluate_every_rounds: int = Field(
        default=10,
        ge=1,
        description="rounds between two evaluations; base and end are always evaluated",
    )
    evaluations: UserPath | None = Field(
        default=None,
        description="JSONL file that each evaluation is appended to, or a folder for one of each "
        "run",
    )
    model: UserPathText = Field(
        default="", description="model folder or hub name, if not the name that the run gives"
    )
    models: dict[str, UserPath] = Field(
        default={},
        description='model folders for runs of several models: {"name or base digest": "folder"}',
    )
    models_max: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="most runs whose models are loaded at a time; none: as many as the free memory "
        "has room for",
    )
    adapter: UserPath | None = Field(
        default=None,
        description="folder of the adapter (peft's layout) that the run begins from; none: the one "
        "that the coordinator offers, if it does",
    )
    journal_copy: UserPath | None = Field(
        default=None,
        description="file for this worker's own copy of the run's history, or a folder for one of "
        "each run; the run can be rebuilt from it, and after a restart it shows whether the "
        "coordinator's history went back",
    )
    checkpoint_key: CheckpointKey = Field(
        default="",
        description="public key (64 hex digits) that the coordinator must sign with; none: any key",
    )
    run_id: str = Field(
        default="", description="serve this run and end with it; none: what the coordinator offers"
    )
    objective: str = Field(
        default="",
        description="the run's objective, by its name or as module:function: its code runs here, "
        "on these rows",
    )
    policy: RunPolicy = Field(
        default=RunPolicy(), description="what runs may ask of this machine; others are refused"
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads")
    pass_tokens_max: int | None = Field(
        default=None,
        ge=1,
        description="where most of the model is frozen: the largest number of tokens, of all "
        "perturbed copies of a batch, in one pass (default: 680 on a CPU, 2048 on a GPU)",
    )
    row_states_max: ByteSize = Field(
        default=ROW_STATES_MAX,
        description="on a CPU, where most of the model is frozen: the size of a temporary file for "
        "what the frozen part makes of each row, which is then computed once; 0: each time",
    )
    device: str = Field(
        default="auto",
        description="auto (a CUDA device if there is one), cpu, cuda or cuda:1: where to compute",
    )
    device_memory_max: ByteSize | None = Field(
        default=None,
        description="the device's memory that weights may take, as in 8GiB; none: what is free",
    )
    offload_folder: UserPath | None = Field(
        default=None, description="folder on a disk for weights that no memory has room for"
    )
    frozen_base_bits: int | None = Field(
        default=None,
        description="in a run with lora: keep the frozen base in 8 or 4 bits, with bitsandbytes",
    )
    base_form: UserPath | None = Field(
        default=None,
        description="folder that fedmezo export-form has written: measure with ONNX Runtime or "
        "llama.cpp on the form of the base in it, without torch",
    )
    gpu_layers: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="with a GGUF in base_form: layers that a GPU computes, if llama.cpp has one",
    )
    privacy_epsilon: float | None = Field(
        default=None,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="make each measurement differentially private, and leave the run when this "
        "data has given away so much, over all runs that share privacy_ledger",
    )
    privacy_delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="the chance that privacy_epsilon may fail; below 1 / the number of rows",
    )
    privacy_clip: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="with privacy_epsilon: the most that one row may say in one step, as the norm "
        "of its projected gradients; choose it by public rows",
    )
    privacy_ledger: UserPath | None = Field(
        default=None,
        description="with privacy_epsilon: file that records what this data has given away; keep "
        "one for each data set, and never delete it",
    )
    download_rate: ByteSize = Field(
        default=ByteSize(12_500_000),
        description="expected bytes per second of a download; a late worker chooses between "
        "snapshot and journal by it; 0: always the journal",
    )
    tls: bool = Field(
        default=False, description="connect with TLS; without tls_ca, trust the system's CAs"
    )
    tls_ca: UserPath | None = Field(
        default=None, description="PEM file of the CA to trust, instead of the system's, with TLS"
    )
    give_up_after_s: float = Field(
        default=3600.0,
        ge=0,
        description="seconds without a coordinator until the worker ends; a worker that has served "
        "a coordinator of many runs ends only if this is set",
    )

    _run_id: str = PrivateAttr(default="")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value and not re.fullmatch(NAME_PATTERN, value):
            raise ValueError("use 1 to 64 of a-z, 0-9 and -, beginning with a letter or digit")
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
            raise ValueError("use auto, cpu, cuda, or cuda: and the device's number")
        return value

    @field_validator("device_memory_max")
    @classmethod
    def _memory(cls, value: ByteSize | None) -> ByteSize | None:
        if value is not None and value <= 0:
            raise ValueError("use more than 0 bytes, for example 8GiB")
        return value

    @field_validator("frozen_base_bits")
    @classmethod
    def _bits(cls, value: int | None) -> int | None:
        if value not in {None, 4, 8}:
            raise ValueError("use 8 or 4, or leave it out")
        return value

    @model_validator(mode="after")
    def _named(self) -> WorkerSettings:
        if not self.name and not self.is_member:
            raise ValueError("name is missing; set it, or join a fleet with join")
        if self.is_member and (self.tls or self.tls_ca is not None):
            raise ValueError(
                "tls and tls_ca have no meaning with join or state, because the fleet says what to "
                "trust; leave them out"
            )
        if self.join and "coordinator" in self.model_fields_set:
            raise ValueError("coordinator has no meaning with join, which names it; leave it out")
        return self

    @property
    def is_member(self) -> bool:
        """Whether this worker shows an identity."""
        return bool(self.join) or self.state is not None

    @model_validator(mode="after")
    def _only_what_serves(self) -> WorkerSettings:
        if self.serve is None:
            return self
        given = self.model_fields_set | self._given_in_tables()
        unused = [key for key in _OF_CONNECTIONS if key in given]
        if unused:
            raise ValueError(
                f"{unused[0]} has no meaning with serve, because this worker makes no connections "
                "and evaluates nothing; leave it out"
            )
        if not self.model and self.base_form is None:
            raise ValueError(
                "serve needs model or base_form: no coordinator decides what is loaded here"
            )
        return self

    @model_validator(mode="after")
    def _form_instead_of_a_model(self) -> WorkerSettings:
        if self.base_form is not None:
            of_torch = {
                "adapter", "device_memory_max", "frozen_base_bits", "heldout", "model", "models",
                "objective", "offload_folder",
            }  # fmt: skip
            in_tables = self._given_in_tables()
            given = sorted(name for name in of_torch if getattr(self, name) or name in in_tables)
            if given:
                raise ValueError(f"base_form leaves no use for {given[0]}; set only one of the two")
        elif self.gpu_layers:
            raise ValueError("gpu_layers is for a GGUF in base_form; set both, or use device")
        return self

    @model_validator(mode="after")
    def _whole_budget(self) -> WorkerSettings:
        check_whole_budget(
            epsilon=self.privacy_epsilon,
            clip=self.privacy_clip,
            ledger=self.privacy_ledger,
            is_delta_given="privacy_delta" in self.model_fields_set,
        )
        return self

    @property
    def privacy_budget(self) -> PrivacyBudget | None:
        """What this worker's rows may give away; None: there is no limit and no noise."""
        if self.privacy_epsilon is None:
            return None
        assert self.privacy_clip is not None
        assert self.privacy_ledger is not None
        return PrivacyBudget(
            self.privacy_epsilon, self.privacy_delta, self.privacy_clip, self.privacy_ledger
        )

    @model_validator(mode="after")
    def _rows_to_evaluate_on(self) -> WorkerSettings:
        data = None if self.data_sets else self.rows
        check_rows_to_evaluate_on({"data": data, "heldout": self.heldout}, self.evaluations)
        return self

    @model_validator(mode="after")
    def _each_setting_with_its_rows(self) -> WorkerSettings:
        misplaced = sorted(SETTINGS_OF_ROWS & self.model_fields_set) if self.data_sets else []
        if misplaced:
            raise ValueError(
                f"{misplaced[0]} belongs to one data set; write it into that one's [data.NAME]"
            )
        return self

    @property
    def data_sets(self) -> dict[str, DataSet]:
        """The data sets by their names; empty where `data` is a path."""
        return self.data if isinstance(self.data, dict) else {}

    @property
    def rows(self) -> Path:
        """Where the rows of the run are; only of settings that `for_run` gave."""
        assert isinstance(self.data, Path)
        return self.data

    def _given_in_tables(self) -> set[str]:
        """Settings of rows that a data set sets."""
        return {name for one in self.data_sets.values() for name in one.model_fields_set}

    def for_run(self, genesis: Genesis) -> Self:
        """These settings with what they say of this run: its rows, its model, its files.

        The result is for this run alone. Opens no file and imports nothing. Raises `PolicyError`
        for a run that asks for a data set which is not here, and as `check_run`.
        """
        config = genesis.config
        if self._run_id == config.run_id:
            return self
        changes: dict[str, Any] = {}
        if self.data_sets:
            changes |= chosen(self.data_sets, config.data_set).settings()
        elif config.data_set:
            raise no_such_data_set(config.data_set)
        own = self.models.get(genesis.base_digest.hex(), self.models.get(config.model))
        if own is not None and not self.model:
            changes["model"] = str(own)
        evaluations = changes.get("evaluations", self.evaluations)
        changes["evaluations"] = _of_run(evaluations, f"{config.run_id}.jsonl")
        changes["journal_copy"] = _of_run(self.journal_copy, f"{config.run_id}.db")
        settings = self.model_copy(update=changes)
        settings._run_id = config.run_id
        settings.check_run(genesis)
        return settings

    def check_run(self, genesis: Genesis) -> None:
        """Refuse a run that these settings do not allow; opens no file and imports nothing.

        Raises `ConfigError`, as `RunPolicy.check`.
        """
        wanted, named = genesis.config.task.objective, self.objective
        if named and not wanted:
            raise ConfigError(
                f"The run scores batches by their loss, not by {named}; start this worker without "
                "--objective."
            )
        self.policy.check(
            genesis,
            own_model=bool(self.model) or self.base_form is not None,
            own_objective=wanted == named,
            keeps_history=self.journal_copy is not None,
        )
        if named and named != wanted:
            raise ConfigError(
                f"The run scores batches by {wanted}, not by {named}; set --objective {wanted}, or "
                "leave it out."
            )


def _of_run(given: Path | None, name: str) -> Path | None:
    """The file `name` if a folder is given; otherwise what is given."""
    return given / name if given is not None and given.is_dir() else given
