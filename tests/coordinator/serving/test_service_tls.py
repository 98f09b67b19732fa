"""TLS between real ends, and what each side says when the other does not speak it."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import pytest
import trustme

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs import coordinator_command as cli
from fedmezo_coordinator.serving import hosting
from fedmezo_core.errors import ConfigError, StartingError, UnavailableError
from fedmezo_core.wire.client import CoordinatorClient
from tests.integration.support.harness import (
    config_of,
    genesis_of,
    run_values,
    served,
    until,
    write_genesis,
)

GENESIS = genesis_of(config_of())


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate chain and key of 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    pair = ca.issue_cert("127.0.0.1")
    pair.private_key_pem.write_to_path(folder / "key.pem")
    for blob in pair.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


async def test_a_client_that_trusts_the_ca_is_served(
    tls: tuple[Path, Path], ca_file: Path, tmp_path: Path
) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS, tls=tls) as at,
        CoordinatorClient(at.address, ca_file) as client,
    ):
        assert (await client.get_run()).genesis == GENESIS


async def test_a_plain_client_is_told_to_set_the_ca(tls: tuple[Path, Path], tmp_path: Path) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS, tls=tls) as at,
        CoordinatorClient(at.address) as client,
    ):
        with pytest.raises(
            UnavailableError, match=r"or only TLS \(then set tls or tls_ca\)"
        ) as caught:
            await client.get_run()
        assert at.address in str(caught.value)


async def test_a_tls_client_of_a_plain_coordinator_is_told_so(
    ca_file: Path, tmp_path: Path
) -> None:
    async with (
        served(tmp_path / "j.db", GENESIS) as at,
        CoordinatorClient(at.address, ca_file) as client,
    ):
        with pytest.raises(UnavailableError, match="whether its certificate is of that CA"):
            await client.get_run()


async def test_a_client_of_another_ca_is_not_served(tls: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    async with (
        served(tmp_path / "j.db", GENESIS, tls=tls) as at,
        CoordinatorClient(at.address, other) as client,
    ):
        with pytest.raises(UnavailableError, match="whether its certificate is of that CA"):
            await client.get_run()


@pytest.mark.parametrize("which", ["cert", "key"])
async def test_tls_files_that_cannot_be_used_are_named(
    tls: tuple[Path, Path], tmp_path: Path, which: str
) -> None:
    damaged = tmp_path / f"{which}.pem"
    pair = (damaged, tls[1]) if which == "cert" else (tls[0], damaged)
    with pytest.raises(ConfigError, match=f"{damaged} cannot be read"):
        async with served(tmp_path / "j1.db", GENESIS, tls=pair):
            pass
    damaged.write_text("no PEM")
    with pytest.raises(
        ConfigError, match="are not a PEM certificate chain and its unencrypted key"
    ):
        async with served(tmp_path / "j2.db", GENESIS, tls=pair):
            pass


async def test_a_key_of_another_certificate_is_refused(
    ca: trustme.CA, tls: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "key.pem"
    ca.issue_cert("127.0.0.1").private_key_pem.write_to_path(other)
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        async with served(tmp_path / "j.db", GENESIS, tls=(tls[0], other)):
            pass


def test_a_ca_file_without_a_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no PEM")
    with pytest.raises(ConfigError, match=r"ca\.pem cannot be read \(no certificate in it\)"):
        CoordinatorClient("127.0.0.1:1", tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("listen", "warned"), [("0.0.0.0:0", True), ("127.0.0.1:0", False), ("localhost:0", False)]
)
async def test_listening_elsewhere_without_tls_is_said_plainly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, listen: str, warned: bool
) -> None:
    caplog.set_level(logging.INFO, "fedmezo")
    said = await log_of_a_start(tmp_path, caplog, listen=listen, insecure=warned)
    assert ("WITHOUT TLS: anyone on that network" in said) is warned


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
async def test_listening_elsewhere_takes_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, listen: str
) -> None:
    with pytest.raises(ConfigError, match="whoever connects can join and read the run"):
        await log_of_a_start(tmp_path, caplog, listen=listen)


async def test_listening_elsewhere_with_tls_says_who_can_join(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tls: tuple[Path, Path]
) -> None:
    caplog.set_level(logging.INFO, "fedmezo")
    cert, key = tls
    said = await log_of_a_start(tmp_path, caplog, listen="0.0.0.0:0", tls_cert=cert, tls_key=key)
    assert "WITHOUT IDENTITIES: anyone on that network can join" in said


async def log_of_a_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, **settings: object
) -> str:
    """Start the command's coordinator, wait until it serves, stop it; its log."""
    journal = tmp_path / "j.db"
    write_genesis(journal, GENESIS)
    values = {"journal": str(journal), "run": run_values(), "replica": False, **settings}
    running = asyncio.create_task(cli.run(CoordinatorSettings.model_validate(values)))

    async def serves() -> bool:
        if running.done():
            running.result()
        return "is served at" in caplog.text

    await until(serves, "the coordinator to serve")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return caplog.text


async def test_a_certificate_that_changes_on_the_disk_is_shown_to_new_connections(
    ca: trustme.CA, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "LOOK_AT_CERTIFICATES_EVERY_S", 0.05)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(pair: trustme.LeafCert) -> None:
        key.write_bytes(pair.private_key_pem.bytes())
        cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))

    put(ca.issue_cert("127.0.0.1"))
    values = {"listen": "127.0.0.1:0", "tls_cert": cert, "tls_key": key, "journal": "none"}
    settings = CoordinatorSettings.model_validate(values)
    async with hosting.fronted(settings, "coordinator") as front:
        address = f"127.0.0.1:{front.port}"

        async def shown() -> str:
            return await asyncio.to_thread(
                ssl.get_server_certificate, ("127.0.0.1", front.port), timeout=5
            )

        async with CoordinatorClient(address, ca_file) as before:
            with pytest.raises(StartingError):
                await before.get_run()
            first = await shown()
            # In the moment between the two files, what is there cannot be used.
            key.write_bytes(b"half")
            await asyncio.sleep(0.2)
            assert await shown() == first
            put(ca.issue_cert("127.0.0.1"))

            async def is_new() -> bool:
                return await shown() != first

            await until(is_new, "the new certificate")
            with pytest.raises(StartingError):
                await before.get_run()
        async with CoordinatorClient(address, ca_file) as after:
            with pytest.raises(StartingError):
                await after.get_run()
