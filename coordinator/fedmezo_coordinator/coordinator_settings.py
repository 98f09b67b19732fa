"""Settings of `fedmezo-coordinator` and `fedmezo-relay`: flags, environment and a TOML file."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmezo.presets import KEY, difference_from, parse_contract, with_preset
from fedmezo_coordinator.stores.location import path_beside
from fedmezo_core.config import (
    COHORT_MAX,
    NAME_PATTERN,
    RunConfig,
    TaskConfig,
)
from fedmezo_core.errors import ConfigError, TokenError
from fedmezo_core.folders import is_there, state_home
from fedmezo_core.layered_settings import (
    ROW_STATES_MAX,
    Address,
    CheckpointKey,
    ListenAddress,
    OptionalAddress,
    OptionalListenAddress,
    OutputFormat,
    ProgramSettings,
    StoreName,
    UserPath,
    UserPathText,
)
from fedmezo_core.machines.divergence import REPLICA_PARTY
from fedmezo_core.trust.certificates import CA_LIFE_S, MEMBER_LIFE_S
from fedmezo_core.trust.join_string import parse_join_string
from fedmezo_core.zo.model.adapter_layout import ADAPTER_FILES

SESSIONS_MAX = 16_000
"""Default of `sessions_max`."""
SESSIONS_LIMIT = 20_000
"""Largest `sessions_max`: the number of worker names that a coordinator remembers."""
JOINS_AT_A_TIME = 256
"""Default of `joins_at_a_time`."""
CALLER_CALLS_PER_S = 500.0
"""Default of `caller_calls_per_s`."""
CALLER_CONNECTIONS_MAX = 4096
"""Default of `caller_connections_max`."""


RUNS_MAX = 128
"""Most runs in the folder of a coordinator of many."""
PAGE_PORT = 7480
"""Port of the page if its address names none; no port of Flower, NVFlare, Prometheus, Grafana."""


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to host:port."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServingSettings(ProgramSettings):
    """Settings of every program that serves workers."""

    listen: ListenAddress = Field(default="127.0.0.1:7465", description="host:port to listen on")
    tls_cert: UserPath | None = Field(
        default=None, description="PEM certificate chain to serve TLS with"
    )
    tls_key: UserPath | None = Field(default=None, description="PEM private key of tls_cert")
    insecure: bool = Field(
        default=False,
        description="without state and tls_cert, listen to other machines too: whoever can connect "
        "can then join and read the run, and whoever is on the way can read and change it",
    )
    state: UserPath | None = Field(
        default=None,
        description="state folder (fedmezo-coordinator init): only members may call, who show a "
        "certificate; none: everybody may",
    )
    enroll_listen: OptionalListenAddress = Field(
        default="",
        description="with state: host:port where new members join; none: listen's host, and the "
        "port after its port",
    )
    join_address: OptionalAddress = Field(
        default="",
        description="with state: host:port that join strings name; none: the first name given to "
        "init, and the port that is listened on",
    )
    tls_cert_ca: UserPath | None = Field(
        default=None,
        description="with state and tls_cert: PEM file of the CA that vouches for tls_cert, which "
        "new members are told to trust; none: their systems trust it",
    )
    certificate_life_s: int = Field(
        default=MEMBER_LIFE_S,
        ge=2,
        le=CA_LIFE_S,
        description="with state: life of a member's certificate in seconds, which the member "
        "renews after two thirds of it",
    )
    sessions_max: int = Field(
        default=SESSIONS_MAX,
        ge=1,
        le=SESSIONS_LIMIT,
        description="most open sessions; each takes a file descriptor and about 90 kB of memory",
    )
    joins_at_a_time: int = Field(
        default=JOINS_AT_A_TIME,
        ge=1,
        le=SESSIONS_LIMIT,
        description="workers that may join at the same time; the others are asked to retry later",
    )

    caller_calls_per_s: float = Field(
        default=CALLER_CALLS_PER_S,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="calls a second that one member, address or session makes in the long run; "
        "more of them wait, and then are refused; 0: any number",
    )
    caller_connections_max: int = Field(
        default=CALLER_CONNECTIONS_MAX,
        ge=1,
        le=SESSIONS_LIMIT + 128,
        description="most connections of one member or address; further ones are closed (on Linux)",
    )

    health_listen: OptionalListenAddress = Field(
        default="",
        description="host:port that answers grpc.health.v1 alone, to anyone and without TLS, for "
        "probes; none: it is answered at listen and enroll_listen",
    )
    reflection: bool = Field(
        default=False,
        description="describe the services to tools such as grpcurl, to whoever may call them",
    )

    @model_validator(mode="after")
    def _both_tls_files(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; set both or neither")
        return self

    @model_validator(mode="after")
    def _only_with_state(self) -> Self:
        of_state = ("enroll_listen", "join_address", "tls_cert_ca", "certificate_life_s")
        given = [key for key in of_state if key in self.model_fields_set]
        if self.state is None and given:
            raise ValueError(f"{given[0]} has no meaning without state; set both")
        if self.state is not None and self.insecure:
            raise ValueError("insecure and state exclude each other; leave one of them out")
        if self.tls_cert_ca is not None and self.tls_cert is None:
            raise ValueError("tls_cert_ca vouches for tls_cert; set both or neither")
        return self

    @property
    def tls_files(self) -> tuple[Path, Path] | None:
        """Certificate and key, or None for plain TCP."""
        return (self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.listen)


class InitSettings(BaseSettings):
    """Make the state folder of a coordinator that knows its members.

    It holds a CA, the coordinator's certificate, the operator's identity and the members. If it is
    there already, nothing changes.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMEZO_INIT_")

    state: UserPath = Field(
        default_factory=lambda: state_home() / "coordinator", description="folder to make"
    )
    name: list[str] = Field(
        default_factory=list,
        description="host name or IP address that workers connect to; several times for several",
    )
    ca_cert: UserPath | None = Field(
        default=None, description="PEM certificate of your own root CA; none: make one"
    )
    ca_key: UserPath | None = Field(default=None, description="PEM private key of ca_cert")
    format: OutputFormat = Field(default=OutputFormat.TEXT, description="text, or json: one object")

    @model_validator(mode="after")
    def _both_ca_files(self) -> Self:
        if (self.ca_cert is None) != (self.ca_key is None):
            raise ValueError("ca_cert and ca_key go together; set both or neither")
        return self

    @property
    def own_ca(self) -> tuple[Path, Path] | None:
        """Certificate and key of the user's own CA, or None."""
        return (self.ca_cert, self.ca_key) if self.ca_cert and self.ca_key else None


