"""Flower's own programs, with an app and a home of a test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.integration.support.harness import Program, Programs, free_port, toml_of

# Flower asks its makers for updates and tells them of runs, unless it is told not to.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
QUICK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}


class Flower:
    """A SuperLink and the SuperNodes of it."""

    def __init__(self, programs: Programs, home: Path) -> None:
        self._programs = programs
        self._runs = 0
        self._environment = {"FLWR_HOME": str(home), **QUIET, **QUICK}
        self.address = f"127.0.0.1:{free_port()}"
        home.mkdir()
        connection = {"address": self.address, "insecure": True}
        (home / "config.toml").write_text(
            toml_of({"superlink": {"default": "local", "local": connection}})
        )

    async def started(self) -> None:
        """Start the SuperLink, and wait until it serves."""
        port = self.address.rpartition(":")[2]
        link = self._script(
            "flower-superlink",
            *("--insecure", "--port", port, "--disable-runtime-dependency-installation"),
        )
        await link.says("Uvicorn running on")

    def node(self, address: str = "", **config: Path) -> Program:
        """Start a SuperNode with this configuration; it connects to `address`, if that is given."""
        return self._script(
            "flower-supernode",
            *("--insecure", "--superlink", address or self.address, "--port", str(free_port())),
            "--node-config",
            " ".join(f"{key.replace('_', '-')}={json.dumps(str(v))}" for key, v in config.items()),
        )

    def run(self, app: Path, values: dict[str, Any]) -> Program:
        """Run an app with these values in its configuration."""
        self._runs += 1
        path = self._programs.folder / f"run-config-{self._runs}.toml"
        path.write_text(toml_of(values))
        return self._script("flwr", "run", app, "local", "--stream", "--run-config", path)

    def _script(self, name: str, *arguments: str | Path) -> Program:
        return self._programs.start_script(name, *arguments, **self._environment)
