"""A proxy in front of a server on this host that stops in the middle of what it sends on."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Forwarding(socketserver.ThreadingTCPServer):
    """stalls: so many of the next answers with a body of more than `most` bytes stop after as many, and nothing more
    is said on their connection.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, most: int = 2000):
        super().__init__(("127.0.0.1", 0), Connection)
        self.port, self.most, self.stalls = port, most, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock, self.closed = threading.Lock(), threading.Event()


class Connection(socketserver.BaseRequestHandler):
    server: Forwarding

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as behind, suppress(OSError):
            asking = threading.Thread(target=self.pass_on, args=(self.request, behind), daemon=True)
            asking.start()
            sent = 0
            while data := behind.recv(1000):
                sent = len(data) if data.startswith(b"HTTP/1.") else sent + len(data)
                if sent > self.server.most and self.stalled():
                    self.server.closed.wait()
                    return
                self.request.sendall(data)

    def stalled(self) -> bool:
        with self.server.lock:
            stalls = self.server.stalls > 0
            self.server.stalls -= stalls
            return stalls

    @staticmethod
    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def forwarding(port: int) -> Iterator[Forwarding]:
    """Within it there is such a proxy to this port."""
    server = Forwarding(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()
