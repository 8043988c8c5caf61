"""Hosts on one machine: network namespaces with an address each, joined by a switch whose cables can be pulled.

A number of hosts in, a `Network` out. Nothing is seen or touched of the machine's own network: the switch, its ports
and the hosts live in namespaces of their own, below a user namespace, and go with the processes that hold them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

_PROGRAMS = ("unshare", "nsenter", "ip")
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace with one address, which is the host's name too."""

    address: str
    port: str
    """Of the switch: the end of its cable."""
    pid: int
    """Of the process that holds the namespace."""

    def command(self, *arguments: str) -> list[str]:
        """What runs a program on this host."""
        return [*_enter(self.pid), "--uts", "--", *arguments]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Hosts that reach each other, and nothing else."""

    hosts: tuple[Host, ...]
    switch_pid: int

    def cut(self, host: Host) -> None:
        """Pull its cable: what is sent to it or by it is lost, and nobody is told."""
        self._port(host, "down")

    def mend(self, host: Host) -> None:
        self._port(host, "up")

    def _port(self, host: Host, state: str) -> None:
        _run(*_enter(self.switch_pid), "ip", "link", "set", host.port, state)


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """Hosts for the length of a block; all that runs on them is killed at its end. Skips where it is not allowed."""
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"network namespaces take util-linux and iproute2: no {', '.join(missing)}")
    with contextlib.ExitStack() as held:
        switch = held.enter_context(_held("unshare", "--map-root-user", "--net"))
        bridge = f"sw{os.getpid()}"
        try:
            _wait_for_namespace(switch)
            _run(*_enter(switch.pid), "ip", "link", "add", bridge, "type", "bridge")
            _run(*_enter(switch.pid), "ip", "link", "add", "try0", "type", "veth", "peer", "name", "try1")
        except (ChildProcessError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine allows no network namespaces: {error}")
        _run(*_enter(switch.pid), "ip", "link", "set", bridge, "up")
        hosts = tuple(held.enter_context(_host(switch.pid, bridge, number)) for number in range(1, num_hosts + 1))
        yield Network(hosts=hosts, switch_pid=switch.pid)


@contextlib.contextmanager
def _host(switch_pid: int, bridge: str, number: int) -> Iterator[Host]:
    with _held(*_enter(switch_pid), "unshare", "--net", "--uts") as holder:
        _wait_for_namespace(holder, switch_pid)
        host = Host(address=f"10.77.0.{number}", port=f"port{number}", pid=holder.pid)
        cable = ("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        _run(*_enter(switch_pid), *cable)
        _run(*_enter(switch_pid), "ip", "link", "set", host.port, "master", bridge, "up")
        _run(*host.command("ip", "link", "set", "lo", "up"))
        _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", "eth0"))
        _run(*host.command("ip", "link", "set", "eth0", "up"))
        _run(*host.command("hostname", host.address))  # a name that every host can look up
        try:
            yield host
        finally:
            _kill_all_in(holder.pid)


@contextlib.contextmanager
def _held(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in new namespaces that does nothing, and ends with this one whatever becomes of it."""
    with subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            yield holder
        finally:
            holder.kill()


def _enter(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--user", "--net", "--preserve-credentials"]


def _wait_for_namespace(holder: subprocess.Popen[bytes], *others: int) -> None:
    """Until the process is in a network of its own; ChildProcessError with its reason if it ends instead."""
    outside = {None, *map(_namespace, (os.getpid(), *others))}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while _namespace(holder.pid) in outside:
        if holder.poll() is not None:
            assert holder.stderr is not None
            raise ChildProcessError(holder.stderr.read().decode().strip())
        assert time.monotonic() < deadline, holder.args
        time.sleep(0.01)


def _namespace(pid: int) -> str | None:
    with contextlib.suppress(OSError):  # it has ended
        return os.readlink(f"/proc/{pid}/ns/net")
    return None


def _kill_all_in(pid: int) -> None:
    """Kill what runs in the namespace of the process apart from itself, whoever its parent has become."""
    namespace = _namespace(pid)
    assert namespace is not None
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while found := [
        one for one in map(int, filter(str.isdigit, os.listdir("/proc"))) if _namespace(one) == namespace and one != pid
    ]:
        for one in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
