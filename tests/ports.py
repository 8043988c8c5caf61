"""Ports for servers that tests start: below those that the system gives to whoever asks for any (32768 and higher on
Linux), so that no connection takes one between the moment that it is found free and the start of its server.
"""

import contextlib
import os
import random
import socket

S3_PORTS = range(20_000, 22_700)
RAY_PORTS = range(23_000, 29_000)

_places = random.Random(os.getpid())


def free_ports(count: int, ports: range, higher: int = 0) -> list[int]:
    """As many of `ports`, from a place drawn by the process: two test runs side by side seldom meet, and the workers of
    one never. With `higher`, the port that much higher is free too. OSError if there are not so many.
    """
    own = ports[_worker() :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    start = _places.randrange(len(own))
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in (*own[start:], *own[:start]):
            with contextlib.suppress(OSError):  # taken
                for one in {port, port + higher}:
                    held.enter_context(socket.socket()).bind(("127.0.0.1", one))
                found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"{len(found)} ports of {ports} are free, {count} are needed")


def _worker() -> int:
    """The number of this worker of pytest-xdist, 0 without it."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
