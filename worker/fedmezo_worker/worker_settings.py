"""The settings of `fedmezo-worker`: from flags, FEDMEZO_WORKER_* and a TOML file."""

from __future__ import annotations

import re

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmezo_core.config import NAME_PATTERN
from fedmezo_core.layered_settings import (
    ROW_STATES_MAX,
    Address,
    CheckpointKey,
    UserPath,
    UserPathText,
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
)
"""Settings without a meaning for a worker that others bring the messages to."""


class WorkerSettings(BaseSettings):
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
    data: UserPath = Field(
        description="its private rows: a JSONL, CSV or Parquet file, or a folder of them"
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
        default=None, description="JSONL file that each evaluation is appended to"
    )
    model: UserPathText = Field(
        default="", description="model folder or hub name, if not the name that the run gives"
    )
    adapter: UserPath | None = Field(
        default=None,
        description="folder of the adapter (peft's layout) that the run begins from, if it does",
    )
    journal_copy: UserPath | None = Field(
        default=None,
        description="file for this worker's own copy of the run's history; the run can be "
        "rebuilt from it, and after a restart it shows whether the coordinator's history went back",
    )
    checkpoint_key: CheckpointKey = Field(
        default="",
        description="public key (64 hex digits) that the coordinator must sign with; none: any key",
    )
    run_id: str = Field(default="", description="refuse any other run")
    objective: str = Field(
        default="",
        description="the module:function of the run's objective: its code runs here, on these rows",
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
        description="seconds without a coordinator until the worker ends",
    )

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
        return self

    @property
    def is_member(self) -> bool:
        """Whether this worker shows an identity."""
        return bool(self.join) or self.state is not None

    @model_validator(mode="after")
    def _only_what_serves(self) -> WorkerSettings:
        if self.serve is None:
            return self
        unused = [key for key in _OF_CONNECTIONS if key in self.model_fields_set]
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
                "adapter", "device_memory_max", "frozen_base_bits", "heldout", "model", "objective",
                "offload_folder",
            }  # fmt: skip
            given = sorted(name for name in of_torch if getattr(self, name))
            if given:
                raise ValueError(f"base_form leaves no use for {given[0]}; set only one of the two")
        elif self.gpu_layers:
            raise ValueError("gpu_layers is for a GGUF in base_form; set both, or use device")
        return self

    @model_validator(mode="after")
    def _rows_to_evaluate_on(self) -> WorkerSettings:
        if self.evaluations is not None and self.heldout is None:
            raise ValueError("evaluations needs heldout, the rows to evaluate on; set both")
        return self