class CoordinatorSettings(ServingSettings):
    """The coordinator of one federated run. `fedmezo-coordinator init` makes a state folder for it.

    Settings come from flags, then from FEDMEZO_COORDINATOR_* in the environment, then from the TOML
    file that --config names.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMEZO_COORDINATOR_")

    runs: UserPath | None = Field(
        default=None,
        description="folder of any number of runs, which `fedmezo run` creates and ends while this "
        "serves them; the settings below are then each run's own",
    )
    replicas_max: int = Field(
        default=0,
        ge=0,
        le=RUNS_MAX,
        description="with runs: most replicas at a time, each with a model in memory; those of "
        "other runs wait; 0: any number",
    )
    journal: StoreName = Field(
        default="journal.db", description="the run's journal: a file, or a postgresql:// URL"
    )
    standby: bool = Field(
        default=False,
        description="wait while another coordinator holds the journal; take over when it ends",
    )
    model: UserPathText = Field(
        default="", description="Hugging Face name or folder of the base model"
    )
    adapter: UserPath | None = Field(
        default=None,
        description="folder of the adapter (peft's layout) that a run with lora begins from",
    )
    adapter_rows: UserPath | None = Field(
        default=None,
        description="rows like the workers', which nobody trains on: a new run's adapter is fitted "
        "to them before it begins, and kept next to the journal",
    )
    heldout: UserPath | None = Field(
        default=None,
        description="held-out rows (JSONL, CSV or Parquet) that the model is evaluated on",
    )
    probe_rows: UserPath | None = Field(
        default=None,
        description="rows like the workers', on which a new run's learning_rate (and eps, if [run] "
        "names none) is measured before it begins, as by fedmezo probe; none: adapter_rows or "
        "heldout may shorten a rate that [run] does not name",
    )
    evaluate_every_rounds: int = Field(
        default=10, ge=1, description="rounds between two evaluations"
    )
    evaluate_batch_size: int = Field(
        default=32, ge=1, le=65_536, description="rows in one forward pass of an evaluation"
    )
    replica: bool = Field(
        default=True,
        description="keep a copy of the model in a second process, which digests and evaluates it",
    )
    replica_threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of the replica")
    replica_row_states_max: ByteSize = Field(
        default=ROW_STATES_MAX,
        description="size of a temporary file for what the frozen first layers make of each "
        "held-out row, so that they run once for each row; 0: run them every time",
    )
    snapshot_every_rounds: int = Field(
        default=0,
        ge=0,
        description="rounds between two files of the trained weights, written by the replica, from "
        "which late workers begin; 0: write none",
    )
    snapshots: UserPath | None = Field(
        default=None, description="folder of the snapshots; none: next to the journal"
    )
    compact_after_records: int = Field(
        default=0,
        ge=0,
        description="drop the journal's oldest records once this many can go, because workers can "
        "begin from later snapshots (in a pool run: from later commits); 0: keep all",
    )
    resume: bool = Field(default=False, description="continue a paused run")
    resume_rate_factor: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="with resume: factor on the learning rates",
    )
    page: OptionalListenAddress = Field(
        default="",
        description=f"host:port of a web page and of metrics for Prometheus, {PAGE_PORT} if only "
        "the host is given; none: neither",
    )
    otel: bool = Field(
        default=False,
        description="send a trace of each round to the OpenTelemetry collector that "
        "OTEL_EXPORTER_OTLP_ENDPOINT names",
    )
    signing_key: UserPath | None = Field(
        default=None,
        description="PEM file with the Ed25519 key that signs checkpoints, created if missing; "
        "none: the journal's name with .key added (for a database: in the working folder)",
    )
    run: dict[str, Any] = Field(
        default_factory=dict,
        description="the run's contract, as JSON or as [run] in the file: docs/configuration.md; "
        "its key preset names a recipe (fedmezo presets)",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_are_in_their_tables(cls, values: dict[str, Any]) -> dict[str, Any]:
        # In TOML a line belongs to the table above it, so a key is easily in the wrong one.
        run = values.get("run")
        tables: dict[str, tuple[type[BaseModel], Any]] = {
            "above the first [table]": (cls, values),
            "below [run]": (RunConfig, run),
            "below [run.task]": (TaskConfig, run.get("task") if isinstance(run, dict) else None),
        }
        for place, (own, given) in tables.items():
            keys = given if isinstance(given, dict) else {}
            for key in [key for key in keys if key not in own.model_fields]:
                for home, (kind, _) in tables.items():
                    is_preset = key == KEY and kind is RunConfig and home != place
                    if key in kind.model_fields or is_preset:
                        raise ValueError(f"{key} belongs {home}, not {place}; move it there")
        return values

    @field_validator("page", mode="before")
    @classmethod
    def _with_page_port(cls, page: Any) -> Any:
        is_host = isinstance(page, str) and page and (page[-1] == "]" or ":" not in page)
        return f"{page}:{PAGE_PORT}" if is_host else page

    @model_validator(mode="after")
    def _one_run_or_many(self) -> Self:
        if self.runs is None and "replicas_max" in self.model_fields_set:
            raise ValueError("replicas_max has no meaning without runs; set both or neither")
        of_many = {"runs", "replicas_max", "page", "otel"}
        given = self.model_fields_set & CoordinatorSettings.model_fields.keys()
        of_a_run = sorted(given - ServingSettings.model_fields.keys() - of_many)
        if self.runs is not None and of_a_run:
            raise ValueError(
                f"{of_a_run[0]} and runs exclude each other: with runs, each run has its own, from "
                "fedmezo run create; leave one of them out"
                if of_a_run[0] in OF_A_RUN
                else f"{of_a_run[0]} has no meaning with runs; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _factor_with_resume(self) -> CoordinatorSettings:
        if self.resume_rate_factor != 1.0 and not self.resume:
            raise ValueError("resume_rate_factor needs resume; set that too, or leave both out")
        return self

    @model_validator(mode="after")
    def _measured_or_named(self) -> Self:
        if self.probe_rows is not None and "learning_rate" in self.run:
            raise ValueError(
                "probe_rows measures a learning_rate and [run] names one; leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _fitted_or_given(self) -> Self:
        if self.adapter is not None and self.adapter_rows is not None:
            raise ValueError("adapter_rows fits an adapter and adapter names one; leave out either")
        return self

    def check_files_are_there(self) -> None:
        """Refuse settings of a new run that name a file that is not there, with its setting."""
        for key in ("adapter_rows", "heldout", "probe_rows"):
            rows: Path | None = getattr(self, key)
            if rows is not None and not rows.exists():
                raise ConfigError(f"There is no data file or folder {rows}; check {key}.")
        for name in ADAPTER_FILES:
            if self.adapter is not None and not (self.adapter / name).is_file():
                raise ConfigError(f"There is no {name} in a folder {self.adapter}; check adapter.")

    @property
    def rate_rows(self) -> tuple[Path, ...]:
        """Rows to measure a new run's rate on, if its user set none: the first that can serve."""
        if self.probe_rows is not None:
            return (self.probe_rows,)
        if "learning_rate" in self.run:
            return ()
        return tuple(rows for rows in (self.adapter_rows, self.heldout) if rows is not None)

    @property
    def begins_from(self) -> Path | None:
        """Folder of the adapter that the run begins from; a new run's is fitted first."""
        if self.adapter_rows is None:
            return self.adapter
        return path_beside(self.journal, ".adapter").absolute()

    @property
    def base_model(self) -> str:
        """Name or folder of the model to load; raises `ConfigError` if there is none."""
        if not self.model:
            raise ConfigError(
                "model is missing; set it to a Hugging Face name or a model folder, for example "
                'model = "HuggingFaceTB/SmolLM2-135M" above [run], or with --model of '
                "fedmezo-coordinator."
            )
        return self.model

    @property
    def has_replica(self) -> bool:
        """Whether the coordinator keeps a replica, which needs the model."""
        return self.replica and bool(self.model)

    @property
    def snapshots_folder(self) -> Path:
        """Absolute path of the folder that holds the snapshots."""
        folder = self.snapshots or path_beside(self.journal, ".snapshots")
        return folder.absolute()

    @property
    def contract(self) -> dict[str, Any]:
        """The values of `run` and of the preset that it names; raises as `with_preset` does."""
        return with_preset(self.run)

    def run_config(self, where: str, *, rate_comes_later: bool = False) -> RunConfig:
        """The run's contract in these settings; raises `ConfigError`, which names what is wrong.

        A rate that comes later, as one from `probe_rows` does, is not missed.
        """
        later = rate_comes_later or self.probe_rows is not None
        # Where callers are known, a worker reads no others' answers unless the run says so.
        readers = {} if self.state is None else {"journal_readers": "observers"}
        values = {"model": model_label(self.model), **readers, **self.run}
        return parse_contract(values, where, rate_comes_later=later)


