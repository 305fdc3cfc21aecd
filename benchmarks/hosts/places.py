"""The machines of the run: which hosts there are and what runs on each. It knows commands and addresses; faults are run.py's.

client ─▶ lb: HAProxy ─┬▶ g1: gateway ─┬─▶ w1, w2: math      w3: law (falls back to health)      w4: health
                       └▶ g2: gateway ─┤   w5: physics (LoRA)      w6: history (another LoRA)
                                       └─▶ redis
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hosts import Net, inside
from models import Models
from processes import Balancer, Broken, Process, program

HERE = Path(__file__).parent
BALANCER = HERE.parent.parent / "examples" / "haproxy.cfg"
GATEWAYS, WORKERS = ("g1", "g2"), ("w1", "w2", "w3", "w4", "w5", "w6")
SERVES = {"math": ("w1", "w2"), "law": ("w3",), "health": ("w4",), "physics": ("w5",), "history": ("w6",)}
FALLBACK = {"law": "health"}
ADAPTED = ("w5", "w6")
TIMEOUT_S = 60
"""that a worker may think: more than any time in which the run must have recovered"""
PORT, WORKER_PORT, REDIS_PORT = 8000, 8080, 6379


class Places:
    """Hosts by name, processes by host's name, the key that clients show."""

    def __init__(self, net: Net, folder: Path, models: Models) -> None:
        self.folder, self.models = folder, models
        self.hosts = {name: net.host(name) for name in ("client", "lb", "redis", *GATEWAYS, *WORKERS)}
        self.store = f"redis://{self.hosts['redis'].address}:{REDIS_PORT}/0"
        self.processes: dict[str, Process] = {"redis": self._redis(), **{name: self._worker(name) for name in WORKERS}}
        (folder / "graph.yaml").write_text(self._graph())
        self.processes |= {name: self._gateway(name) for name in GATEWAYS}
        addresses = {f"GATEWAY_{number}": f"{self.hosts[name].address}:{PORT}" for number, name in enumerate(GATEWAYS, 1)}
        self.balancer = Balancer(self.hosts["lb"], BALANCER, folder, addresses | {"LB_BIND": f"{self.hosts['lb'].address}:{PORT}"})
        self.address = f"http://{self.hosts['lb'].address}:{PORT}"
        self.key = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything runs. Raises Broken where something does not start, or does not end when it is told to."""
        for process in self.processes.values():
            process.start()
        for process in self.processes.values():
            process.wait()
        self.key = self._make_key()
        self.balancer.start()
        self.until_up(*GATEWAYS)
        yield
        for name in GATEWAYS:
            self.processes[name].stop()

    def until_up(self, *names: str) -> None:
        """Until HAProxy sends requests to these gateways. Raises Broken."""
        limit = time.monotonic() + 120
        while True:
            try:
                states = self.balancer.states("gateways")
            except OSError:  # it is just starting
                states = {}
            if all(states.get(name) == "UP" for name in names):
                return
            if time.monotonic() > limit or not self.balancer.alive:
                raise Broken(f"HAProxy finds no gateway ready: {states}.\n{self.balancer.said()[-2000:]}")
            time.sleep(0.02)

    def gateway(self, name: str) -> str:
        """Where a gateway is, past the load balancer."""
        return f"http://{self.hosts[name].address}:{PORT}"

    def _redis(self) -> Process:
        host = self.hosts["redis"]
        files = self.folder / "redis"
        files.mkdir()
        at = ["--bind", host.address, "--port", str(REDIS_PORT), "--protected-mode", "no"]
        kept = ["--appendonly", "yes", "--save", "", "--dir", str(files)]
        return Process(host, "redis", [program("redis-server"), *at, *kept], self.folder, ready="Ready to accept connections")

    def _worker(self, name: str) -> Process:
        host = self.hosts[name]
        command = [sys.executable, str(HERE / "worker.py"), str(self.models.base), "--address", host.address, "--port", str(WORKER_PORT)]
        if name in ADAPTED:
            command += ["--adapter", str(self.models.adapters[ADAPTED.index(name)])]
        return Process(host, name, command, self.folder, ready="ready at")

    def _gateway(self, name: str) -> Process:
        host = self.hosts[name]
        at = ["--host", host.address, "--port", str(PORT), "--store", self.store, "--grace", str(TIMEOUT_S)]
        command = [sys.executable, "-m", "lmgraph", "serve", "graph.yaml", *at]
        settings = {"LMGRAPH_CACHE": str(self.folder / "cache"), "LMGRAPH_THREADS": "1"}
        return Process(host, name, command, self.folder, ready="lmgraph serves", environment=settings)

    def _graph(self) -> str:
        lines = ["version: 1", f"master: {{bundle: {self.models.master}}}", "nodes:"]
        for node, names in SERVES.items():
            urls = ", ".join(f"'http://{self.hosts[name].address}:{WORKER_PORT}/v1'" for name in names)
            worker = f"{{kind: openai, urls: [{urls}], model: base, temperature: 0, timeout_s: {TIMEOUT_S}}}"
            other = f", fallback: {FALLBACK[node]}" if node in FALLBACK else ""
            lines.append(
                f"  {node}: {{token: {self.models.tokens[node]}, description: about {node}, rewrite: never, worker: {worker}{other}}}"
            )
        return "\n".join([*lines, "edges: {start: ['*']}", ""])

    def _make_key(self) -> str:
        command = [sys.executable, "-m", "lmgraph", "keys", "create", "client", "--json", "--store", self.store]
        done = subprocess.run(inside(self.hosts["g1"].namespace, *command), capture_output=True, text=True)
        if done.returncode:
            raise Broken(f"No key could be made:\n{done.stderr[-2000:]}")
        return str(json.loads(done.stdout)["secret"])
