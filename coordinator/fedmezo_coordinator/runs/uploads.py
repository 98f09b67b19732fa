"""Files that operators send before a run needs them, named by their digests.

A file comes in pieces, in order. Where one goes on is the size of what is there, so an upload that
was cut off goes on after any restart. What no run has used for a while is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from pathlib import Path

from fedmezo_core.errors import ConfigError, NotReadyError, ProtocolError
from fedmezo_core.folders import sync
from fedmezo_proto.v1 import runs_pb2 as wire

PIECE_BYTES_MAX = 48 * 1024
"""Largest piece."""
FILE_BYTES_MAX = 2 << 30
"""Largest file."""
FILES_MAX = 256
"""Most files that are kept for runs to come."""
ALL_BYTES_MAX = 8 << 30
"""Most bytes of all of them."""
KEPT_S = 24 * 3600.0
"""Time after which a file is removed if no piece of it has come, and no run has used it."""
PARTIAL = ".part"
"""Ending of a file that is not all there."""


class Uploads:
    """The folder of the files; any thread may call."""

    def __init__(self, folder: Path) -> None:
        """The folder is made, for its owner only, when it is needed."""
        self._folder = folder
        self._lock = threading.Lock()

    def take(self, request: wire.UploadFileRequest) -> int:
        """Take a piece; returns where the next one begins, `file_bytes` once all is there.

        A piece that does not begin where the file ends is left out. Raises `ProtocolError` for a
        file whose digest is another, `ConfigError` for one that is too large, and `NotReadyError`
        if there is no room.
        """
        _check(request)
        with self._lock:
            try:
                return self._take(request)
            except OSError as error:
                raise NotReadyError(
                    f"The coordinator cannot keep the file ({error.strerror}); make room at its "
                    "disk, then try again."
                ) from None

    def _take(self, request: wire.UploadFileRequest) -> int:
        whole = self._folder / request.sha256.hex()
        partial = whole.with_name(whole.name + PARTIAL)
        if whole.exists():
            os.utime(whole)
            return request.file_bytes
        there = partial.stat().st_size if partial.exists() else 0
        if not request.data or request.offset != there:
            return there
        if not there:
            self._make_room(request.file_bytes)
        descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(request.data)
        there += len(request.data)
        if there < request.file_bytes:
            return there
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").digest()
        if there != request.file_bytes or digest != request.sha256:
            partial.unlink()
            raise ProtocolError(
                "The pieces of the file do not have its digest: it changed while it was sent; "
                "send it again."
            )
        sync(partial)
        partial.rename(whole)
        sync(self._folder)
        return there

    def _make_room(self, file_bytes: int) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._sweep()
        sizes = [path.stat().st_size for path in self._folder.iterdir()]
        if len(sizes) >= FILES_MAX or sum(sizes) + file_bytes > ALL_BYTES_MAX:
            raise NotReadyError(
                f"The coordinator keeps at most {FILES_MAX} files of {ALL_BYTES_MAX >> 30} GiB "
                f"together for runs to come; those that no run uses go after {KEPT_S / 3600:.0f} h."
            )

    def sweep(self) -> None:
        """Remove what has been unused for `KEPT_S`."""
        with self._lock, contextlib.suppress(OSError):
            self._sweep()

    def _sweep(self) -> None:
        oldest_s = time.time() - KEPT_S
        for path in self._folder.iterdir():
            if path.stat().st_mtime < oldest_s:
                path.unlink()

    def place(self, file: wire.RunFile, target: Path) -> None:
        """Put an uploaded file at `target`; raises `ConfigError` if it is not there whole."""
        whole = self._folder / file.sha256.hex()
        if len(file.sha256) != 32 or not whole.exists():
            raise ConfigError(f"The file {file.name} has not been uploaded; upload it first.")
        if whole.stat().st_size != file.file_bytes:
            raise ConfigError(f"The file {file.name} has {whole.stat().st_size} bytes.")
        os.utime(whole)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.link(whole, target)


def _check(request: wire.UploadFileRequest) -> None:
    if len(request.sha256) != 32:
        raise ProtocolError("A file is named by its SHA-256 digest, which has 32 bytes.")
    if not 0 < request.file_bytes <= FILE_BYTES_MAX:
        raise ConfigError(
            f"A file of {request.file_bytes} bytes cannot be uploaded; it has 1 to "
            f"{FILE_BYTES_MAX >> 30} GiB."
        )
    if len(request.data) > PIECE_BYTES_MAX or request.offset > request.file_bytes:
        raise ProtocolError(
            f"A piece has at most {PIECE_BYTES_MAX} bytes and lies within its file."
        )
