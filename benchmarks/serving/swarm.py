"""Thousands of workers in one thread: HTTP/2 over TLS sockets, without a model or grpc.

They speak `fedmezo.v1` as a worker does, each on a connection of its own. A gRPC client costs as
much as the coordinator's end of the same connection, so that on two cores it would be the load that
is measured. What is left out of HTTP/2 is what such a worker never meets: the header compression of
what the server sends (of its trailers only their end is looked at, and the hint when to come back),
and a send window (a worker's messages stay far below it).
"""

from __future__ import annotations

import heapq
import random
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fedmezo_core.config import PROTOCOL_VERSION
from fedmezo_core.journal.journal import head_after
from fedmezo_core.records import Genesis
from fedmezo_core.trust.answer_signatures import AnswerSigner
from fedmezo_core.wire.backoff import delay_s
from fedmezo_core.wire.messages import answer_from_pb
from fedmezo_proto.v1 import coordinator_pb2 as wire
from fedmezo_proto.v1.journal_pb2 import Record

SERVICE = "/fedmezo.v1.CoordinatorService/"
WINDOW = 2**31 - 1
"""What the server may send without asking: never less than there is to send."""
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
READ_BYTES = 256 * 1024
LARGE_BYTES = 1024
"""Messages above are commits, the same to all workers."""
HANDSHAKES_A_TURN = 32
CONNECTING_MAX = 64
"""TLS handshakes in the air at a time: more only grow old here, beyond the time that a coordinator
gives them, because their other half is done by this one thread."""
RETRY_AFTER = re.compile(rb"fedmezo-retry-after-ms.(\d+)", re.DOTALL)
"""A header that is new to a connection stands in its first trailers in plain letters."""

WANTS_READ = select.EPOLLIN | select.EPOLLRDHUP
WANTS_WRITE = WANTS_READ | select.EPOLLOUT


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message_frame(body: bytes, *, stream: int = 1, last: bool = False) -> bytes:
    """One gRPC message in a DATA frame; `last` half-closes the stream."""
    flags = END_STREAM if last else 0
    return frame(DATA, flags, stream, b"\0" + struct.pack(">I", len(body)) + body)


def preface() -> bytes:
    """What opens a connection."""
    settings = frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, WINDOW, 5, 2**20))
    window = frame(8, 0, 0, struct.pack(">I", WINDOW - 65_535))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + window


def call_frame(method: str, authority: str, stream: int = 1) -> bytes:
    """What opens a call; it leaves nothing in the server's table of headers."""
    path = (SERVICE + method).encode()
    # Static table: :method POST, :scheme https, :path, :authority, content-type; and te by name.
    headers = b"\x83\x87\x04" + _text(path) + b"\x01" + _text(authority.encode())
    headers += (
        b"\x0f\x10" + _text(b"application/grpc") + b"\x00" + _text(b"te") + _text(b"trailers")
    )
    return frame(HEADERS, END_HEADERS, stream, headers)


