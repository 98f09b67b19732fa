"""The process that holds a site's model: it is started again, and it leaves with its site."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from fedmezo_core.errors import FedMezoError, ModelError, NotReadyError, VersionError
from fedmezo_nvflare.model_process import ENDS_MAX, ModelProcess, exchanged

# A session that counts its exchanges, and does what it is told.
PROGRAM = """
import os, sys, weakref
from multiprocessing.connection import Connection
from fedmezo_core.errors import ConfigError, DivergedError
from fedmezo_nvflare.model_process import serve

held = weakref.WeakSet()

class Counting:
    count = round = 0
    def __init__(self):
        assert not held, "two models have no room"
        held.add(self)
        self.itself = self  # as an engine whose estimator calls it
    def exchange(self, down=b""):
        if down == b"die":
            os._exit(9)
        if down == b"diverge":
            raise DivergedError("other weights.")
        if down == b"fail":
            raise ConfigError("this cannot be.")
        self.count += 1
        return b"%d %d %s" % (os.getpid(), self.count, down)
    def disconnect(self):
        pass

pipe = Connection(int(sys.argv[1]))
opening = pipe.recv_bytes()
if opening == b"die":
    os._exit(7)
serve(pipe, Counting)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelProcess]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    process = ModelProcess((sys.executable, "-c", PROGRAM), (b"opening",))
    yield process
    process.close()


def test_it_stays_for_the_whole_job(started: ModelProcess) -> None:
    first, second = started.exchange(b"a").split(), started.exchange(b"b").split()
    assert first[0] == second[0]
    assert (first[1:], second[1:]) == ([b"1", b"a"], [b"2", b"b"])


def test_it_is_started_again_and_greets(started: ModelProcess) -> None:
    before = started.exchange(b"a").split()
    again = started.exchange(b"die").split()
    assert before[0] != again[0]
    assert again[1:] == [b"1"]  # What came down is for the one that is gone.


def test_it_is_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    process = ModelProcess((sys.executable, "-c", PROGRAM), (b"die",))
    with pytest.raises(ModelError, match=rf"ended {ENDS_MAX} times in a row, .* status 7"):
        process.exchange(b"")


def test_an_error_is_one_sentence(started: ModelProcess) -> None:
    with pytest.raises(FedMezoError, match=r"^this cannot be\.$"):
        started.exchange(b"fail")


def test_wrong_weights_are_rebuilt_once(started: ModelProcess) -> None:
    before = started.exchange(b"a").split()
    assert started.exchange(b"diverge").split() == [before[0], b"1"]
    with pytest.raises(FedMezoError, match=r"^other weights\.$"):
        started.exchange(b"diverge")


def test_it_leaves_with_its_site(started: ModelProcess) -> None:
    process = psutil.Process(int(started.exchange(b"").split()[0]))
    started.close()
    assert not process.is_running()


def test_it_leaves_when_its_site_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    site = (
        "import sys; from fedmezo_nvflare.model_process import ModelProcess\n"
        "process = ModelProcess((sys.executable, '-c', sys.argv[1]), (b'',))\n"
        "print(process.exchange(b'').decode(), flush=True); input()"
    )
    with psutil.Popen(
        [sys.executable, "-c", site, PROGRAM], stdin=-1, stdout=-1, text=True
    ) as program:
        model = psutil.Process(int(program.stdout.readline().split()[0]))
        program.kill()
    end_s = time.monotonic() + 20
    while model.is_running() and model.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end_s, "it outlived its site"
        time.sleep(0.05)


class Refusing:
    """A session that was refused."""

    round = 0

    def __init__(self, error: FedMezoError) -> None:
        self.error = error
        self.connected = True

    def exchange(self, down: bytes = b"") -> bytes:
        if down:
            raise self.error
        assert not self.connected
        return b"hello"

    def disconnect(self) -> None:
        self.connected = False


def test_a_session_that_is_refused_greets_again() -> None:
    assert exchanged(Refusing(NotReadyError("not now.")), b"come later") == b"hello"


def test_a_session_that_is_refused_for_good_does_not_greet_for_ever() -> None:
    with pytest.raises(VersionError):
        exchanged(Refusing(VersionError("upgrade.")), b"go away")
