"""An HTTP proxy in front of an S3 endpoint that a test can make deny, forget and lie."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"


@dataclass
class Behaviour:
    """What becomes of requests. `refuse` gives the code of an error for (method, is it a listing), or None."""

    refuse: Callable[[str, bool], str | None] = lambda method, listing: None
    status: int = 403
    forgotten: set[str] = field(default_factory=set)  # request headers that do not reach the store
    headers: dict[str, str] = field(default_factory=dict)  # of answers


@dataclass
class Proxy:
    """A proxy that runs: its URL, and how it behaves from now on."""

    url: str = ""
    behaviour: Behaviour = field(default_factory=Behaviour)


@contextmanager
def proxy(endpoint: str) -> Iterator[Proxy]:
    """A proxy before `endpoint` while the block runs."""
    there = urlsplit(endpoint).netloc
    running = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            behaviour = running.behaviour
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code = behaviour.refuse(self.command, "list-type" in self.path)
            if code:
                self._answer(behaviour.status, [("Content-Type", "application/xml")], ERROR.format(code).encode())
                return
            connection = http.client.HTTPConnection(there)
            drop = {"expect", *behaviour.forgotten}
            kept = {name: value for name, value in self.headers.items() if name.lower() not in drop}
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            content = answer.read()
            self._answer(answer.status, answer.getheaders(), content)
            connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            behaviour = running.behaviour
            ours = {"content-length", "connection", "transfer-encoding", *(name.lower() for name in behaviour.headers)}
            for name, value in headers:
                if name.lower() not in ours:
                    self.send_header(name, value)
            for name, value in behaviour.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_DELETE = do_HEAD = _serve  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{server.server_port}"
    yield running
    server.shutdown()
    server.server_close()
