"""The settings of one site: its model, its rows and how it computes; no job can set them."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedmezo_core.layered_settings import UserPathText, load_settings

SETTINGS_FILE = Path("local/fedmezo.toml")
"""Where a site's own settings lie, from the root of its NVFlare workspace."""
PREFIX = "FEDMEZO_SITE_"


class SiteSettings(BaseSettings):
    """What a site's operator sets, in FEDMEZO_SITE_* or in local/fedmezo.toml of its workspace.

    `{site}` in a path is the site's name, so that several sites of one machine can share them.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    data: UserPathText = Field(
        description="the site's private rows: a JSONL, CSV or Parquet file, or a folder of them"
    )
    model: UserPathText = Field(
        default="", description="model folder or hub name, if not the name that the run gives"
    )
    adapter: UserPathText = Field(
        default="", description="folder of the adapter that the run begins from, if it does"
    )
    objective: str = Field(
        default="",
        description="the module:function of the run's objective: its code runs here, on these rows",
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads")
    device: str = Field(
        default="auto",
        description="auto (a CUDA device if there is one), cpu, cuda or cuda:1: where to compute",
    )
    frozen_base_bits: int | None = Field(
        default=None,
        description="in a run with lora: keep the frozen base in 8 or 4 bits, with bitsandbytes",
    )

    def at(self, site: str) -> SiteSettings:
        """These settings with the site's name in its place."""
        named = {
            key: value.replace("{site}", site)
            for key, value in self
            if key in ("data", "model", "adapter")
        }
        return self.model_copy(update=named)


def load_site_settings(site: str, folder: Path) -> SiteSettings:
    """The settings of the site in whose workspace `folder` is; raises `ConfigError`.

    The environment comes before the file, which FEDMEZO_SITE_CONFIG may name.
    """
    arguments = []
    if f"{PREFIX}CONFIG" not in os.environ:
        files = (above / SETTINGS_FILE for above in folder.resolve().parents)
        found = next((file for file in files if file.is_file()), None)
        arguments = [] if found is None else ["--config", str(found)]
    return load_settings(SiteSettings, arguments, program="fedmezo-site").at(site)
