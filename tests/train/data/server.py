"""An HTTP server on the loopback interface, which fails as it is told."""

import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves `files`.

    `broken` says of the n-th GET after how many bytes it breaks off, if it does, `delay_s` how long it is silent before
    the content; `headers` go with every answer; `ranges` tells whether it knows byte ranges; `gets` and `sent` count.
    """

    daemon_threads = True
    request_queue_size = 64  # beyond it a connection waits for a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.broken: Callable[[int], int | None] = lambda number: None
        self.delay_s: Callable[[int], float] = lambda number: 0.0
        self.ranges, self.gets, self.sent = True, 0, 0
        self.headers: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        server, content = self.server, self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked, status = self.headers.get("Range"), 200
        whole = len(content)
        if asked and server.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            status, content = 206, content[int(first) : int(last or whole) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", _etag(server.files[self.path]))
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        for name, value in server.headers.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
        self.end_headers()
        if head:
            return
        server.gets += 1
        limit = server.broken(server.gets)
        time.sleep(server.delay_s(server.gets))
        self.wfile.write(content[:limit])
        server.sent += len(content[:limit])
        if limit is not None:
            self.close_connection = True


@functools.lru_cache(64)
def _etag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'


@contextmanager
def serving() -> Iterator[Server]:
    """A server at work."""
    served = Server()
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.shutdown()
        served.server_close()
        thread.join()
