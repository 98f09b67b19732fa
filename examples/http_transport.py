"""A transport of one's own: HTTP with the standard library. One worker for each file of rows.

    python examples/http_transport.py MODEL_FOLDER ROWS.jsonl ROWS.jsonl ...

A worker gets the genesis, then posts what `Session.exchange` gives and takes what comes back. If a
request or its response is lost, the worker sends the same bytes again. For the internet, put TLS
and your own authentication around it, and pass the authenticated name to `Coordinator.take`.
"""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import fedmezo
from fedmezo import Coordinator, Session

UP_BYTES_MAX = 64 * 1024
"""Most bytes that a worker sends up."""


def serve(coordinator: Coordinator) -> ThreadingHTTPServer:
    """Serve a coordinator on a free port of this machine, in threads."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(coordinator.genesis_bytes)

        def do_POST(self) -> None:
            up = self.rfile.read(min(int(self.headers["Content-Length"]), UP_BYTES_MAX))
            with one_at_a_time:
                coordinator.tick(int(time.monotonic() * 1000))
                down = coordinator.exchange(up)
            self._reply(down)

        def _reply(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def fetch(url: str, body: bytes | None = None) -> bytes:
    """The body of a response; empty if request or response were lost."""
    try:
        with urlopen(url, data=body, timeout=60) as response:
            return bytes(response.read())
    except OSError:
        time.sleep(0.5)
        return b""


def join(url: str, name: str, model: str, file: str) -> Session:
    """A worker that is ready to work."""
    return Session.open(fetch(url), name, model, file)


def work(url: str, session: Session) -> None:
    """Take part in the run until it is finished."""
    down = b""
    while not session.finished:
        down = fetch(url, session.exchange(down))
        if session.idle:
            time.sleep(0.05)


def main(model: str, *files: str) -> None:
    """Serve a run, and let one worker for each file take part in it over HTTP."""
    task = {
        "template": "{text} It was",
        "verbalizers": {"negative": " terrible", "positive": " great"},
        "tokens_max": 64,
    }
    contract = {"run_id": "http", "model": model, "task": task, "rounds": 5, "batch_size": 4}
    contract |= {"workers_min": len(files), "quorum": len(files)}
    # For a model and rows of one's own the rows would be held-out ones, not a worker's.
    genesis = fedmezo.begin_run(contract, model, rate_rows=files[0])
    coordinator = Coordinator(genesis)
    server = serve(coordinator)
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    sessions = [join(url, f"worker-{k}", model, file) for k, file in enumerate(files)]
    threads = [threading.Thread(target=work, args=(url, session)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.shutdown()
    server.server_close()
    digests = {digest.hex() for digest in coordinator.digests.values()}
    print(f"round {coordinator.round}, {len(sessions)} workers, {len(digests)} digest: {digests}")


if __name__ == "__main__":
    main(*sys.argv[1:])
