"""A worker serves only runs that its operator allows, and reads nothing before it knows that."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedmezo.run_policy import RunPolicy
from fedmezo.torch_engine import TorchEngine
from fedmezo_core.errors import ConfigError, SnapshotError
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.records import Genesis
from fedmezo_worker import engine as engine_module
from fedmezo_worker.engine import Engine, open_engine
from fedmezo_worker.form_engine import FormComputer
from fedmezo_worker.offers.work import work
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import TASK, environment, genesis_of, served
from tests.integration.support.harness import config_of as contract
from tests.integration.support.parties import Workers
from tests.integration.support.scoring import write_package

NOWHERE = "/nowhere/at/all"
TASK_WITH_TEXTS = {**TASK, "kind": "instruction", "objective": "secret_scores:best"}
FULL = {"local_steps": 1, "cohort_size_max": 2, "workers_min": 1, "quorum": 1}


@pytest.fixture
def settings() -> WorkerSettings:
    """Of a worker that has nothing to read, so that whatever it does read is an error."""
    return WorkerSettings(name="w1", data=Path(NOWHERE), model=NOWHERE)


BEYOND: list[tuple[dict[str, Any], str, str]] = [
    ({"rounds": 5_000_000}, "rounds = 5000000", "rounds_max"),
    ({**FULL, "local_steps": 4096}, "local_steps = 4096", "local_steps_max"),
    ({**FULL, "probes": 1024}, "probes = 1024", "probes_max"),
    ({"batch_size": 65_536}, "batch_size = 65536", "batch_size_max"),
    ({"task": {**TASK, "tokens_max": 131_072}}, "task.tokens_max = 131072", "tokens_max"),
    (
        {"task": {**TASK_WITH_TEXTS, "generated_tokens_max": 4096}},
        "task.generated_tokens_max = 4096",
        "generated_tokens_max",
    ),
    (
        {"lora": {"rank": 1024, "alpha": 1, "target_modules": ["c_attn"]}},
        "lora.rank = 1024",
        "lora_rank_max",
    ),
]


@pytest.mark.parametrize(("changes", "said", "key"), BEYOND)
def test_a_contract_beyond_the_policy_is_refused_at_every_door_before_anything_is_read(
    changes: dict[str, Any], said: str, key: str, settings: WorkerSettings
) -> None:
    genesis = genesis_of(contract(**changes))
    form = WorkerSettings(name="w1", data=Path(NOWHERE), base_form=Path(NOWHERE))
    doors: list[Callable[[], object]] = [
        lambda: open_engine(settings, genesis),  # fedmezo-worker, --serve, and NVFlare's sites
        lambda: FormComputer(form, genesis),
        lambda: TorchEngine(genesis, "w1", NOWHERE, NOWHERE),
    ]
    for door in doors:
        with pytest.raises(ConfigError) as caught:
            door()
        assert said in str(caught.value)
        assert f"raise policy.{key} in its settings" in str(caught.value)


def test_a_raised_limit_lets_the_run_pass(settings: WorkerSettings) -> None:
    genesis = genesis_of(contract(rounds=5_000_000))
    wider = settings.model_copy(update={"policy": RunPolicy(rounds_max=5_000_000)})
    wider.check_run(genesis)


def test_trained_elements_are_counted_in_the_genesis_and_in_what_was_loaded(
    settings: WorkerSettings,
) -> None:
    genesis = replace(genesis_of(contract()), trainable_elements=10**12)
    with pytest.raises(ConfigError, match=r"trained elements = 1000000000000 .*policy.trained_ele"):
        settings.check_run(genesis)
    with pytest.raises(ConfigError, match=r"trains 9 elements, more than the 8"):
        RunPolicy(trained_elements_max=8).check_trained(9)


async def test_a_genesis_that_understates_what_is_trained_is_found_out(
    workers: Workers, data_files: list[Path], tmp_path: Path, tiny_genesis: Callable[..., Genesis]
) -> None:
    lying = replace(tiny_genesis(), trainable_elements=1)
    async with served(tmp_path / "journal.db", lying) as coordinator:
        error = await workers.start(
            coordinator.address, "w1", data_files[0], policy=RunPolicy(trained_elements_max=100)
        ).outcome()
    assert isinstance(error, ConfigError)
    assert "more than the 100 that this worker allows" in str(error)


def test_runs_and_bases_may_be_listed(settings: WorkerSettings) -> None:
    genesis = genesis_of(contract())
    digest = genesis.base_digest.hex()
    RunPolicy(runs=("tiny-run",), base_digests=(digest,)).check(
        genesis, own_model=True, own_objective=True
    )
    for policy, words in [
        (RunPolicy(runs=("other",)), "run_id = tiny-run is not among policy.runs"),
        (RunPolicy(base_digests=("ab" * 32,)), f"{digest} is not among policy.base_digests"),
    ]:
        with pytest.raises(ConfigError, match=words):
            settings.model_copy(update={"policy": policy}).check_run(genesis)


def test_a_batch_has_enough_rows_to_hide_among(settings: WorkerSettings) -> None:
    wants_eight = settings.model_copy(update={"policy": RunPolicy(batch_size_min=8)})
    wants_eight.check_run(genesis_of(contract(batch_size=8)))
    with pytest.raises(ConfigError, match=r"batch_size = 7 is less than the 8 .*batch_size_min"):
        wants_eight.check_run(genesis_of(contract(batch_size=7)))


def test_a_worker_can_insist_on_sums_of_enough_workers(settings: WorkerSettings) -> None:
    plain = {"seed_policy": "shared", "aggregation": "mean", "clip_median_factor": 0.0}
    secure = {**plain, "secure_aggregation": True, "report_losses": False}
    four = {"workers_min": 4, "quorum": 4, "cohort_size_max": 4, "secure_cohort_min": 4}
    strict = settings.model_copy(
        update={"policy": RunPolicy(secure_aggregation=True, secure_cohort_min=4)}
    )
    strict.check_run(genesis_of(contract(**secure, **four)))
    for run, words in [
        ({**plain, **four}, "secure_aggregation = false.*policy.secure_aggregation"),
        ({**secure, **four, "secure_cohort_min": 3}, "= 3 is less than the 4.*policy.secure_coh"),
    ]:
        with pytest.raises(ConfigError, match=words):
            strict.check_run(genesis_of(contract(**run)))
        settings.check_run(genesis_of(contract(**run)))


def test_the_history_and_snapshots_fit_the_disk(settings: WorkerSettings, tmp_path: Path) -> None:
    genesis = genesis_of(contract(rounds=100_000, local_steps=64, cohort_size_max=4096))
    settings.check_run(genesis)
    keeping = settings.model_copy(update={"journal_copy": tmp_path / "copy.db"})
    with pytest.raises(ConfigError, match=r"may take 104857600000 bytes.* policy.disk_max"):
        keeping.check_run(genesis)
    with pytest.raises(SnapshotError, match=r"has 1000 bytes, more than the 999 .*policy.disk_max"):
        RunPolicy(disk_max=999).check_snapshot(1000)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../models", "./model", "~/model", "a/../b", "a/b/c", "https://host/model",
        "file:///etc", "a b", "a\\b", "", "-x", "owner/", "model\n",
    ],
)  # fmt: skip
def test_a_coordinator_names_no_place_on_this_machine(name: str) -> None:
    genesis = genesis_of(contract().model_copy(update={"model": name}))
    with pytest.raises(ConfigError, match=r"is no name on the hub.* under \[models\]") as refused:
        WorkerSettings(name="w1", data=Path(NOWHERE)).check_run(genesis)
    assert "\n" not in str(refused.value)
    # With a model of its own, a worker needs no name from anyone.
    WorkerSettings(name="w1", data=Path(NOWHERE), model="mine").check_run(genesis)


def test_names_on_the_hub_can_be_narrowed_down() -> None:
    genesis = genesis_of(contract(model="HuggingFaceTB/SmolLM2-135M"))
    for models in [("*",), ("HuggingFaceTB/*",), ("a/b", "HuggingFaceTB/SmolLM2-135M")]:
        RunPolicy(models=models).check(genesis, own_model=False, own_objective=True)
    for models in [(), ("huggingfacetb/*",), ("SmolLM2-135M",)]:
        with pytest.raises(ConfigError, match=r"model = 'HuggingFaceTB/Smol.*add it to policy.mod"):
            RunPolicy(models=models).check(genesis, own_model=False, own_objective=True)


def test_a_name_from_the_run_is_looked_up_at_the_hub_and_not_in_the_working_folder(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_folder: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
) -> None:
    """A worker without `model`, as in the README; its cache holds the base."""
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/tiny").write_text("not a model")
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, int | None]] = []

    def folder_of(name: str, bytes_max: int | None = None) -> Path:
        asked.append((name, bytes_max))
        return model_folder

    monkeypatch.setattr(engine_module, "folder_of_hub_name", folder_of)
    settings = WorkerSettings(name="w1", data=data_files[0], threads=1)
    opened = open_engine(settings, tiny_genesis(model="owner/tiny"))
    assert asked == [("owner/tiny", settings.policy.disk_max)]
    assert opened.party.loaded.folder == model_folder


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that a download needs, over folders below `root`."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._reply(has_body=False)

    def do_GET(self) -> None:
        self._reply(has_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, *, has_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        self.asked.append("/".join(parts))
        if parts[:2] == ["api", "models"]:
            folder = self.root / "/".join(parts[2:4])
            files = [
                {"rfilename": p.name, "size": p.stat().st_size, "blobId": "0" * 40}
                for p in sorted(folder.glob("*"))
            ]
            facts: Any = {"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": files}
            if "tree" in parts:
                facts = [
                    {"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0" * 40}
                    for f in files
                ]
            found, body = folder.is_dir(), json.dumps(facts).encode()
        else:
            file = self.root / "/".join([*parts[:2], *parts[4:]])
            found = file.is_file()
            body = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body) if found else 0))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{len(body):040x}"')
        if not found:
            is_there = (self.root / "/".join(parts[:2])).is_dir()
            self.send_header("X-Error-Code", "EntryNotFound" if is_there else "RepoNotFound")
        self.end_headers()
        if has_body and found:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, model_folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with three models: a sound one, one that is an adapter, one with pickles and code."""
    for name in ("sound", "adapter", "with-pickles"):
        folder = tmp_path / "hub/owner" / name
        folder.mkdir(parents=True)
        for file in model_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    adapter = tmp_path / "hub/owner/adapter/adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": NOWHERE}))
    for unwanted in ("pytorch_model.bin", "modeling.py", "big.safetensors"):
        (tmp_path / "hub/owner/with-pickles" / unwanted).write_text("x")
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


