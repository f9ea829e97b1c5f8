"""A local Hugging Face hub: the requests that huggingface_hub needs to list and download files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789012345678901234567890123456789"
LARGE_FILE_BYTES = 1 << 16


class FakeHub:
    """Serve `repositories`, name to folder; `requests` has all requests.

    `cut_after` closes the connection after this number of bytes of the next large file; with `refuses_after_cut` all
    later requests fail with 503.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.requests = repositories, []
        self.cut_after: int | None = None
        self.refuses_after_cut = self._refusing = False
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Send the response to a request."""
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path, request.headers.get("Range")))
        if self._refusing and self.refuses_after_cut:
            self._refuse(request, 503, {})
            return
        for name, folder in self.repositories.items():
            if path.startswith(f"/api/models/{name}/tree/"):
                self._json(request, self._tree(folder))
                return
            if path.startswith(f"/api/models/{name}"):
                files = [{"rfilename": entry["path"]} for entry in self._tree(folder)]
                self._json(request, {"id": name, "sha": COMMIT, "siblings": files})
                return
            if path.startswith(f"/{name}/resolve/"):
                self._file(request, folder / path.split("/", 5)[5])
                return
        self._refuse(request, 404, {"X-Error-Code": "RepoNotFound"})

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            request.send_header(name, value)
        request.end_headers()

    def _tree(self, folder: Path) -> list[dict]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": compute_etag(path),
            }
            for path in files
        ]

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        """Send a file, or the range of it that is requested."""
        data = path.read_bytes()
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", f'"{compute_etag(path)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.end_headers()
        if request.command == "HEAD":
            return
        stop, large = len(data), len(data) > LARGE_FILE_BYTES
        if self.cut_after is not None and large:
            stop, self.cut_after, request.close_connection = start + self.cut_after, None, True
            self._refusing = True
        request.wfile.write(data[start:stop])


def compute_etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Serve the repositories at `hub.url` within the context."""
    hub = FakeHub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        do_GET = do_HEAD = lambda self: hub.answer(self)  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            """Log nothing; tests read `requests`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
