"""An HTTP proxy in front of an S3 endpoint that can be made to deny, forget and lie, or fail at random."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"
ERRORS = {"500": (500, "InternalError"), "503": (503, "SlowDown")}
KINDS = (
    *ERRORS,
    "reset",  # before the store hears of it
    "lost",  # the store has acted, its answer never comes
    "reset within",  # in the middle of the answer
    "truncated",  # Content-Length says more than is sent
    "delay",
)


Draw = Callable[[], str | None]  # what the next request meets, of `KINDS`


def at_random(rates: Mapping[str, float], seed: int) -> Draw:
    """Draw each kind at its rate; a request meets one at most."""
    assert set(rates) <= set(KINDS)
    generator, lock = random.Random(seed), threading.Lock()
    kinds, weights = [*rates, None], [*rates.values(), 1 - sum(rates.values())]

    def draw() -> str | None:
        with lock:
            return generator.choices(kinds, weights)[0]

    return draw


def in_turn(*kinds: str | None) -> Draw:
    """Draw these, one a request, and nothing after them."""
    left = list(kinds)
    return lambda: left.pop(0) if left else None


@dataclass
class Behavior:
    """What becomes of requests. `refuse` gives the code of an error for (method, is it a listing), or None."""

    refuse: Callable[[str, bool], str | None] = lambda method, listing: None
    status: int = 403
    forgotten: set[str] = field(default_factory=set)  # request headers that do not reach the store
    headers: dict[str, str] = field(default_factory=dict)  # of answers
    draw: Draw = lambda: None
    delay: float = 2.0  # s


def refusing_writes() -> Behavior:
    """Return the behavior of a store that answers everything but writes."""
    return Behavior(lambda method, listing: "SlowDown" if method in ("PUT", "POST") else None, status=503)


@dataclass(frozen=True)
class Request:
    """One that came: GET, PUT, POST, HEAD, DELETE or LIST, the object's key (the prefix listed), what it met."""

    method: str
    key: str
    fault: str | None
    at: float  # s, monotonic


@dataclass
class Proxy:
    """A proxy that runs: its URL, how it behaves from now on, and what came so far."""

    url: str = ""
    behavior: Behavior = field(default_factory=Behavior)
    requests: list[Request] = field(default_factory=list)

    def met(self) -> Counter[str]:
        """Return how many requests met what."""
        return Counter(request.fault for request in self.requests if request.fault)


@contextmanager
def proxy(endpoint: str) -> Iterator[Proxy]:
    """Run a proxy before `endpoint` while the block runs, and yield it."""
    there = urlsplit(endpoint).netloc
    running = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else head and body of an answer wait for each other

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            behavior = running.behavior
            body = self._body()
            code = behavior.refuse(self.command, "list-type" in self.path)
            fault = None if code else behavior.draw()
            self._note(code or fault)
            if code:
                self._refuse(behavior.status, code)
            elif fault in ERRORS:
                self._refuse(*ERRORS[fault])
            elif fault == "reset":
                self._reset()
            else:
                self._forward(behavior, body, fault)

        def _body(self) -> bytes:
            """What was sent, of a length given first (boto3) or in chunks (pyarrow)."""
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while length := int(self.rfile.readline().partition(b";")[0], 16):
                chunks.append(self.rfile.read(length))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(chunks)

        def _forward(self, behavior: Behavior, body: bytes, fault: str | None) -> None:
            if fault == "delay":
                time.sleep(behavior.delay)
            connection = http.client.HTTPConnection(there)
            drop = {"expect", "transfer-encoding", "content-length", *behavior.forgotten}
            kept = {name: value for name, value in self.headers.items() if name.lower() not in drop}
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault == "lost":
                self._reset()
                return
            self._answer(answer.status, answer.getheaders(), content, fault)

        def _refuse(self, status: int, code: str) -> None:
            self._answer(status, [("Content-Type", "application/xml")], ERROR.format(code).encode())

        def _answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str | None = None
        ) -> None:
            behavior = running.behavior
            length = str(len(content))
            if self.command == "HEAD":  # of what is not sent
                length, content = next((value for name, value in headers if name.lower() == "content-length"), "0"), b""
            ours = {"content-length", "connection", "transfer-encoding", *(name.lower() for name in behavior.headers)}
            lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
            lines += [f"{name}: {value}" for name, value in headers if name.lower() not in ours]
            lines += [f"{name}: {value}" for name, value in behavior.headers.items()]
            head = "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("latin-1")
            if fault in ("reset within", "truncated"):
                whole = head + content
                self.wfile.write(whole[: len(head) + len(content) // 2 if content else len(head) // 2])
                self._reset() if fault == "reset within" else self._close()
            else:
                self.wfile.write(head + content)

        def _note(self, fault: str | None) -> None:
            address = urlsplit(self.path)
            query = parse_qs(address.query)
            listing = "list-type" in query
            key = query.get("prefix", [""])[0] if listing else unquote(address.path).lstrip("/").partition("/")[2]
            running.requests.append(Request("LIST" if listing else self.command, key, fault, time.monotonic()))

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._close()

        def _close(self) -> None:
            self.close_connection = True
            self.rfile.close()  # it keeps the socket open
            self.connection.close()

        def finish(self) -> None:
            if self.connection.fileno() >= 0:  # not cut by us
                super().finish()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed, or gave up

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