LOADING = """
import sys
from fedmezo_core.errors import ModelError
from fedmezo_core.zo.model import loading
from fedmezo_core.zo.model.loading import folder_of_hub_name, load_model
for name, bytes_max in (("owner/sound", 10), ("owner/sound", 1 << 30), ("owner/adapter", None),
                        ("owner/with-pickles", None), ("owner/nothing", None)):
    try:
        folder = folder_of_hub_name(name, bytes_max)
        load_model(str(folder))
        print(name, "loaded from", *sorted(path.name for path in folder.iterdir()))
    except ModelError as error:
        print(name, error)
loading.hf_hub_url = lambda *_: "http://127.0.0.1:9/config.json"
load_model(str(folder_of_hub_name("owner/sound", 10)))
print("without a network, too")
"""


@pytest.mark.slow
def test_a_model_comes_from_the_hub_within_its_size_and_without_code_and_pickles(
    hub: tuple[str, list[str]], tmp_path: Path, model_folder: Path
) -> None:
    address, asked = hub
    folder = tmp_path / "owner" / "sound"  # Must not be taken for the name.
    folder.mkdir(parents=True)
    ran = subprocess.run(
        [sys.executable, "-c", LOADING],
        cwd=tmp_path,
        env=environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"), NO_PROXY="*"),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 6, ran.stderr
    too_large, sound, adapter, pickles, nothing, again = lines
    assert "more than the 10 that this worker allows" in too_large
    assert "policy.disk_max" in too_large
    names = " ".join(sorted(path.name for path in model_folder.iterdir()))
    assert sound == f"owner/sound loaded from {names}"
    assert "holds an adapter, not a whole model" in adapter
    assert pickles == f"owner/with-pickles loaded from {names}"
    assert "owner/nothing cannot be loaded" in nothing
    assert again == "without a network, too"
    assert not any(path.endswith((".bin", ".py", "big.safetensors")) for path in asked)


# ---------------------------------------------------------------- the settings


def test_the_policy_is_set_like_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(
        'name = "w1"\ndata = "rows.jsonl"\n'
        '[policy]\nrounds_max = 5\nprobes_max = 6\ndisk_max = "2GiB"\nmodels = ["a/*"]\n'
    )
    monkeypatch.setenv("FEDMEZO_WORKER_POLICY__PROBES_MAX", "7")
    arguments = ["--config", str(file), "--policy.batch-size-max", "8"]
    policy = load_settings(WorkerSettings, arguments, program="fedmezo-worker").policy
    assert (policy.rounds_max, policy.probes_max, policy.batch_size_max) == (5, 7, 8)
    assert (policy.disk_max, policy.models) == (2 << 30, ("a/*",))
    with pytest.raises(ConfigError, match=r"policy\.rounds_max = '0' is not allowed: use 1 or"):
        load_settings(
            WorkerSettings, ["--config", str(file), "--policy.rounds-max", "0"], program="w"
        )
    file.write_text('name = "w1"\ndata = "rows.jsonl"\n[policy]\nround_max = 5\n')
    with pytest.raises(ConfigError, match=r"policy\.round_max is not a known setting"):
        load_settings(WorkerSettings, ["--config", str(file)], program="w")


def test_what_the_operator_has_not_named_scores_nothing(settings: WorkerSettings) -> None:
    named = "antigravity:fly"  # Opens a browser when it is imported.
    genesis = genesis_of(contract(task={**TASK, "objective": named}))
    with pytest.raises(ConfigError, match=r"--objective antigravity:fly .*policy.objectives"):
        open_engine(settings, genesis)
    assert "antigravity" not in sys.modules
    for allowing in ({"objective": named}, {"policy": RunPolicy(objectives=(named,))}):
        settings.model_copy(update=allowing).check_run(genesis)


def test_a_ready_made_objective_needs_no_consent_but_may_be_denied(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
) -> None:
    entries = {"error-rate": "fedmezo_core.zo.objectives:error_rate"}
    write_package(tmp_path, "fedmezo", entries)
    monkeypatch.syspath_prepend(tmp_path)
    genesis = tiny_genesis(task={**TASK, "objective": "error-rate"})
    settings = WorkerSettings(name="w1", data=data_files[0], model=str(model_folder), threads=1)
    assert open_engine(settings, genesis).scorer is not None
    naming_another = settings.model_copy(update={"objective": "macro-f1"})
    with pytest.raises(ConfigError, match="by error-rate, not by macro-f1; set --objective error"):
        naming_another.check_run(genesis)
    denying = settings.model_copy(update={"policy": RunPolicy(objectives=())})
    with pytest.raises(ConfigError, match=r"batches by error-rate; .*--objective error-rate"):
        open_engine(denying, genesis)


async def test_what_a_refused_contract_says_does_not_even_reach_the_log(
    tmp_path: Path,
    data_files: list[Path],
    tiny_genesis: Callable[..., Genesis],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    genesis = tiny_genesis(model="a\nWARNING forged line")
    engine = Engine()
    async with served(tmp_path / "journal.db", genesis) as coordinator:
        settings = WorkerSettings(
            coordinator=coordinator.address, name="w1", data=data_files[0], threads=1
        )
        with pytest.raises(ConfigError, match="is no name on the hub"):
            await work(settings, engine)
    await engine.close()
    assert not [line for line in caplog.text.splitlines() if line.startswith("WARNING forged")]
