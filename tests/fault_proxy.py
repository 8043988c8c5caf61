"""A proxy between a test and a real S3 server that does to the traffic what networks and busy servers do."""

import contextlib
import enum
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_DELAY_SECONDS = 0.2
_MOST_FAULTS_IN_A_ROW = 2
"""Of one request, so that a schedule is survived for sure by a client that asks more often."""


class Fault(enum.Enum):
    """What happens to one request."""

    SLOW_DOWN = "503 SlowDown"
    INTERNAL = "500 InternalError"
    CONFLICT = "409 ConditionalRequestConflict"
    RESET_REQUEST = "the connection is reset in the middle of the request"
    RESET_RESPONSE = "the connection is reset in the middle of the response"
    LOSE_RESPONSE = "the request is carried out, its answer is lost"
    DELAY = "the answer takes long"


_ANSWERS = {Fault.SLOW_DOWN, Fault.INTERNAL, Fault.CONFLICT}

Schedule = Callable[[str, str, int], Fault | None]
"""The fault of a request, from its method, its path with query and how often its client has sent it by now; called by
several threads.
"""


class FaultProxy:
    """`endpoint` takes requests as long as `fault_proxy` runs; `faults` counts what was done to them."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.faults: Counter[Fault] = Counter()


@contextlib.contextmanager
def fault_proxy(upstream: str, schedule: Schedule) -> Iterator[FaultProxy]:
    """A proxy on loopback before the server at `upstream`, "http://HOST:PORT"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_address[1]}")
    server.upstream, server.schedule, server.faults = urlsplit(upstream).netloc, schedule, proxy.faults  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def seeded(seed: int, rate: float) -> Schedule:
    """Every fault but CONFLICT, for a share `rate` of the requests, never too many in a row for the same one."""
    rng, lock, in_a_row = random.Random(seed), threading.Lock(), Counter[tuple[str, str]]()
    kinds = [fault for fault in Fault if fault is not Fault.CONFLICT]

    def draw(method: str, path: str, attempt: int) -> Fault | None:
        with lock:
            # A path's count alone is no limit where another client's success on it begins it again, the attempt alone
            # none where a body that broke off is asked for by a new request.
            most = max(in_a_row[method, path], attempt - 1)
            if rng.random() >= rate or most >= _MOST_FAULTS_IN_A_ROW:
                in_a_row[method, path] = 0
                return None
            in_a_row[method, path] += 1
            return rng.choice(kinds)

    return draw


def first(fault: Fault, method: str, part: str = "", times: int = 1) -> Schedule:
    """`fault` for the first requests of this method whose path and query contain `part`, none for others."""
    lock, left = threading.Lock(), [times]

    def draw(asked: str, path: str, attempt: int) -> Fault | None:
        with lock:
            if asked != method or part not in path or not left[0]:
                return None
            left[0] -= 1
            return fault

    return draw


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        """Forward one request and its answer, except for what the schedule says. Host stays: it is signed."""
        fault = self.server.schedule(self.command, self.path, self._attempt())  # type: ignore[attr-defined]
        if fault is not None:
            self.server.faults[fault] += 1  # type: ignore[attr-defined]
        length = int(self.headers.get("Content-Length", 0))
        if fault is Fault.RESET_REQUEST:
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault is Fault.DELAY:
            time.sleep(_DELAY_SECONDS)
        if fault in _ANSWERS:
            self._answer(fault)
            return
        self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # names that the base class asks for

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test says what it needs."""

    def _attempt(self) -> int:
        """As botocore tells it: "ttl=...; attempt=2; max=7"."""
        (attempt,) = re.findall(r"\battempt=(\d+)", self.headers["amz-sdk-request"])
        return int(attempt)

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)  # type: ignore[attr-defined]
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            content = response.read()
        if fault is Fault.LOSE_RESPONSE:
            self._reset()
            return
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        held = response.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", held)
        self.end_headers()
        if fault is Fault.RESET_RESPONSE:
            self.wfile.write(content[: len(content) // 2])
            self._reset()
        else:
            self.wfile.write(content)

    def _answer(self, fault: Fault) -> None:
        status, code = fault.value.split()
        content = (
            b""
            if self.command == "HEAD"
            else f"<Error><Code>{code}</Code><Message>try again</Message></Error>".encode()
        )
        self.send_response_only(int(status))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        self.wfile.flush()
        # Closing with a linger of zero seconds sends a reset instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