_OF_ONE_RUN_ALONE = {
    "runs", "replicas_max", "journal", "standby", "resume", "resume_rate_factor", "signing_key",
    "snapshots", "page", "otel",
}  # fmt: skip
OF_A_RUN = (
    CoordinatorSettings.model_fields.keys()
    - ServingSettings.model_fields.keys()
    - _OF_ONE_RUN_ALONE
)
"""Settings that a run has of its own where a process hosts many; the others are the process's."""


class RelaySettings(ServingSettings):
    """A site of a federated run: one worker of the coordinator above, with workers of its own.

    Settings come from flags, then from FEDMEZO_RELAY_* in the environment, then from the TOML file
    that --config names.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMEZO_RELAY_")

    listen: ListenAddress = Field(default="127.0.0.1:7466", description="host:port to listen on")
    upstream: Address = Field(
        default="127.0.0.1:7465",
        description="host:port of the coordinator above, or of another relay",
    )
    name: str = Field(
        description="name of this site, unique among the run's workers: a-z, 0-9 and -"
    )
    journal_copy: UserPath = Field(
        default=Path("journal-copy.db"),
        description="file with a copy of the run's history, for workers that have to catch up",
    )
    workers_min: int = Field(
        default=1,
        ge=1,
        le=COHORT_MAX,
        description="workers that must have joined before the site takes part",
    )
    deadline_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="part of each deadline of the coordinator above that this site's workers get",
    )
    join: str = Field(
        default="",
        repr=False,
        description="join string of the fleet of the coordinator above: become a member, the "
        "first time, under this site's name",
    )
    join_state: UserPath | None = Field(
        default=None,
        description="folder for this site's keys and certificate in the fleet above; none: with "
        "join, one in $XDG_STATE_HOME or ~/.local/state",
    )
    tls: bool = Field(
        default=False,
        description="connect to the coordinator above with TLS; without tls_ca, trust the system's "
        "CAs",
    )
    tls_ca: UserPath | None = Field(
        default=None,
        description="PEM file of the CA that vouches for the coordinator above, with TLS",
    )
    checkpoint_key: CheckpointKey = Field(
        default="",
        description="public key (64 hex digits) that must sign the run; none: any",
    )
    run_id: str = Field(
        default="", description="the only run to take part in; none: whichever is served"
    )
    give_up_after_s: float = Field(
        default=3600.0,
        ge=0,
        description="the relay ends after this many seconds without the coordinator above",
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
    def _above_is_where_it_joins(self) -> Self:
        if not self.join:
            return self
        try:
            address = parse_join_string(self.join).address
        except TokenError as error:
            raise ValueError(str(error)) from None
        if "upstream" not in self.model_fields_set:
            self.upstream = address
        elif self.upstream != address:
            raise ValueError(
                f"upstream is {self.upstream}, and the join string is of the coordinator at "
                f"{address}; leave upstream out, or take that coordinator's join string"
            )
        return self

    @model_validator(mode="after")
    def _not_its_own_coordinator(self) -> Self:
        (above, port), (own, own_port) = (
            one.rsplit(":", 1) for one in (self.upstream, self.listen)
        )
        is_here = above == own or (above in _THIS_MACHINE and own in _THIS_MACHINE | _ANY_ADDRESS)
        if is_here and port == own_port:
            raise ValueError(
                f"upstream = {self.upstream} is this relay's own address, listen = {self.listen}; "
                "set upstream to the coordinator's address"
            )
        return self


_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "[::1]"})
_ANY_ADDRESS = frozenset({"0.0.0.0", "[::]"})


def model_label(model: str) -> str:
    """The model's name as others see it: a hub name unchanged; a folder without its path."""
    path = Path(model).expanduser()
    return path.resolve().name if is_there(path) else model


