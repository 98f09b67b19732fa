"""The way in that needs no other stack is measured; the proxy counts what goes through it."""

from __future__ import annotations

import socket
import threading

from benchmarks.integrations import grpc_rounds
from benchmarks.integrations.rounds_over import counting

UP, DOWN = bytes(100_000), bytes(7)


def test_the_proxy_counts_both_directions() -> None:
    def answer() -> None:
        connection, _ = target.accept()
        with connection, connection.makefile("rb") as stream:
            assert stream.read() == UP
            connection.sendall(DOWN)

    with socket.create_server(("127.0.0.1", 0)) as target:
        answering = threading.Thread(target=answer)
        answering.start()
        with counting(f"127.0.0.1:{target.getsockname()[1]}") as counted:
            host, _, port = counted.address.rpartition(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(UP)
                connection.shutdown(socket.SHUT_WR)
                assert connection.makefile("rb").read() == DOWN
        answering.join()
    assert (counted.up_bytes, counted.down_bytes) == (len(UP), len(DOWN))


def test_a_round_over_grpc_is_measured() -> None:
    seconds, up, down = grpc_rounds.figures(small=True)
    assert seconds.value > 0
    # A scalar for each step and a digest; and the other worker's scalars, too.
    assert 16 * 4 < up.value < 1000
    assert 2 * 16 * 4 < down.value < 2000
