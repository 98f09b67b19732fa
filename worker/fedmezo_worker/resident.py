"""A worker that stays, for stacks that start a process for each message and end it afterwards.

The worker listens on a socket in its machine's file system, which only its own user may open. Each
connection carries one request and one reply. Neither `ask` nor this module loads torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from fedmezo_core import errors
from fedmezo_core.errors import (
    ConfigError,
    FedMezoError,
    NotReadyError,
    ProtocolError,
    UnavailableError,
)
from fedmezo_worker.offers.told_to_others import told_to_others

log = logging.getLogger("fedmezo.worker")

PART_BYTES_MAX: Final = 64 << 20
"""Largest part of a request or reply, in bytes; late workers get many commits at once."""
REQUEST_WITHIN_S: Final = 60.0
"""Time that a caller has for its request, from the connection on."""
_LENGTH: Final = struct.Struct(">I")
_SPOKEN: Final = b"fedmezo resident worker 1"
"""What each request begins with."""
_REQUEST_PARTS: Final = 4
_REPLY_PARTS: Final = 3


class Exchanging(Protocol):
    """The part of `fedmezo.Session` that a resident worker needs."""

    def exchange(self, down: bytes = b"") -> bytes:
        """Take what came from the coordinator; returns what goes up to it."""

    def cut_short(self) -> None:
        """End the running measurement before its next pass; any thread may call this."""


# ---------------------------------------------------------------- the side that asks


def ask(path: Path, job: str, genesis: bytes, down: bytes) -> tuple[str, bytes]:
    """Hand the coordinator's bytes to the resident worker at `path`.

    `job` is the stack's name of this run; with another one, the worker begins from the base again.
    `genesis` is the run's first record. Returns the worker's name and the bytes for the
    coordinator, as soon as everything is measured. Raises `UnavailableError` if no worker listens
    there or it ends meanwhile, and otherwise an error of the class that the worker met. The
    stack may carry its sentence to the server, so it names no path; the log of this process does.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(path))
        except OSError as error:
            log.warning("nothing listens on %s: %s", path, error)
            raise UnavailableError(
                f"No resident worker listens on this node's socket ({error.strerror or error}); "
                "start one on this machine, as the same user: fedmezo-worker --serve SOCKET "
                "--name NAME --model MODEL --data DATA"
            ) from None
        try:
            connection.sendall(b"".join(map(_framed, (_SPOKEN, job.encode(), genesis, down))))
            with connection.makefile("rb") as stream:
                name, worker, up = (_read(stream.read) for _ in range(_REPLY_PARTS))
        except (OSError, EOFError):
            log.warning("the worker on %s ended before it replied", path)
            raise UnavailableError(
                "This node's resident worker ended before it replied; look at its log, and start "
                "it again."
            ) from None
    if name:
        raise _error_of(name.decode(errors="replace"), up.decode(errors="replace"))
    return worker.decode(errors="replace"), up


def _error_of(name: str, sentence: str) -> FedMezoError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FedMezoError):
        return kind(sentence)
    return UnavailableError(sentence)


def _framed(part: bytes) -> bytes:
    return _LENGTH.pack(len(part)) + part


def _read(read: Callable[[int], bytes]) -> bytes:
    """The next part of a stream; raises `EOFError` if it ends within."""

    def exactly(count: int) -> bytes:
        found = read(count)
        if len(found) < count:
            raise EOFError
        return found

    (length,) = _LENGTH.unpack(exactly(_LENGTH.size))
    return exactly(_checked(length))


def _checked(length: int) -> int:
    if length > PART_BYTES_MAX:
        raise _other_version()
    return length


def _other_version() -> ProtocolError:
    return ProtocolError(
        "The two sides of a resident worker's socket do not understand each other; use the same "
        "FedMeZO version for the worker and for the app."
    )


# ---------------------------------------------------------------- the side that stays


class ResidentWorker:
    """Answers one request after another with the session of the run that the request names."""

    def __init__(self, name: str, open_session: Callable[[bytes], Exchanging]) -> None:
        """`open_session` gives the session of this worker in the run with that genesis."""
        self._name = name
        self._open_session = open_session
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="resident")
        self._of = (b"", b"")
        """Job and genesis of the session."""
        self._session: Exchanging | None = None
        self._is_ending = False

    @contextlib.asynccontextmanager
    async def listening_on(self, path: Path) -> AsyncIterator[None]:
        """Listen on `path` while the block runs; raises `ConfigError` if that cannot be done."""
        try:
            with _bound(path) as listening:
                async with await asyncio.start_unix_server(self._reply_to, sock=listening):
                    log.info("worker %s listens on %s", self._name, path)
                    try:
                        yield
                    finally:
                        self._end_work()  # The server waits for its connections when it closes.
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _reply_to(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled where the worker ends; whoever asked then sees that the connection is closed.
        gone = contextlib.suppress(OSError, asyncio.CancelledError)
        with contextlib.closing(writer), gone:
            try:
                async with asyncio.timeout(REQUEST_WITHIN_S):
                    spoken = await _received(reader)
                    if spoken != _SPOKEN:
                        raise _other_version()
                    job, genesis, down = [
                        await _received(reader) for _ in range(_REQUEST_PARTS - 1)
                    ]
                loop = asyncio.get_running_loop()
                up = await loop.run_in_executor(self._thread, self._exchange, job, genesis, down)
                reply = (b"", self._name.encode(), up)
            except (asyncio.IncompleteReadError, TimeoutError):
                return
            except FedMezoError as error:
                log.warning("%s", error)
                said = told_to_others(error, self._name)
                reply = (type(error).__name__.encode(), b"", said.encode())
            except Exception as error:
                log.exception("this request failed")
                reply = (b"UnavailableError", b"", told_to_others(error, self._name).encode())
            writer.write(b"".join(map(_framed, reply)))
            await writer.drain()

    def _exchange(self, job: bytes, genesis: bytes, down: bytes) -> bytes:
        """Exchange bytes in the run with that genesis; runs on the worker's thread."""
        if self._session is None or self._of != (job, genesis):
            self._session = None
            gc.collect()  # One model at a time has room.
            self._session = self._open_session(genesis)
            self._of = (job, genesis)
        self._check_stays()
        begin_s = time.monotonic()
        try:
            up = self._session.exchange(down)
        except (UnavailableError, NotReadyError):
            raise
        except BaseException:
            log.warning("the next request begins from the base again")
            self._session = None
            raise
        self._check_stays()
        log.info("a message was answered in %.1f s", time.monotonic() - begin_s)
        return up

    def _end_work(self) -> None:
        """Cut the running measurement short, and answer no more requests."""
        self._is_ending = True
        if self._session is not None:
            self._session.cut_short()

    def _check_stays(self) -> None:
        if self._is_ending:
            raise UnavailableError(f"Worker {self._name} was told to end; start it again.")


async def _received(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(_checked(length))


@contextlib.contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """A socket that listens on `path` and that only this user may open; removed afterwards."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listening:
        try:
            if path.is_socket():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    if probe.connect_ex(str(path)) == 0:
                        raise ConfigError(
                            f"Another worker listens on {path}; end it, or set another serve."
                        )
                path.unlink()  # A worker that was killed left it behind.
            before = os.umask(0o177)
            try:
                listening.bind(str(path))
                listening.listen()
            finally:
                os.umask(before)
            mine = path.stat().st_ino
        except OSError as error:
            raise ConfigError(
                f"serve: nothing can listen on {path} ({error.strerror or error}); set a short "
                "path in a folder of your own."
            ) from None
        try:
            yield listening
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == mine:
                    path.unlink()