def check_same_run(journal: str, begun: RunConfig, asked: dict[str, Any], where: str) -> None:
    """Refuse values that differ from the contract in the journal, which nothing can change.

    `journal` and `where` name the journal and the place of the values. Raises `ConfigError`.
    """
    if found := difference_from(begun, asked, where):
        key, written, value = found
        raise ConfigError(
            f"The journal {journal} belongs to a run with {key} = {written!r}, the settings say "
            f"{value!r}; take the setting back, or give the new run another journal."
        )


def check_compaction(settings: CoordinatorSettings, config: RunConfig) -> None:
    """Refuse to drop records of a run in which nothing takes their place."""
    has_snapshots = settings.has_replica and settings.snapshot_every_rounds
    if settings.compact_after_records and not has_snapshots and config.seed_policy != "pool":
        raise ConfigError(
            f"compact_after_records = {settings.compact_after_records} needs snapshots, from which "
            "workers begin instead; set snapshot_every_rounds, model and replica too, or leave it "
            "out."
        )


def factors_stay_random(settings: CoordinatorSettings, config: RunConfig) -> bool:
    """Whether a new run trains a C between factors that were never fitted to anything."""
    is_factored = config.lora is not None and config.lora.output_rank is not None
    return is_factored and settings.begins_from is None


def no_loss_is_seen(settings: CoordinatorSettings, config: RunConfig) -> bool:
    """Whether nobody reports a loss, so that a run that diverges does not pause."""
    is_evaluated = settings.has_replica and settings.heldout is not None
    return bool(config.pause_rounds and not config.report_losses and not is_evaluated)
