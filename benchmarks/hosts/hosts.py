"""Hosts on one machine: network namespaces on a switch, and what may happen to their links. Linux; needs CAP_NET_ADMIN and CAP_SYS_ADMIN.

A `Net` is a switch (a bridge in a namespace of its own, so that nothing is made in the machine's own network) and hosts on it, each with
one link. A link can be cut (it goes down at the switch: nobody is told, nothing is closed) and made slow and lossy. Everything is gone when
the block ends, also by Ctrl-C; what a run left that was killed is swept away by the next one. It knows nothing of what runs on the hosts.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "lmg"
"""how the names of all our namespaces begin; then come the process that made them, when it started, and the host"""
NETWORK = "10.87.0"
SWITCH = "switch"
WIRE = Path(__file__).parent / "wire.py"
CLONE_NEWNET = 0x40000000


class CannotMake(Exception):
    """Namespaces cannot be made here; the text says why."""


@dataclass(frozen=True)
class Host:
    """One host: its name, its address, its namespace."""

    name: str
    address: str
    namespace: str

    def enter(self) -> None:
        """The calling thread goes on here: sockets that it opens and processes that it starts are this host's."""
        _set_network(f"/run/netns/{self.namespace}")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is here for a while."""
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self.enter()
            yield
        finally:
            _set_network(back)
            os.close(back)


class Net:
    """A switch with hosts. Make one with `network()`."""

    def __init__(self) -> None:
        self._own = f"{PREFIX}-{os.getpid()}.{_started(os.getpid())}"
        self._switch = f"{self._own}-{SWITCH}"
        self._hosts = 0

    def host(self, name: str) -> Host:
        """A new host, connected to the switch."""
        self._hosts += 1
        made = Host(name, f"{NETWORK}.{self._hosts}", f"{self._own}-{name}")
        _ip("netns", "add", made.namespace)
        _ip("-n", self._switch, "link", "add", "name", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", made.namespace)
        _ip("-n", self._switch, "link", "set", f"to-{name}", "master", "bridge", "up")
        _ip("-n", made.namespace, "addr", "add", f"{made.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", made.namespace, "link", "set", link, "up")
        return made

    @contextmanager
    def cut(self, *hosts: Host) -> Iterator[None]:
        """Their links are down at the switch: what is sent from and to them is lost, and no connection is closed."""
        try:
            for host in hosts:
                _ip("-n", self._switch, "link", "set", f"to-{host.name}", "down")
            yield
        finally:
            for host in hosts:
                _ip("-n", self._switch, "link", "set", f"to-{host.name}", "up")

    @contextmanager
    def slow(self, host: Host, *, delay_ms: int, loss_percent: float) -> Iterator[str]:
        """Whatever this host sends, and what is sent to it, comes so much later, and so much of it never; gives what does it.

        netem where the kernel has it, else a process of our own in the middle of the link (wire.py).
        """
        ends = ((host.namespace, "eth0"), (self._switch, f"to-{host.name}"))
        try:
            for namespace, link in ends:
                rule = ("root", "netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%")
                _run("tc", "-n", namespace, "qdisc", "add", "dev", link, *rule)
        except CannotMake as error:
            if "unknown" not in str(error):  # the kernel has no netem
                raise
        else:
            try:
                yield "netem"
            finally:
                for namespace, link in ends:
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", link, "root")
            return
        near, far, end = f"to-{host.name}", "wire", "wire-end"
        _ip("-n", self._switch, "link", "add", "name", far, "type", "veth", "peer", "name", end)
        for link in (far, end):
            _ip("-n", self._switch, "link", "set", link, "up")
        command = (sys.executable, str(WIRE), near, far, "--delay-ms", str(delay_ms), "--loss-percent", str(loss_percent))
        process = subprocess.Popen(inside(self._switch, *command), stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert process.stdout
            if process.stdout.readline() != "ready\n":
                raise CannotMake(f"{WIRE.name} did not start.")
            _ip("-n", self._switch, "link", "set", near, "nomaster")
            _ip("-n", self._switch, "link", "set", end, "master", "bridge")
            yield "wire"
        finally:
            process.kill()
            process.communicate()
            _ip("-n", self._switch, "link", "del", far)
            _ip("-n", self._switch, "link", "set", near, "master", "bridge")

    def open(self) -> None:
        """Make the switch."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "name", "bridge", "type", "bridge", "forward_delay", "0")
        _ip("-n", self._switch, "link", "set", "bridge", "up")

    def close(self) -> None:
        """End whatever runs on the hosts, and the hosts."""
        for namespace in namespaces():
            if namespace.startswith(f"{self._own}-"):
                _remove(namespace)


@contextmanager
def network() -> Iterator[Net]:
    """A net for this process. Raises CannotMake."""
    if why := impossible():
        raise CannotMake(why)
    sweep()
    net = Net()
    try:
        net.open()
        yield net
    finally:
        net.close()


def impossible() -> str:
    """Why namespaces cannot be made here, '' where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's."
    if missing := [name for name in ("ip", "tc", "setpriv") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found: apt-get install iproute2 util-linux"
    probe = f"{PREFIX}-{os.getpid()}.{_started(os.getpid())}-probe"
    try:
        _ip("netns", "add", probe)
        try:
            _ip("-n", probe, "link", "add", "name", "a", "type", "veth", "peer", "name", "b")
            _ip("-n", probe, "link", "add", "name", "c", "type", "bridge")
        finally:
            _remove(probe)
    except CannotMake as error:
        return f"{error} Root, or CAP_NET_ADMIN and CAP_SYS_ADMIN, is needed."
    return ""


def namespaces() -> list[str]:
    """The names of our namespaces, of this run and of others."""
    with suppress(FileNotFoundError):
        return sorted(path.name for path in Path("/run/netns").iterdir() if path.name.startswith(f"{PREFIX}-"))
    return []


def sweep() -> list[str]:
    """Remove the namespaces of runs that are no more, and end what runs in them; their names."""
    left = []
    for name in namespaces():
        with suppress(ValueError):
            pid, started = name.split("-", 2)[1].split(".")
            if _started(int(pid)) != started:
                _remove(name)
                left.append(name)
    return left


def inside(namespace: str, *command: str) -> list[str]:
    """The command that runs `command` in a namespace and ends with the process that started it, however that ends."""
    return ["ip", "netns", "exec", namespace, "setpriv", "--pdeathsig", "KILL", "--", *command]


def _remove(namespace: str) -> None:
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)
    _ip("netns", "del", namespace)


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; '' where there is none. Numbers of processes come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _set_network(where: str | int) -> None:
    """Move the calling thread to a network namespace, a file or a descriptor (Python has this from 3.12 on)."""
    descriptor = os.open(where, os.O_RDONLY) if isinstance(where, str) else where
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        if isinstance(where, str):
            os.close(descriptor)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotMake(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
