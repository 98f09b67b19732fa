"""Adapters that a coordinator offers: what is downloaded, what is refused, what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import math
import os
import stat
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import cast

import pytest

from fedmezo_core.errors import (
    FedMezoError,
    MismatchError,
    NotReadyError,
    PolicyError,
    UnavailableError,
)
from fedmezo_core.wire import reconnecting
from fedmezo_core.wire.client import CoordinatorClient
from fedmezo_proto.v1 import runs_pb2 as wire
from fedmezo_worker.adapter_cache import KEPT_S
from fedmezo_worker.adapter_files import adapter_in, downloaded_adapter

FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"weights" * 5000}
PIECE_BYTES = 10_000


class Sending:
    """Stands in for a client whose coordinator sends `files`."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.asked: list[tuple[str, int]] = []
        self.break_after = 0

    async def read_run_file(
        self, run_id: str, name: str, offset: int = 0
    ) -> AsyncGenerator[bytes, None]:
        self.asked.append((name, offset))
        content = self.files[name.removeprefix("adapter/")]
        sent = 0
        for start in range(offset, len(content), PIECE_BYTES):
            if self.break_after and sent >= self.break_after:
                raise UnavailableError("The line broke.")
            piece = content[start : start + PIECE_BYTES]
            sent += len(piece)
            yield piece


def offered(**sizes: int) -> list[wire.RunFile]:
    return [
        wire.RunFile(
            name=f"adapter/{name}",
            sha256=hashlib.sha256(content).digest(),
            file_bytes=sizes.get(name.partition(".")[0], len(content)),
        )
        for name, content in FILES.items()
    ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reconnecting, "delay_s", lambda *_: 0.01)
    return tmp_path / "fedmezo" / "adapters"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def folders_in(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


async def download(
    sending: Sending, files: list[wire.RunFile], disk_max_bytes: int = 1 << 20
) -> Path:
    async with downloaded_adapter(
        cast("CoordinatorClient", sending),
        "tiny-run",
        adapter_in(files),
        disk_max_bytes=disk_max_bytes,
        give_up_after_s=5.0,
    ) as folder:
        return folder


async def test_it_is_downloaded_once_for_its_owner_only(cache: Path) -> None:
    sending = Sending()
    folder = await download(sending, offered())
    assert folder.parent == cache
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    for path in (folder, *folder.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    assert await download(sending, offered()) == folder
    assert len(sending.asked) == 2


async def test_a_broken_line_goes_on_where_it_broke(cache: Path) -> None:
    sending = Sending()
    sending.break_after = PIECE_BYTES
    folder = await download(sending, offered())
    assert (folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    assert ("adapter/adapter_model.safetensors", 2 * PIECE_BYTES) in sending.asked


def partial_in(cache: Path) -> Path:
    [partial] = cache.rglob("*.partial")
    return partial


async def broken_off(sending: Sending) -> None:
    """A download that its worker cancels after two pieces of the weights, as for another run."""
    two_came = asyncio.Event()
    read_run_file = sending.read_run_file

    async def halting(run_id: str, name: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        count = 0
        async for piece in read_run_file(run_id, name, offset):
            yield piece
            count += 1
            if count == 2:
                two_came.set()
                await asyncio.Event().wait()

    sending.read_run_file = halting  # type: ignore[method-assign]
    downloading = asyncio.create_task(download(sending, offered()))
    await asyncio.wait_for(two_came.wait(), 5)
    downloading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await downloading


async def test_a_download_that_gave_way_goes_on_from_what_it_has(cache: Path) -> None:
    await broken_off(Sending())
    left = partial_in(cache)
    assert left.stat().st_size == 2 * PIECE_BYTES
    other = adapter_of(b"a")
    await download(*other)
    sending = Sending()
    folder = await download(sending, offered())
    assert sending.asked == [("adapter/adapter_model.safetensors", 2 * PIECE_BYTES)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("size", [5, len(FILES["adapter_model.safetensors"])])
async def test_what_is_left_is_not_trusted(cache: Path, size: int) -> None:
    await broken_off(Sending())
    left = partial_in(cache)
    left.write_bytes(bytes(size))
    sending = Sending()
    if size == 5:
        with pytest.raises(UnavailableError, match="is damaged; it begins anew"):
            await download(sending, offered())
        sending.asked.clear()
    folder = await download(sending, offered())
    assert sending.asked == [("adapter/adapter_model.safetensors", 0)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


async def test_what_is_left_goes_if_its_room_is_wanted(cache: Path) -> None:
    await broken_off(Sending())
    folder = await download(*adapter_of(b"a"), 20_000)
    assert folders_in(cache) == [folder]


async def test_a_file_that_was_damaged_in_the_cache_comes_again(cache: Path) -> None:
    sending = Sending()
    folder = await download(sending, offered())
    (folder / "adapter_config.json").write_bytes(b"{}")
    assert (await download(sending, offered()) / "adapter_config.json").read_bytes() == b'{"r": 4}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Weights" + FILES["adapter_model.safetensors"][7:], "is damaged: its SHA-256 begins"),
        (FILES["adapter_model.safetensors"] + b"more", "has more than 35000"),
    ],
)
async def test_bytes_that_were_not_offered_are_refused_and_not_kept(
    cache: Path, content: bytes, words: str
) -> None:
    sending = Sending()
    sending.files["adapter_model.safetensors"] = content
    with pytest.raises(MismatchError, match=words) as caught:
        await download(sending, offered())
    assert str(cache) not in str(caught.value)
    assert files_in(cache) == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"adapter_model": 1 << 20}, r"has 1048584 bytes, more than the 1048576 .*policy.disk_max"),
        ({"adapter_config": (1 << 20) + 1, "adapter_model": 0}, "policy.disk_max"),
    ],
)
async def test_files_that_are_too_large_are_refused_before_anything_is_asked_for(
    cache: Path, sizes: dict[str, int], words: str
) -> None:
    sending = Sending()
    with pytest.raises(PolicyError, match=words):
        await download(sending, offered(**sizes))
    assert not sending.asked
    assert not files_in(cache)


