"""A server on this host that answers as the Hugging Face hub does, and cuts or spoils files on request."""

import hashlib
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.server import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves <directory>/<owner>/<name>/ as repositories.

    cut: for each next GET of a file, after how many bytes the connection ends. wrong: whether hashes are announced that
    the files do not have. got: (file, first byte) of the GETs so far.
    """

    daemon_threads = True

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.url = directory, f"http://127.0.0.1:{self.server_port}"
        self.cut: list[int] = []
        self.wrong = False
        self.got: list[tuple[str, int]] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            repository = "/".join(path.split("/")[2:4])
            if not (self.server.directory / repository).is_dir():
                self.reply(404, b"{}", send)
            elif "/tree/" in path:
                self.reply(200, json.dumps(self.files(repository, tree=True)).encode(), send)
            else:
                content = {"id": repository, "sha": COMMIT, "siblings": self.files(repository, tree=False)}
                self.reply(200, json.dumps(content).encode(), send)
            return
        owner, name, _, _, file = [*path.split("/", 4), "", "", "", "", ""][:5]
        found = self.server.directory / owner / name / file
        if not file or not found.is_file():
            self.reply(404, b"", send)
            return
        self.reply_file(found, send)

    def files(self, repository: str, tree: bool) -> list[dict]:
        listed = []
        for path in sorted((self.server.directory / repository).iterdir()):
            entry: dict = {"path" if tree else "rfilename": path.name, "size": path.stat().st_size}
            entry |= {"type": "file", "oid": self.etag(path)} if tree else {"blobId": self.etag(path)}
            if path.suffix in (".safetensors", ".bin"):
                key = "oid" if tree else "sha256"
                entry["lfs"] = {key: self.etag(path), "size": path.stat().st_size, "pointerSize": 1}
            listed.append(entry)
        return listed

    def etag(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes() + b"!" * self.server.wrong).hexdigest()

    def reply_file(self, path: Path, send: bool) -> None:
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if send:
            self.server.got.append((path.name, start))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{self.etag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if send:
            end = self.server.cut.pop(0) if self.server.cut else len(data)
            self.wfile.write(data[start:end])
            if end < len(data):
                self.close_connection = True
                self.connection.close()

    def reply(self, status: int, content: bytes, send: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


def serve(directory: Path) -> AbstractContextManager[Hub]:
    return serving(Hub(directory))
