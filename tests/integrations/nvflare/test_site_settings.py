"""Where a site finds its own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmezo_core.errors import ConfigError
from fedmezo_nvflare.site_settings import load_site_settings


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Where NVFlare puts the script of a job: below the site's workspace."""
    folder = tmp_path / "site-1/job/app_site-1/custom"
    folder.mkdir(parents=True)
    return folder / "site_script.py"


def settings_file(script: Path, text: str) -> None:
    local = script.parents[3] / "local"
    local.mkdir()
    (local / "fedmezo.toml").write_text(text)


def test_from_the_sites_own_folder(script: Path) -> None:
    settings_file(script, 'data = "/rows/{site}.jsonl"\nmodel = "/models/tiny"\nthreads = 2')
    settings = load_site_settings("site-1", script)
    assert (settings.data, settings.model) == ("/rows/site-1.jsonl", "/models/tiny")
    assert settings.threads == 2


def test_the_environment_comes_first(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file(script, 'data = "/rows/{site}.jsonl"\nthreads = 2')
    monkeypatch.setenv("FEDMEZO_SITE_DATA", "/other/{site}.csv")
    settings = load_site_settings("site-2", script)
    assert (settings.data, settings.threads) == ("/other/site-2.csv", 2)


def test_a_file_elsewhere(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file(script, "nonsense = 1")
    (tmp_path / "other.toml").write_text('data = "rows.jsonl"')
    monkeypatch.setenv("FEDMEZO_SITE_CONFIG", str(tmp_path / "other.toml"))
    assert load_site_settings("site-1", script).data == "rows.jsonl"


def test_no_rows_named(script: Path) -> None:
    with pytest.raises(ConfigError, match="data"):
        load_site_settings("site-1", script)


def test_a_setting_that_does_not_exist(script: Path) -> None:
    settings_file(script, 'data = "x"\ncolour = "red"')
    with pytest.raises(ConfigError, match="colour"):
        load_site_settings("site-1", script)
