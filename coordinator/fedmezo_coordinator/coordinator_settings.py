"""What `fedmezo-coordinator` and `fedmezo-relay` are told: flags, environment and a TOML file."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Self

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings

from fedmezo_coordinator.serving.session_limit import JOINS_AT_A_TIME, SESSIONS_LIMIT, SESSIONS_MAX
from fedmezo_coordinator.stores.location import path_beside
from fedmezo_core.config import COHORT_MAX, NAME_PATTERN, RunConfig, parse_run
from fedmezo_core.layered_settings import ROW_STATES_MAX, Address, CheckpointKey
from fedmezo_core.machines.cohort import REPLICA_PARTY

ENVIRONMENT_PREFIX = "FEDMEZO_COORDINATOR_"
RELAY_ENVIRONMENT_PREFIX = "FEDMEZO_RELAY_"


class ServingSettings(BaseSettings):
    """What everybody is told who serves workers."""

    listen: str = Field(default="127.0.0.1:7465", description="host:port to listen on")
    tls_cert: Path | None = Field(
        default=None, description="PEM certificate chain to serve TLS with"
    )
    tls_key: Path | None = Field(default=None, description="PEM private key of tls_cert")
    sessions_max: int = Field(
        default=SESSIONS_MAX,
        ge=1,
        le=SESSIONS_LIMIT,
        description="sessions open at a time; each takes a file descriptor and about 90 kB",
    )
    joins_at_a_time: int = Field(
        default=JOINS_AT_A_TIME,
        ge=1,
        le=SESSIONS_LIMIT,
        description="workers joining at a time; the rest is told when to come back",
    )

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("write it as host:port, for example 127.0.0.1:7465")
        return value

    @model_validator(mode="after")
    def _both_tls_files(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; set both or neither")
        return self

    @property
    def tls(self) -> tuple[Path, Path] | None:
        """Certificate and key, or None for plain TCP."""
        return (self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        host = self.listen.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


class CoordinatorSettings(ServingSettings):
    """The coordinator of one federated run.

    Settings come from flags, then from FEDMEZO_COORDINATOR_* in the environment, then from the TOML
    file that --config names.
    """

    journal: str = Field(
        default="journal.db", description="the run's journal: a file, or a postgresql:// URL"
    )
    standby: bool = Field(
        default=False,
        description="wait while another coordinator holds the journal, and take over when it ends",
    )
    model: str = Field(default="", description="Hugging Face name or folder of the base model")
    adapter: Path | None = Field(
        default=None,
        description="in a run with lora: folder of the adapter (peft's layout) that it begins from",
    )
    heldout: Path | None = Field(
        default=None, description="held-out rows (JSONL, CSV or Parquet) to evaluate the model on"
    )
    evaluate_every_rounds: int = Field(default=10, ge=1, description="how often to evaluate")
    evaluate_batch_size: int = Field(
        default=32, ge=1, le=65_536, description="rows a forward pass when evaluating"
    )
    replica: bool = Field(
        default=True,
        description="keep a replica process beside the daemon that digests and evaluates the model",
    )
    replica_threads: int = Field(default=1, ge=1, le=1024, description="its CPU threads")
    replica_row_states_max: ByteSize = Field(
        default=ROW_STATES_MAX,
        description="where most of the model is frozen and runs first: room, in a temporary file, for what "
        "it makes of each held-out row, which is then computed once; 0: each time",
    )
    snapshot_every_rounds: int = Field(
        default=0,
        ge=0,
        description="how often the replica writes the trained weights for late workers; 0: never",
    )
    snapshots: Path | None = Field(
        default=None, description="folder for them; by default beside the journal"
    )
    compact_after_records: int = Field(
        default=0,
        ge=0,
        description="drop the journal's oldest records when so many can go, because workers can begin from "
        "later snapshots (or, in a pool run, commits from the base); 0: never",
    )
    resume: bool = Field(default=False, description="let a paused run go on")
    resume_rate_factor: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="multiply its learning rates by this"
    )
    signing_key: Path | None = Field(
        default=None,
        description="PEM file with the Ed25519 key that signs checkpoints, made if it is not there; "
        "none: beside the journal, with .key added to its name (of one in a database, in the working folder)",
    )
    run: dict[str, Any] = Field(
        default_factory=dict,
        description="the run's contract as JSON, or [run] in the file: see docs/configuration.md",
    )

    @model_validator(mode="after")
    def _factor_with_resume(self) -> CoordinatorSettings:
        if self.resume_rate_factor != 1.0 and not self.resume:
            raise ValueError("resume_rate_factor needs resume; set that too, or leave both out")
        return self

    @property
    def has_replica(self) -> bool:
        """Whether one runs beside the daemon: it needs the model."""
        return self.replica and bool(self.model)

    @property
    def snapshots_folder(self) -> Path:
        """Where snapshots are kept."""
        folder = self.snapshots or path_beside(self.journal, ".snapshots")
        return folder.expanduser().absolute()

    def run_config(self, where: str) -> RunConfig:
        """The contract that these settings ask for; `ConfigError` names what is wrong with it."""
        return parse_run({"model": model_label(self.model), **self.run}, where)


class RelaySettings(ServingSettings):
    """A site of a federated run: a worker of the coordinator above, a coordinator of its own workers.

    Settings come from flags, then from FEDMEZO_RELAY_* in the environment, then from the TOML file that
    --config names.
    """

    listen: str = Field(default="127.0.0.1:7466", description="host:port to listen on")
    upstream: Address = Field(
        default="127.0.0.1:7465",
        description="host:port of the coordinator above, or of another relay",
    )
    name: str = Field(
        description="this site's name, as a worker's unique in the run: a-z, 0-9 and -"
    )
    journal_copy: Path = Field(
        default=Path("journal-copy.db"),
        description="file for the copy of the run's history that its workers catch up from",
    )
    workers_min: int = Field(
        default=1,
        ge=1,
        le=COHORT_MAX,
        description="workers that must be here before the site takes part",
    )
    deadline_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="what this site's workers get of the time that the coordinator above gives",
    )
    tls_ca: Path | None = Field(
        default=None,
        description="PEM file of the CA to trust of the coordinator above; none: no TLS",
    )
    checkpoint_key: CheckpointKey = Field(
        default="",
        description="public key (64 hex digits) that the run must be signed with; none: any",
    )
    run_id: str = Field(default="", description="refuse any other run")
    give_up_after_s: float = Field(
        default=3600.0, ge=0, description="seconds without the coordinator above before it ends"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(NAME_PATTERN, value) or value == REPLICA_PARTY:
            raise ValueError(
                "use 1 to 64 of a-z, 0-9 and -, beginning with a letter or digit, and not "
                f"{REPLICA_PARTY!r}"
            )
        return value

    @model_validator(mode="after")
    def _not_its_own_coordinator(self) -> Self:
        if self.upstream == self.listen:
            raise ValueError(
                f"upstream and listen are both {self.listen}: a relay cannot be its own coordinator; "
                "set upstream to the coordinator's address"
            )
        return self


def model_label(model: str) -> str:
    """A hub name as it is; of a folder only its name, because paths are nobody else's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
