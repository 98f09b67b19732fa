"""A job in a few lines, as users of NVFlare's recipes expect."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.file_source import FileSource
from nvflare.recipe.spec import Recipe
from pydantic import ConfigDict, Field

import fedmezo
from fedmezo.presets import difference_from, parse_contract
from fedmezo.stack_settings import StackSettings
from fedmezo_core.errors import ConfigError
from fedmezo_nvflare.round_controller import GENESIS_FILE, TASK, FedMezoController
from fedmezo_nvflare.scalar_privacy import ScalarPrivacy

_INSTALLED_EVERYWHERE = ["fedmezo", "fedmezo_core", "fedmezo_nvflare", "fedmezo_proto"]
"""Packages whose code no job brings along."""
SITE_COMMAND = ["python3", "-u", "-m", "fedmezo_nvflare.site_script"]
SHUTDOWN_TIMEOUT_S = 10.0
"""Time that a site's script has to end after the run."""


class JobSettings(StackSettings):
    """The arguments of a recipe."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    contract: Mapping[str, Any]
    model: str
    adapter: str | None
    rate_rows: str | None
    genesis: bytes
    name: str = Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$")
    min_clients: int | None = Field(ge=1)
    privacy: ScalarPrivacy | None
    task_request_interval: float = Field(gt=0, allow_inf_nan=False)


class FedMezoRecipe(Recipe):
    """Fine-tune a language model with NVFlare's clients: only scalars leave a site.

    FedMeZO must be installed at the server and at the sites. The model is needed here, and at each
    site, but not at the server. Each site names its own model and rows (docs/integrations.md).
    """

    def __init__(
        self,
        *,
        contract: Mapping[str, Any],
        model: str | Path = "",
        adapter: str | Path | None = None,
        rate_rows: str | Path | None = None,
        genesis: bytes = b"",
        name: str = "",
        min_clients: int | None = None,
        journal: str = "",
        resume: float = 0.0,
        privacy: ScalarPrivacy | None = None,
        task_request_interval: float = 0.5,
    ) -> None:
        """Describe the job; raises a `FedMezoError` for a contract, model or value of no use.

        Args:
            contract: what a coordinator's [run] says: run_id, model, seed, rounds, task ...
            model: the folder or hub name of the base, if not the contract's `model`.
            adapter: the folder of the adapter that the run begins from, if it does.
            rate_rows: a file or folder of rows like the sites', such as held-out ones. A contract
                that names no `learning_rate` takes a shorter one if they show that its own is too
                long for this model.
            genesis: what `fedmezo.encode_genesis` gave for the contract elsewhere. Then no model is
                loaded here.
            name: the job's name; the contract's `run_id` if empty.
            min_clients: clients that NVFlare waits for; the contract's `workers_min` if None.
            journal: a file on the server for the run's journal, with its whole path, so that a
                later job can go on with it; empty: in the job's workspace.
            resume: factor on the learning rates with which a paused run of `journal` goes on; 0: it
                stays paused.
            privacy: a filter on what leaves each site.
            task_request_interval: seconds between two requests of a site without work.
        """
        settings = JobSettings.of(
            {
                "contract": contract,
                "model": _text(model),
                "adapter": _text(adapter),
                "rate_rows": _text(rate_rows),
                "genesis": genesis,
                "name": name,
                "min_clients": min_clients,
                "journal": journal,
                "resume": resume,
                "privacy": privacy,
                "task_request_interval": task_request_interval,
            },
            "FedMezoRecipe",
        )
        config = parse_contract(settings.contract, "the run's contract")
        if not genesis:
            begun = fedmezo.begin_run(
                contract, model or config.model, adapter=adapter, rate_rows=rate_rows
            )
            genesis = fedmezo.encode_genesis(begun)
        else:
            _check_same_run(genesis, settings)
        job = FedJob(name or config.run_id, min_clients or config.workers_min)
        job.set_app_packages(_INSTALLED_EVERYWHERE)
        # A file, because NVFlare takes long text in a configuration for a secret. It lies where a
        # job's own code would, so that NVFlare treats the job as one that brings code.
        folder = tempfile.mkdtemp(prefix="fedmezo-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        genesis_file = Path(folder) / GENESIS_FILE
        genesis_file.write_bytes(genesis)
        job.to_server(FileSource(str(genesis_file)))
        job.to_server(FedMezoController(journal, resume))
        executor = ClientAPIExecutor(
            execution_mode=ExecutionMode.EXTERNAL_PROCESS,
            command=SITE_COMMAND,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            server_expected_format=ExchangeFormat.RAW,
        )
        job.to_clients(executor, tasks=[TASK])
        super().__init__(job)
        self.add_server_config({"server": {"task_request_interval": task_request_interval}})
        self.add_client_config({"default_task_fetch_interval": task_request_interval})
        if privacy is not None:
            self.add_client_output_filter(privacy, tasks=[TASK])


def _check_same_run(genesis: bytes, settings: JobSettings) -> None:
    """Refuse a genesis that another contract began, and arguments that only begin a run."""
    if settings.rate_rows is not None:
        raise ConfigError(
            "rate_rows measure the rate of a run that begins here, and a genesis has its rate; "
            "leave out either, or give rate_rows to fedmezo.begin_run."
        )
    begun = fedmezo.decode_genesis(genesis).config
    if found := difference_from(begun, settings.contract, "the run's contract"):
        key, written, value = found
        raise ConfigError(
            f"The genesis given is of a run with {key} = {written!r}, the contract says "
            f"{value!r}; make it again with fedmezo.begin_run."
        )


def _text(path: str | Path | None) -> str | None:
    return str(path) if isinstance(path, Path) else path
