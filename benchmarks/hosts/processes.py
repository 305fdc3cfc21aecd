"""Processes on hosts: started, waited for, killed, stopped, started again; each has a log. It knows no namespace commands and no graph."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hosts import Host, inside

START_S, STOP_S = 120.0, 90.0
PAUSE_S = 0.02


class Broken(Exception):
    """A process did not do what it should; the text has the end of its log."""


class Process:
    """One process on a host. It is ready when its log says `ready` (a regular expression)."""

    def __init__(
        self, host: Host, name: str, command: Sequence[str], folder: Path, *, ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.host, self.name, self._ready = host, name, re.compile(ready)
        self._command = inside(host.namespace, *command)
        self._folder, self._environment = folder, {**os.environ, **(environment or {})}
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._from = 0
        """where in the log this start begins"""

    def start(self) -> None:
        """Start it; does not wait."""
        self._from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C ends the run, and the run ends its processes, in that order
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def said(self) -> str:
        """Its log since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode(errors="replace")

    def wait(self) -> None:
        """Until it is ready. Raises Broken."""
        limit = time.monotonic() + START_S
        while not self._ready.search(self.said()):
            if not self.alive or time.monotonic() > limit:
                raise Broken(f"{self.name} did not start: {' '.join(self._command)}\n{self.said()[-3000:]}")
            time.sleep(PAUSE_S)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def send(self, signal_: signal.Signals) -> None:
        """Send a signal."""
        assert self._process
        self._process.send_signal(signal_)

    def kill(self) -> None:
        """SIGKILL, and until it is gone."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and until it is gone; its status. Raises Broken where it does not go."""
        assert self._process
        self.send(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Until it is gone; its status. Raises Broken where it does not go."""
        assert self._process
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Broken(f"{self.name} did not end within {STOP_S:g} s of being asked to.\n{self.said()[-3000:]}") from None


class Balancer(Process):
    """HAProxy with a configuration file; its socket for the administrator is at `admin`."""

    def __init__(self, host: Host, configuration: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self.admin = folder / "admin.sock"
        found = program("haproxy")
        settings = {**environment, "LB_ADMIN": str(self.admin)}
        super().__init__(host, "haproxy", [found, "-db", "-f", str(configuration)], folder, ready="", environment=settings)

    def ask(self, command: str) -> str:
        """What HAProxy says to a command."""
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(self.admin))
            link.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: link.recv(65536), b"")).decode()

    def states(self, backend: str) -> dict[str, str]:
        """Server -> what HAProxy thinks of it: UP, DOWN, DRAIN, ...; UNKNOWN: it has not been asked yet, and gets requests all the same."""
        head, *rows = self.ask("show stat").removeprefix("# ").strip().splitlines()
        names = head.split(",")
        found = [dict(zip(names, row.split(","))) for row in rows]
        own = {row["svname"]: row for row in found if row["pxname"] == backend and row["svname"] != "BACKEND"}
        return {name: "UNKNOWN" if "INI" in row["check_status"] else row["status"].split()[0] for name, row in own.items()}


def program(name: str) -> str:
    """The path of a program, also of one that only an administrator's PATH has. Raises Broken."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if not found:
        raise Broken(f"{name} is missing: apt-get install {name}")
    return found
