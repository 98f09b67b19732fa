"""What a site does in a job: it passes what comes to the process that holds its model, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel

from fedmezo import decode_genesis
from fedmezo_core.errors import FedMezoError
from fedmezo_nvflare.model_process import ModelProcess
from fedmezo_nvflare.site_exchanges import CLIP, DOWN, GENESIS, LEFT, UP

log = logging.getLogger("fedmezo.nvflare")


class Process(Protocol):
    """What a site needs of a `ModelProcess`."""

    def exchange(self, down: bytes) -> bytes:
        """One exchange."""

    def close(self) -> None:
        """End it."""


class Site:
    """A site's part in one job: tasks in, replies out."""

    def __init__(self, open_process: Callable[[bytes], Process]) -> None:
        """`open_process` starts what computes, for the genesis of the run."""
        self._open_process = open_process
        self._process: Process | None = None
        self._clip = 0.0

    def reply(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a task; it is empty if the site does not know the run yet.

        If the site cannot take part, the reply says so, and the site's log says why.
        """
        try:
            if self._process is None:
                genesis = task.get(GENESIS)
                if genesis is None:
                    return {UP: b""}
                self._clip = decode_genesis(genesis).config.projected_grad_abs_max
                self._process = self._open_process(genesis)
            return {UP: self._process.exchange(task[DOWN]), CLIP: self._clip}
        except FedMezoError as error:
            log.error("this site leaves the job: %s", error)
            self.close()
            return {LEFT: True}

    def close(self) -> None:
        """End what computes."""
        if self._process is not None:
            self._process.close()
            self._process = None


def main(folder: Path) -> None:
    """Take part in the job whose folder is `folder`, until NVFlare ends it."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    flare.init()
    name = flare.get_site_name()
    with closing(Site(lambda genesis: ModelProcess.of(genesis, name, folder))) as site:
        while flare.is_running():
            task = flare.receive()
            if task is None:
                break
            flare.send(FLModel(params=site.reply(task.params)))