def tls_context() -> ssl.SSLContext:
    """TLS without a check of the certificate, which costs the load a third of a handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _text(value: bytes) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value


@dataclass(eq=False, slots=True)
class Worker:
    """One worker, over all its connections."""

    name: str
    sock: socket.socket | None = None
    """An `ssl.SSLSocket` as soon as TCP is up."""
    ready: bool = False
    """TLS is up."""
    welcomed: bool = False
    buffer: bytearray = field(default_factory=bytearray)
    unsent: bytes = b""
    attempt: int = 0
    round: int = 0
    """Last commit that came."""
    head: bytes = b""
    assigned: wire.Assign | None = None
    refused: int = 0
    """Sessions that the coordinator ended."""
    signer: AnswerSigner | None = None
    """What signs its answers; None: they are not signed."""


OnMessage = Callable[[Worker, wire.SessionResponse], None]


class Swarm:
    """Workers of one run, driven by one loop."""

    def __init__(
        self,
        address: tuple[str, int],
        genesis: Genesis,
        head: bytes,
        names: Iterable[str],
    ) -> None:
        """`head` is the run's at genesis."""
        self.address = address
        self.workers = [Worker(name, head=head) for name in names]
        self.on_message: OnMessage = lambda worker, message: None
        self.reconnects = True
        """Whether a worker whose session ends comes back, with full jitter."""
        self._genesis = genesis
        self._tls = tls_context()
        self._epoll = select.epoll()
        self._open: dict[int, Worker] = {}
        self._connecting = 0
        self._due: list[tuple[float, int, Worker]] = []
        self._preamble = preface() + call_frame("Session", f"{address[0]}:{address[1]}")
        self._count = 0
        self._newest = (b"", b"", 0, b"")
        """A commit and what follows from it: the same for nearly all workers."""
        self._body, self._message = b"", wire.SessionResponse()
        """The newest large message, and what it says."""

    # ------------------------------------------------------------ what a measurement calls

    def join_all(self, timeout_s: float = 300.0) -> None:
        """Connect all workers; returns once all are welcomed."""
        self.begin()
        self.run(
            lambda: self.welcomed == len(self.workers), timeout_s, "all workers to be welcomed"
        )

    def begin(self) -> None:
        """Let all workers connect from the next turn on."""
        for worker in self.workers:
            self._later(worker, 0.0)

    @property
    def welcomed(self) -> int:
        """Workers with an open session."""
        return sum(worker.welcomed for worker in self.workers)

    def send(self, worker: Worker, message: wire.SessionRequest) -> None:
        """Send one message up."""
        self._write(worker, message_frame(message.SerializeToString()))

    def run(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Work until it is done."""
        end_s = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > end_s:
                raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")
            self.turn(0.05)

    def run_for(self, seconds: float) -> None:
        """Work for so long."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.turn(min(0.05, max(0.0, end_s - time.monotonic())))

    def turn(self, wait_s: float) -> None:
        """Connect whoever is due, and take what has come."""
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s and self._connecting < CONNECTING_MAX:
            self._connect(heapq.heappop(self._due)[2])
        if self._due and self._connecting < CONNECTING_MAX:
            wait_s = min(wait_s, max(0.0, self._due[0][0] - now_s))
        shaking_hands = []
        for fileno, events in self._epoll.poll(wait_s, 512):
            worker = self._open.get(fileno)
            if worker is None:
                continue
            if worker.ready:
                self._serve(worker, events)
            else:
                shaking_hands.append((worker, events))
        # A handshake takes as long as ten messages: who has joined does not wait for the others.
        for worker, events in shaking_hands[:HANDSHAKES_A_TURN]:
            self._serve(worker, events)

    def close(self) -> None:
        """Break all connections off."""
        self.reconnects = False
        for worker in self.workers:
            self._drop(worker)
        self._epoll.close()

    # ------------------------------------------------------------ connections

    def _later(self, worker: Worker, delay: float) -> None:
        self._count += 1
        heapq.heappush(self._due, (time.monotonic() + delay, self._count, worker))

    def _connect(self, worker: Worker) -> None:
        plain = socket.socket()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setblocking(False)
        worker.sock = plain
        worker.ready = worker.welcomed = False
        worker.buffer.clear()
        worker.unsent = b""
        self._connecting += 1
        self._open[plain.fileno()] = worker
        self._epoll.register(plain.fileno(), WANTS_WRITE)
        try:
            plain.connect(self.address)
        except BlockingIOError:
            pass
        except OSError:
            self._lost(worker, None)

    def _serve(self, worker: Worker, events: int) -> None:
        try:
            if not worker.ready:
                self._shake_hands(worker)
                return
            if events & select.EPOLLOUT and worker.unsent:
                unsent, worker.unsent = worker.unsent, b""
                self._write(worker, unsent)
            if events & ~select.EPOLLOUT:
                self._read(worker)
        except (OSError, EOFError):
            self._lost(worker, None)

    def _shake_hands(self, worker: Worker) -> None:
        assert worker.sock is not None
        if not isinstance(worker.sock, ssl.SSLSocket):
            if worker.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise EOFError
            # Its file descriptor stays the same.
            worker.sock = self._tls.wrap_socket(
                worker.sock, server_hostname=self.address[0], do_handshake_on_connect=False
            )
        try:
            worker.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._epoll.modify(worker.sock.fileno(), WANTS_READ)
            return
        except ssl.SSLWantWriteError:
            self._epoll.modify(worker.sock.fileno(), WANTS_WRITE)
            return
        self._epoll.modify(worker.sock.fileno(), WANTS_READ)
        worker.ready = True
        self._connecting -= 1
        hello = wire.SessionRequest(
            hello=hello_of(self._genesis, worker.name, worker.round, worker.head)
        )
        if worker.signer is not None:
            hello.hello.signing_key = worker.signer.public_key
        self._write(worker, self._preamble + message_frame(hello.SerializeToString()))

    def _write(self, worker: Worker, data: bytes) -> None:
        if worker.sock is None:
            return
        if worker.unsent:
            worker.unsent += data
            return
        try:
            sent = worker.sock.send(data)
        except ssl.SSLWantWriteError:
            sent = 0
        except OSError:
            self._lost(worker, None)
            return
        worker.unsent = data[sent:]
        self._epoll.modify(worker.sock.fileno(), WANTS_WRITE if worker.unsent else WANTS_READ)

    def _read(self, worker: Worker) -> None:
        assert isinstance(worker.sock, ssl.SSLSocket)
        while True:
            try:
                data = worker.sock.recv(READ_BYTES)
            except ssl.SSLWantReadError:
                break
            if not data:
                raise EOFError
            worker.buffer += data
            if worker.sock.pending() == 0:
                break
        self._frames(worker)

    def _lost(self, worker: Worker, retry_after_s: float | None) -> None:
        """Its session ended, or it never got one."""
        self._drop(worker)
        if not self.reconnects:
            return
        delay = delay_s(worker.attempt, random.random())
        if retry_after_s is not None:
            delay = random.random() * retry_after_s
        worker.attempt += 1
        self._later(worker, delay)

    def _drop(self, worker: Worker) -> None:
        if worker.sock is None:
            return
        if not worker.ready:
            self._connecting -= 1
        with suppress(OSError, ValueError):
            self._epoll.unregister(worker.sock.fileno())
        del self._open[worker.sock.fileno()]
        worker.sock.close()
        worker.sock, worker.welcomed = None, False

    # ------------------------------------------------------------ frames

    def _frames(self, worker: Worker) -> None:
        buffer, start = worker.buffer, 0
        data = bytearray()
        while len(buffer) - start >= 9:
            length = int.from_bytes(buffer[start : start + 3], "big")
            kind, flags = buffer[start + 3], buffer[start + 4]
            end = start + 9 + length
            if len(buffer) < end:
                break
            if kind == DATA:
                data += buffer[start + 9 : end]
            elif kind in (SETTINGS, PING) and not flags & ACK:
                payload = bytes(buffer[start + 9 : end]) if kind == PING else b""
                self._write(worker, frame(kind, ACK, 0, payload))
            elif (kind == HEADERS and flags & END_STREAM) or kind in (RST_STREAM, GOAWAY):
                worker.refused += 1
                hint = RETRY_AFTER.search(bytes(buffer[start + 9 : end]))
                self._lost(worker, int(hint[1]) / 1000 if hint else None)
                return
            start = end
        left = self._messages(worker, data)
        if worker.sock is None:
            return
        if left:
            # Of a message that has not all come: it goes back as one frame.
            worker.buffer = bytearray(frame(DATA, 0, 1, bytes(left))) + buffer[start:]
        else:
            del buffer[:start]

    def _messages(self, worker: Worker, data: bytearray) -> bytearray:
        start = 0
        while len(data) - start >= 5:
            length = int.from_bytes(data[start + 1 : start + 5], "big")
            if len(data) - start - 5 < length:
                break
            body = bytes(data[start + 5 : start + 5 + length])
            start += 5 + length
            if length < LARGE_BYTES:
                self._took(worker, wire.SessionResponse.FromString(body))
                continue
            if body != self._body:
                self._body, self._message = body, wire.SessionResponse.FromString(body)
            self._took(worker, self._message)
        return data[start:]

    def _took(self, worker: Worker, message: wire.SessionResponse) -> None:
        match message.WhichOneof("kind"):
            case "welcome":
                worker.welcomed, worker.attempt = True, 0
            case "assign":
                worker.assigned = message.assign
            case "commit":
                self._follow(worker, message.commit.record)
            case _:
                pass
        self.on_message(worker, message)

    def _follow(self, worker: Worker, body: bytes) -> None:
        """Hold the head after a commit, which a worker names when it comes back."""
        if self._newest[:2] != (worker.head, body):
            round_ = Record.FromString(body).committed.round
            self._newest = (worker.head, body, round_, head_after(worker.head, body))
        worker.round, worker.head = self._newest[2:]


class Caller:
    """A connection for unary calls, one at a time, whose bytes are made and read by hand, too."""

    def __init__(self, address: tuple[str, int], method: str) -> None:
        self._authority = f"{address[0]}:{address[1]}"
        self._method = method
        self.sock = tls_context().wrap_socket(
            socket.create_connection(address), server_hostname=address[0]
        )
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(preface())
        self._stream = -1
        self._buffer = bytearray()
        self._body = bytearray()

    def call(self, body: bytes) -> None:
        """Begin a call; the one before has ended."""
        self._stream += 2
        self.sock.sendall(
            call_frame(self._method, self._authority, self._stream)
            + message_frame(body, stream=self._stream, last=True)
        )

    def take(self) -> bytes | None:
        """Take what has come; the answer's bytes once the call has ended."""
        self._buffer += self.sock.recv(READ_BYTES)
        while self.sock.pending():
            self._buffer += self.sock.recv(READ_BYTES)
        answer, buffer, start = None, self._buffer, 0
        while len(buffer) - start >= 9:
            end = start + 9 + int.from_bytes(buffer[start : start + 3], "big")
            if len(buffer) < end:
                break
            kind, flags = buffer[start + 3], buffer[start + 4]
            if kind == DATA:
                self._body += buffer[start + 9 : end]
            elif kind in (SETTINGS, PING) and not flags & ACK:
                payload = bytes(buffer[start + 9 : end]) if kind == PING else b""
                self.sock.sendall(frame(kind, ACK, 0, payload))
            elif kind == HEADERS and flags & END_STREAM:
                if len(self._body) < 5:
                    raise RuntimeError("a call was refused")
                answer = bytes(self._body[5:])
                self._body.clear()
            elif kind in (RST_STREAM, GOAWAY):
                raise RuntimeError("the coordinator broke a call off")
            start = end
        del buffer[:start]
        return answer


def hello_of(genesis: Genesis, worker: str, round_: int, head: bytes) -> wire.Hello:
    """A hello that is welcome."""
    return wire.Hello(
        protocol_version=PROTOCOL_VERSION,
        run_id=genesis.config.run_id,
        worker=worker,
        manifest_digest=genesis.manifest_digest,
        base_digest=genesis.base_digest,
        tokenizer_digest=genesis.tokenizer_digest,
        recipe=genesis.config.recipe,
        round=round_,
        head=head,
    )


def signed_answer_to(
    assign: wire.Assign, grads: Sequence[float], worker: Worker
) -> wire.SessionRequest:
    """A sound answer of a worker that holds the weights to measure on, signed if it signs."""
    request = answer_to(assign, grads)
    if worker.signer is not None:
        event = answer_from_pb(worker.name, request.answer)
        request.answer.signature = worker.signer.sign(event.ticket, worker.head, event.scalars)
    return request


def answer_to(assign: wire.Assign, grads: Sequence[float]) -> wire.SessionRequest:
    """A sound answer."""
    return wire.SessionRequest(
        answer=wire.Answer(
            ticket=assign.ticket,
            projected_grads=grads,
            weights_digest64=99 if assign.want_digest else None,
        )
    )
