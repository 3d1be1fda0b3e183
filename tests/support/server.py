"""An HTTP server on this host that serves a directory, and misbehaves on request."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

S = TypeVar("S", bound=ThreadingHTTPServer)


class Server(ThreadingHTTPServer):
    """faults: what happens to the next GETs, one each: cut, short, flip, error, busy, denied, reset, endless,
    stall; less or more is said of the length than there is. requests: paths of the GETs so far. sent:
    bytes of endless bodies so far.
    """

    daemon_threads = True

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.url = directory, f"http://127.0.0.1:{self.server_port}"
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.sent = 0
        self.delay = 0.0
        """Seconds between the first half of a body and the second."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        path = self.server.directory / self.path.partition("?")[0].lstrip("/")
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault in ("error", "busy", "denied") or not path.is_file():
            self.send_error({"error": 500, "busy": 503, "denied": 401}.get(fault, 404))
            return
        data = bytearray(path.read_bytes())
        if fault == "endless":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while self.server.sent < 1 << 30:
                    self.wfile.write(bytes(1 << 20))
                    self.server.sent += 1 << 20
            return
        if fault == "flip":
            data[len(data) // 2] ^= 1
        if fault == "short":
            data = data[:-512]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) + {"less": -512, "more": 512}.get(fault, 0)))
        self.end_headers()
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("cut", "reset"):
            self.connection.close()
            return
        if fault == "stall":
            time.sleep(3600)
        time.sleep(self.server.delay)
        self.wfile.write(data[half:])

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


@contextmanager
def serving(server: S) -> Iterator[S]:
    """Within it any server answers, in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve(directory: Path) -> AbstractContextManager[Server]:
    return serving(Server(directory))
