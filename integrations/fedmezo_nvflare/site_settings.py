"""Where a site's own settings come from: model, rows and how it computes; no job can set them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedmezo_worker.worker_settings import WorkerSettings

SETTINGS_FILE = Path("local/fedmezo-worker.toml")
"""Where they lie, from the root of a site's NVFlare workspace: a settings file of a worker."""
PREFIX = str(WorkerSettings.model_config.get("env_prefix"))


def site_environment(site: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a site's worker: `{site}` in its settings is the site's name.

    So several sites on one machine can share them.
    """
    return {
        key: value.replace("{site}", site) if key.startswith(PREFIX) else value
        for key, value in environment.items()
    }


def site_arguments(folder: Path) -> list[str]:
    """The arguments that name the settings file of the site in whose workspace `folder` is.

    There are none if the environment names another file, or if there is no file.
    """
    if f"{PREFIX}CONFIG" in os.environ:
        return []
    files = (above / SETTINGS_FILE for above in folder.resolve().parents)
    found = next((file for file in files if file.is_file()), None)
    return [] if found is None else ["--config", str(found)]
