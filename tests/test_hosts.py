"""Several machines on one: network namespaces as hosts, faults of their links, and the whole distributed run (benchmarks/hosts), small."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lmgraph.workers import liveness
from lmgraph.workers.http import Client, NoConnection
from lmgraph.workers.target import prepare

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "hosts"
BALANCER = ROOT / "examples" / "haproxy.cfg"
sys.path.insert(0, str(FOLDER))

import hosts
import processes

CRASHING = """
import subprocess, sys
sys.path.insert(0, {folder!r})
import hosts
with hosts.network() as net:
    host = net.host("one")
    process = subprocess.Popen(hosts.inside(host.namespace, "sleep", "1000"))
    while "sleep" not in open(f"/proc/{{process.pid}}/comm").read(): pass
    print(process.pid, flush=True)
    process.wait()
"""


def need(*programs: str) -> None:
    """Skip where something is missing that only the operator can give."""
    if why := hosts.impossible():
        pytest.skip(f"no network namespaces here: {why}")
    for program in programs:
        try:
            processes.program(program)
        except processes.Broken as error:
            pytest.skip(str(error))


@pytest.fixture
def net() -> Iterator[hosts.Net]:
    need()
    with hosts.network() as made:
        yield made


def listen(host: hosts.Host) -> socket.socket:
    with host.inside():
        return socket.create_server((host.address, 8000))


def connected(one: hosts.Host, other: hosts.Host) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection between two hosts."""
    with listen(other) as server:
        with one.inside():
            here = socket.create_connection((other.address, 8000), timeout=60)
        there, _ = server.accept()
    there.settimeout(60)
    return here, there


def hears(end: socket.socket, seconds: float) -> bool:
    end.settimeout(seconds)
    try:
        return end.recv(1) != b""
    except TimeoutError:
        return False


# ---------------------------------------------------------------- hosts and links


def test_a_host_that_is_cut_off_is_silent_and_its_connections_stay(net: hosts.Net) -> None:
    one, other = net.host("one"), net.host("other")
    here, there = connected(one, other)
    with here, there:
        here.send(b"1")
        assert hears(there, 60)
        with net.cut(other):
            here.send(b"2")
            assert not hears(there, 0.3)
        assert hears(there, 60), "what was lost is sent again"


def test_a_slow_link_is_slow_in_both_directions_and_fast_again_afterwards(net: hosts.Net) -> None:
    one, other = net.host("one"), net.host("other")
    here, there = connected(one, other)

    def around() -> float:
        began = time.perf_counter()
        here.send(b"1")
        assert hears(there, 60)
        there.send(b"2")
        assert hears(here, 60)
        return time.perf_counter() - began

    with here, there:
        around()
        with net.slow(other, delay_ms=300, loss_percent=0) as how:
            assert how in ("netem", "wire") and around() >= 0.6
        assert min(around() for _ in range(20)) < 0.3
        with net.slow(other, delay_ms=1, loss_percent=100):
            here.send(b"3")
            assert not hears(there, 0.3)
        assert hears(there, 60)


def test_a_thread_is_on_a_host_only_inside(net: hosts.Net) -> None:
    def links() -> set[str]:
        return {name for _, name in socket.if_nameindex()}

    before = links()
    with net.host("one").inside():
        assert links() == {"lo", "eth0"}
    assert links() == before and not any(name.startswith(("to-", "bridge")) for name in before)


@pytest.mark.parametrize("how", ["ends", "fails", "is stopped", "is killed"])
def test_nothing_is_left_of_a_run_however_it_ends(how: str) -> None:
    need()
    script = CRASHING.format(folder=str(FOLDER))
    if how in ("ends", "fails"):
        script = script.replace("    process.wait()", "    process.kill()" if how == "ends" else "    1 / 0")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout
        inner = int(run.stdout.readline())
        if how == "is stopped":
            run.send_signal(signal.SIGINT)
        elif how == "is killed":
            run.kill()
        run.wait(60)
    if how == "is killed":
        hosts.sweep()  # as the next run does
    assert not [name for name in hosts.namespaces() if name.startswith(f"{hosts.PREFIX}-{run.pid}.")]
    with suppress(FileNotFoundError):  # dead, but its new parent has not taken note yet
        assert Path(f"/proc/{inner}/stat").read_text().rpartition(") ")[2][0] in "ZX"


def test_a_sweep_leaves_a_living_run_alone(net: hosts.Net) -> None:
    net.host("one")
    mine = [name for name in hosts.namespaces() if f"-{os.getpid()}." in name]
    hosts.sweep()
    assert len(mine) == 2 and set(mine) <= set(hosts.namespaces())


# ---------------------------------------------------------------- connections to a host that is cut off


@pytest.mark.parametrize("when", ["while it thinks", "between two requests"])
def test_a_worker_host_that_is_cut_off_is_given_up_though_it_closes_nothing(
        net: hosts.Net, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Without it, the wait is a quarter of an hour, or as long as a worker may think."""
    monkeypatch.setattr(liveness, "OPTIONS", liveness.OPTIONS | {"TCP_USER_TIMEOUT": 1000, "TCP_KEEPIDLE": 1})
    gateway, worker = net.host("gateway"), net.host("worker")
    server, asked = listen(worker), threading.Event()

    def serve() -> None:
        connection, _ = server.accept()
        while connection.recv(65536):
            asked.set()
            if when == "between two requests":
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()

    async def main() -> None:
        client = Client(connect_s=600, idle_s=600)
        target = prepare(f"http://{worker.address}:8000/v1", {})

        async def post() -> None:
            connection = await client.send(target, b"{}", silence_s=600)
            assert await connection.read() == b""
            connection.leave()

        if when == "between two requests":
            await post()
            with net.cut(worker), pytest.raises(NoConnection):
                await asyncio.wait_for(post(), 60)
        else:
            under_way = asyncio.create_task(post())
            assert await asyncio.to_thread(asked.wait, 30)
            with net.cut(worker), pytest.raises(NoConnection):
                await asyncio.wait_for(under_way, 60)
        client.close()

    with server, gateway.inside():
        asyncio.run(main())


# ---------------------------------------------------------------- the load balancer, and all of it


def test_the_example_for_the_load_balancer_is_valid_and_its_errors_have_openais_form() -> None:
    text = BALANCER.read_text(encoding="utf-8")
    found = re.findall(r"http-error status (\d+) content-type application/json string '(.*?)'", text)
    assert {int(status) for status, _ in found} == {400, 408, 502, 503, 504}
    for _, body in found:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["code"] and error["message"].endswith(".")
    if haproxy := shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin"):
        done = subprocess.run([haproxy, "-c", "-f", str(BALANCER)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_conversations_go_on_whatever_fails_and_no_acknowledged_turn_is_lost() -> None:
    need("haproxy", "redis-server")
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), "--talkers", "4", "--json"], capture_output=True, text=True)
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert not [sentence for sentence, holds in report["musts"].items() if not holds], f"{report['phases']}\n{done.stderr}"
    assert len(report["musts"]) > 25 and report["phases"]["all"]["acknowledged"] > 50
    assert report["phases"]["Redis killed"]["unkept"] and report["phases"]["Redis cut off"]["unkept"]
