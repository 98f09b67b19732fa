"""The process of a site that holds its model: it stays for the whole job, and is started again.

NVFlare ends a site's part in a job with the first end of its script. So the script holds nothing
that a lack of memory or a failing device could end, and this process holds the model.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from fedmezo import Session, decode_genesis
from fedmezo_core.errors import (
    DivergedError,
    FedMezoError,
    ModelError,
    NotReadyError,
    UnavailableError,
)
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.program import worker_packages
from fedmezo_core.trust.secure_aggregation.sum_memory import SumMemory
from fedmezo_core.wire.admission import check_run_id
from fedmezo_nvflare.site_exchanges import worker_name
from fedmezo_nvflare.site_settings import site_arguments, site_environment
from fedmezo_worker.worker_command import check_paths, computer_opener
from fedmezo_worker.worker_settings import WorkerSettings

log = logging.getLogger("fedmezo.nvflare")

ENDS_MAX = 3
"""So many ends without a single exchange between them are the last."""
STOP_S = 5.0
"""How long the process may take to end by itself."""
_UP, _ERROR = b"u", b"e"


class Exchanging(Protocol):
    """What an exchange needs of a `fedmezo.Session`."""

    @property
    def round(self) -> int:
        """Last round whose commit came."""

    def exchange(self, down: bytes = b"") -> bytes:
        """Take what came down, and give what goes up."""

    def disconnect(self) -> None:
        """Forget the session with the coordinator, but not the weights."""


def exchanged(session: Exchanging, down: bytes) -> bytes:
    """One exchange; if the coordinator could not take the last one, the session greets again."""
    try:
        return session.exchange(down)
    except (UnavailableError, NotReadyError) as error:
        log.warning("%s", error)
        session.disconnect()
        return session.exchange(b"")


class ModelProcess:
    """Runs the process, starts it again if it ends, and ends it on `close`."""

    def __init__(
        self,
        program: Sequence[str],
        opening: Sequence[bytes],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`program` gets the number of its end of a pipe as an argument, and `opening` over it.

        environment: the program's; None: that of this process.
        """
        self._environment = environment
        self._program = tuple(program)
        self._opening = tuple(opening)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ends = 0

    @classmethod
    def of(cls, genesis: bytes, site: str, folder: Path) -> ModelProcess:
        """The worker of a site in the run that begins with `genesis`.

        `folder` is below the site's workspace, which has its settings.
        """
        arguments = json.dumps([*site_arguments(folder), "--name", worker_name(site)])
        return cls(
            (sys.executable, "-m", __name__),
            (arguments.encode(), genesis),
            site_environment(site, os.environ),
        )

    def exchange(self, down: bytes) -> bytes:
        """One exchange of the session in the process, which may take as long as a measurement.

        Raises the session's error as a `FedMezoError`, and `ModelError` if the process does not
        stay alive.
        """
        while True:
            try:
                pipe = self._started()
                pipe.send_bytes(down)
                said = pipe.recv_bytes()
            except (EOFError, OSError):
                self._ended()
                down = b""  # The new process greets, and is told everything.
                continue
            if said[:1] == _ERROR:
                raise FedMezoError(said[1:].decode())
            self._ends = 0
            return said[1:]

    def close(self) -> None:
        """End the process; it ends by itself once its pipe is closed, unless it computes."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _started(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            with theirs:
                number = theirs.fileno()
                self._process = subprocess.Popen(
                    (*self._program, str(number)),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(number,),
                    env=self._environment,
                )
            for part in self._opening:
                self._pipe.send_bytes(part)
        return self._pipe

    def _ended(self) -> None:
        self.close()
        status = None if self._process is None else self._process.returncode
        self._ends += 1
        if self._ends >= ENDS_MAX:
            raise ModelError(
                f"The process that holds the model ended {self._ends} times in a row, at last with "
                f"status {status}; read what it wrote to this site's log."
            )
        log.warning("the process that holds the model ended with status %s: restarting", status)


def serve(pipe: Connection, open_session: Callable[[], Exchanging]) -> None:
    """Exchange until the other end of the pipe is closed. The session opens with the first one.

    Weights that are not the run's are rebuilt from the base once: nobody is there to restart this.
    """
    session: Exchanging | None = None
    round_, has_rebuilt = 0, False
    while True:
        try:
            down = pipe.recv_bytes()
            try:
                if session is None:
                    session = open_session()
                up = b""
                try:
                    up = exchanged(session, down)
                except DivergedError as error:
                    if has_rebuilt:
                        raise
                    log.warning("%s The weights are rebuilt from the base.", error)
                    has_rebuilt = True
                if not up:
                    session = None
                    gc.collect()  # One model at a time has room.
                    session = open_session()
                    up = session.exchange(b"")
                if session.round != round_:
                    round_ = session.round
                    log.info("holds round %d", round_)
                said = _UP + up
            except FedMezoError as error:
                said = _ERROR + str(error).encode()
            pipe.send_bytes(said)
        except (EOFError, OSError):
            return


def main(number: str) -> None:
    """The program: take part with the model and the rows that the site's settings name."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s"
    )
    logging.getLogger("fedmezo").setLevel(logging.INFO)
    pipe = Connection(int(number))
    arguments, genesis = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
    sum_memory = SumMemory()
    serve(pipe, lambda: _open_session(genesis, arguments, sum_memory))


def _open_session(genesis_bytes: bytes, arguments: Sequence[str], sum_memory: SumMemory) -> Session:
    settings = load_settings(WorkerSettings, arguments, program="fedmezo-worker")
    check_paths(settings)
    genesis = decode_genesis(genesis_bytes)
    check_run_id(settings.run_id, genesis.config.run_id)
    with worker_packages("measure at a site"):
        from fedmezo_core.zo.model.allocator import keep_freed_memory

        keep_freed_memory()
        open_computer = computer_opener(settings)
    return Session(
        genesis_bytes, settings.name, open_computer(settings, genesis), sum_memory=sum_memory
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