async def test_settings_of_an_adapter_are_small(cache: Path) -> None:
    with pytest.raises(PolicyError, match=r"adapter_config.json has 1048577 bytes, more than"):
        await download(Sending(), offered(adapter_config=(1 << 20) + 1), disk_max_bytes=1 << 30)


async def test_a_file_that_ends_early_is_waited_for(cache: Path) -> None:
    sending = Sending()
    sending.files["adapter_model.safetensors"] = b"short"
    with pytest.raises(FedMezoError, match="ended the file early"):
        async with downloaded_adapter(
            cast("CoordinatorClient", sending),
            "tiny-run",
            adapter_in(offered()),
            disk_max_bytes=1 << 20,
            give_up_after_s=0.1,
        ):
            pass


async def test_a_run_that_is_over_ends_its_download(cache: Path) -> None:
    class Stopped(Sending):
        """A client of a coordinator that does not host the run any more."""

        async def read_run_file(
            self, run_id: str, name: str, offset: int = 0
        ) -> AsyncGenerator[bytes, None]:
            self.asked.append((name, offset))
            raise NotReadyError("The run is not served now.")
            yield b""

    sending = Stopped()
    async with asyncio.timeout(5):
        with pytest.raises(NotReadyError, match="not served now"):
            async with downloaded_adapter(
                cast("CoordinatorClient", sending),
                "tiny-run",
                adapter_in(offered()),
                disk_max_bytes=1 << 20,
                give_up_after_s=math.inf,
                may_go_on=lambda: len(sending.asked) < 3,
            ):
                pass
    assert len(sending.asked) == 3
    assert not files_in(cache)


async def test_an_adapter_that_no_run_begins_from_any_more_goes(cache: Path) -> None:
    old = cache / ("0" * 64)
    old.mkdir(parents=True)
    (old / "adapter_config.json").write_bytes(b"{}")
    long_ago_s = time.time() - KEPT_S - 10
    os.utime(old, (long_ago_s, long_ago_s))
    folder = await download(Sending(), offered())
    assert files_in(cache) == files_in(folder) == sorted(FILES)


