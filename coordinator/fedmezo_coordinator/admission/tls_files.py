"""The files that a server's TLS uses, read anew when they change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedmezo_core.errors import ConfigError

log = logging.getLogger("fedmezo.coordinator")


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What a handshake takes, all in PEM."""

    key: bytes
    chain: bytes
    """The server's certificate and what leads to its CA."""
    client_ca: bytes = b""
    """The CA of the clients' certificates; empty: clients need none."""


class TlsFiles:
    """A certificate and key in two files, with what goes with them."""

    def __init__(
        self, certificate: Path, key: Path, client_ca: bytes = b"", chain_end: bytes = b""
    ) -> None:
        """`client_ca` is the CA, in PEM, whose certificates clients must show; empty: none.

        `chain_end` is sent after the certificates of the file. Raises `ConfigError` for files that
        cannot be used.
        """
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._chain_end = chain_end
        self._found = self._stamps()
        self._complaint = ""
        self.material = self._read()

    def changed(self) -> bool:
        """Read the files anew if they changed; returns whether `material` is another now.

        Files that cannot be used, perhaps because only one of the two is new yet, change nothing,
        and the log says so once.
        """
        stamps = self._stamps()
        if stamps == self._found:
            return False
        try:
            self.material = self._read()
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("the certificate from before is served on: %s", error)
            return False
        self._found, self._complaint = stamps, ""
        log.info("new connections get the certificate that %s holds now", self._certificate)
        return True

    def _stamps(self) -> list[tuple[int, int, int]]:
        stamps = []
        for path in (self._certificate, self._key):
            try:
                found = path.stat()
            except OSError:
                continue
            stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return stamps

    def _read(self) -> TlsMaterial:
        certificate, key = self._certificate, self._key
        try:
            material = TlsMaterial(
                key.read_bytes(), certificate.read_bytes() + self._chain_end, self._client_ca
            )
            # gRPC would only say that it cannot listen. The empty password avoids a prompt.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            raise ConfigError(
                f"{certificate} and {key} are not a PEM certificate chain and its unencrypted key "
                f"({error.reason or error}); check tls_cert and tls_key."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"The TLS file {error.filename} cannot be read ({error.strerror}); "
                "check tls_cert and tls_key."
            ) from None
        return material
