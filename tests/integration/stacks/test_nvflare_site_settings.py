"""Where a site finds its own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmezo import encode_genesis
from fedmezo_core.errors import ConfigError, FedMezoError
from fedmezo_core.layered_settings import load_settings
from fedmezo_nvflare.model_process import ModelProcess
from fedmezo_nvflare.site_settings import site_arguments, site_environment
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import config_of, environment, genesis_of


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """Where NVFlare runs the script of a job: below the site's workspace."""
    folder = tmp_path / "site-1/job/app_site-1"
    folder.mkdir(parents=True)
    return folder


def settings_file(job_folder: Path, text: str) -> None:
    local = job_folder.parents[1] / "local"
    local.mkdir()
    (local / "fedmezo-worker.toml").write_text(text)


def load(job_folder: Path) -> WorkerSettings:
    arguments = [*site_arguments(job_folder), "--name", "site-1"]
    return load_settings(WorkerSettings, arguments, program="fedmezo-worker")


def test_from_the_sites_own_folder(job_folder: Path) -> None:
    settings_file(job_folder, 'data = "rows.jsonl"\nmodel = "/models/tiny"\nthreads = 2')
    settings = load(job_folder)
    assert (settings.data, settings.model) == (Path("rows.jsonl"), "/models/tiny")
    assert (settings.name, settings.threads) == ("site-1", 2)


def test_a_file_that_the_environment_names(
    job_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file(job_folder, "nonsense = 1")
    (tmp_path / "other.toml").write_text('data = "other.csv"')
    monkeypatch.setenv("FEDMEZO_WORKER_CONFIG", str(tmp_path / "other.toml"))
    assert load(job_folder).data == Path("other.csv")


def test_a_setting_that_does_not_exist(job_folder: Path) -> None:
    settings_file(job_folder, 'data = "x"\ncolour = "red"')
    with pytest.raises(ConfigError, match="colour"):
        load(job_folder)


def test_the_sites_name_in_the_environment() -> None:
    given = {"FEDMEZO_WORKER_DATA": "/rows/{site}.csv", "OTHER": "{site}"}
    expected = {"FEDMEZO_WORKER_DATA": "/rows/site-2.csv", "OTHER": "{site}"}
    assert site_environment("site-2", given) == expected


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DATA", "", "data"),
        ("DATA", "nowhere/{site}.jsonl", "no data file or folder nowhere/Site_1.jsonl"),
        ("RUN_ID", "another", "another"),
    ],
)
def test_settings_that_cannot_be_used_are_told_in_one_sentence(
    job_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    for key, text in environment().items():
        monkeypatch.setenv(key, text)
    (job_folder / "rows.jsonl").touch()
    settings = {"DATA": str(job_folder / "rows.jsonl"), name: value}
    for key, text in settings.items():
        if text:
            monkeypatch.setenv(f"FEDMEZO_WORKER_{key}", text)
    process = ModelProcess.of(encode_genesis(genesis_of(config_of())), "Site_1", job_folder)
    with pytest.raises(FedMezoError, match=sentence):
        process.exchange(b"")
    process.close()