async def test_two_runs_from_one_adapter_do_not_write_to_one_file(cache: Path) -> None:
    both_have_begun = asyncio.Barrier(2)

    class Meeting(Sending):
        """A client that stops in the middle of the weights until the other one is there, too."""

        async def read_run_file(
            self, run_id: str, name: str, offset: int = 0
        ) -> AsyncGenerator[bytes, None]:
            pieces = [piece async for piece in super().read_run_file(run_id, name, offset)]
            yield pieces[0]
            if pieces[1:]:
                await both_have_begun.wait()
            for piece in pieces[1:]:
                yield piece

    async with asyncio.timeout(5):
        folders = await asyncio.gather(*(download(Meeting(), offered()) for _ in range(2)))
    assert folders[0] == folders[1]
    assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == FILES


async def test_a_file_is_checked_as_it_was_written(cache: Path) -> None:
    def damage() -> None:
        [partial] = cache.rglob("*.partial")
        with partial.open("r+b") as file:
            file.write(bytes(100))

    class OnABadDisk(Sending):
        """A client during whose work the file loses its beginning."""

        async def read_run_file(
            self, run_id: str, name: str, offset: int = 0
        ) -> AsyncGenerator[bytes, None]:
            async for piece in super().read_run_file(run_id, name, offset):
                yield piece
            damage()

    sending = OnABadDisk()
    sending.files["adapter_config.json"] = b"x" * 20_000  # more than what Python holds back
    files = offered(adapter_config=20_000)
    files[0].sha256 = hashlib.sha256(b"x" * 20_000).digest()
    with pytest.raises(MismatchError, match="is damaged"):
        await download(sending, files)
    assert not files_in(cache)


async def test_what_a_process_left_that_ended_goes(cache: Path) -> None:
    folder = await download(Sending(), offered())
    (folder / "adapter_config.json").unlink()
    (left := folder / ".adapter_config.json.abc.partial").write_bytes(b"{")
    left.chmod(0o600)
    await download(Sending(), offered())
    assert files_in(cache) == sorted(FILES)


async def test_what_is_left_goes_if_another_worker_has_got_the_file(cache: Path) -> None:
    await broken_off(Sending())
    with partial_in(cache).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        folder = await download(Sending(), offered())
        await download(*adapter_of(b"a"))
        assert partial_in(cache).parent == folder, "the other worker may still be writing to it"
    await download(*adapter_of(b"b"))
    assert files_in(folder) == sorted(FILES)


def adapter_of(kind: bytes) -> tuple[Sending, list[wire.RunFile]]:
    sending = Sending()
    sending.files["adapter_model.safetensors"] = kind * 1000
    files = offered(adapter_model=1000 * len(kind))
    files[1].sha256 = hashlib.sha256(kind * 1000).digest()
    return sending, files


async def test_the_cache_is_bounded_and_what_was_not_used_for_longest_goes_first(
    cache: Path,
) -> None:
    room_for_two = 2 * (1000 + len(FILES["adapter_config.json"])) + 500
    folders = []
    for number, kind in enumerate((b"a", b"b")):
        folders.append(await download(*adapter_of(kind), room_for_two))
        os.utime(folders[-1], (time.time() - 100 + number,) * 2)
    await download(*adapter_of(b"a"), room_for_two)
    third = await download(*adapter_of(b"c"), room_for_two)
    assert folders_in(cache) == sorted([folders[0], third])


async def test_an_adapter_that_is_just_being_loaded_stays(cache: Path) -> None:
    room_for_one = 1500
    sending, files = adapter_of(b"a")
    async with downloaded_adapter(
        cast("CoordinatorClient", sending),
        "tiny-run",
        adapter_in(files),
        disk_max_bytes=room_for_one,
        give_up_after_s=5.0,
    ) as loading:
        with pytest.raises(NotReadyError, match=r"that runs are just loading take .*disk_max"):
            await download(*adapter_of(b"b"), room_for_one)
        assert files_in(loading) == sorted(FILES)
    other = await download(*adapter_of(b"b"), room_for_one)
    assert folders_in(cache) == [other]


def test_only_the_two_files_of_an_adapter_are_taken() -> None:
    more = [wire.RunFile(name=name) for name in ("heldout.jsonl", "adapter/code.py", "adapter/x")]
    assert [*adapter_in([*more, *offered()])] == [*FILES]
    assert adapter_in([*more, *offered()[:1]]) == {}
