"""Checks of this machine: folders, disks, memory, ports, certificates and the clock."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedmezo.preflight.check_report import Report, duration, size
from fedmezo_core.errors import IdentityError
from fedmezo_core.wire.enrolment import check_served_time, served_certificates

CLOCK_DIFFERENCE_MAX_S: Final = 300.0
"""Difference of two clocks from which on a person should know of it."""
FREE_AFTER_BYTES: Final = 1 << 30
"""What a disk should have left when all is written."""
MEMORY_SHARE_MAX: Final = 0.8
"""Share of the free memory from which on a program may be ended for the sake of another."""


def check_folder(report: Report, what: str, folder: Path, needed_bytes: int) -> None:
    """Whether files can be made in `folder`, or it itself, and the disk has room for them.

    what: what will be written there, for the person.
    """
    folder = folder.expanduser().absolute()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        report.failure("disk", f"{what}: {there} is a file, not a folder; name another path.")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        report.failure(
            "disk",
            f"{what}: this user may not write to {there}; change its rights, or name another path.",
        )
        return
    free = shutil.disk_usage(there).free
    values = {"path": str(folder), "free_bytes": free, "needed_bytes": needed_bytes}
    said = f"{what} in {folder}: {size(free)} free, up to {size(needed_bytes)} needed"
    if free < needed_bytes:
        report.failure("disk", f"{said}; make room, or name a folder on another disk.", **values)
    elif free < needed_bytes + FREE_AFTER_BYTES:
        report.warning("disk", f"{said}; little is left after that, so make room.", **values)
    else:
        report.ok("disk", said, **values)


def check_port(report: Report, what: str, address: str) -> None:
    """Whether a program can listen at `address` now; nothing listens there afterwards."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, protocol, _, bound in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(bound)
    except OSError as error:
        report.failure(
            "port",
            f"{what} cannot listen at {address} ({error.strerror}); end the program that does, or "
            "choose another port or address.",
        )
    else:
        report.ok("port", f"{what} can listen at {address}")


def check_memory(report: Report, what: str, peak_bytes: int, available_bytes: int | None) -> None:
    """Whether what was needed leaves this machine some memory.

    available_bytes: what was free before, of the machine or of this process's group; None: nobody
    says.
    """
    values = {"peak_bytes": peak_bytes, "available_bytes": available_bytes}
    said = f"{what} took up to {size(peak_bytes)}"
    if available_bytes is None:
        report.ok("memory", said, **values)
        return
    said += f" of {size(available_bytes)} that were free"
    if peak_bytes > MEMORY_SHARE_MAX * available_bytes:
        report.warning(
            "memory",
            f"{said}; the system may end it when others need memory, so end other programs or use "
            "smaller batches.",
            **values,
        )
    else:
        report.ok("memory", said, **values)


def model_is_here(name_or_path: str) -> bool:
    """Whether a model is a folder of this machine, or in the local cache of the hub's models."""
    if name_or_path.startswith((".", "/", "~")) or Path(name_or_path).exists():
        return True  # Or a wrong path, which a check names when it loads the model.
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return True  # Nothing can be loaded at all, which a check says then.
    return isinstance(try_to_load_from_cache(name_or_path, "config.json"), str)


def check_certificate(report: Report, address: str) -> None:
    """Whether the certificates that are shown at `address` are valid by this machine's clock."""
    try:
        chain = served_certificates(address)
    except OSError as error:
        report.warning(
            "certificate",
            f"The certificate of {address} could not be read ({error}); check that it serves TLS.",
        )
        return
    try:
        for certificate in chain:
            check_served_time(address, ssl.DER_cert_to_PEM_cert(certificate).encode())
    except IdentityError as error:
        report.failure("certificate", str(error))
    else:
        report.ok("certificate", f"{address} shows certificates that are valid now")


def check_clock(report: Report, theirs_ms: int, clock_s: Callable[[], float] = time.time) -> None:
    """Whether this machine's clock and that of the coordinator (0: unknown) agree."""
    if not theirs_ms:
        return
    difference_s = clock_s() - theirs_ms / 1000
    values = {"ahead_s": round(difference_s, 3)}
    if abs(difference_s) <= CLOCK_DIFFERENCE_MAX_S:
        report.ok("clock", "This machine's clock and the coordinator's agree", **values)
        return
    how = "ahead of" if difference_s > 0 else "behind"
    report.failure(
        "clock",
        f"This machine's clock is {duration(abs(difference_s))} {how} the coordinator's, so "
        "certificates will seem to be of another time; set the one that is wrong, for example with "
        "timedatectl set-ntp true.",
        **values,
    )
