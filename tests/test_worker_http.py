"""HTTP/1.1 to workers over real sockets: connections that are used again, TLS, tunnels, answers that end in every way, and strange ones."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph.workers import liveness
from lmgraph.workers.http import AHEAD, BrokenOff, Client, NoConnection
from lmgraph.workers.target import prepare

PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """Says `answers` one after another over each connection, a request each, then closes it (or `stays` without a word)."""

    def __init__(self, *answers: Sequence[bytes] | bytes, stays: bool = False) -> None:
        self.answers, self.stays = [[a] if isinstance(a, bytes) else list(a) for a in answers], stays
        self.connections = 0
        self.heard: list[bytes] = []
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            for answer in self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heard.append(head)
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                for piece in answer:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
            if self.stays:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone.set()
            writer.close()


@asynccontextmanager
async def listening(server: Callable[..., Awaitable[None]], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    listener = await asyncio.start_server(server, "127.0.0.1", 0, ssl=tls)
    async with listener:
        yield listener.sockets[0].getsockname()[1]


@asynccontextmanager
async def client(connect_s: float = 20) -> AsyncIterator[Client]:
    made = Client(connect_s=connect_s, idle_s=60)
    try:
        yield made
    finally:
        made.close()


async def ask(made: Client, url: str, silence_s: float = 20) -> bytes:
    """The body of an answer, read to its end."""
    answer = await made.send(prepare(url, {"Content-Type": "text/plain"}), b"question", silence_s=silence_s)
    assert answer.status == 200
    body = b""
    while data := await answer.read():
        body += data
    answer.leave()
    return body


def asked(server: Server, times: int = 1, **options: float) -> list[bytes]:
    """What so many questions, one after another, are answered."""

    async def work() -> list[bytes]:
        async with listening(server) as port, client() as made:
            return [await ask(made, f"http://127.0.0.1:{port}/v1/x?y=1", **options) for _ in range(times)]

    return asyncio.run(work())


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED])
def test_a_connection_is_used_again_when_its_answer_is_over(answer: bytes) -> None:
    server = Server(answer, answer, answer)
    assert asked(server, 3) == [b"hello"] * 3 and server.connections == 1
    assert server.heard[0].startswith(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:") and b"\r\nContent-Type: text/plain\r\n" in server.heard[0]


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200\r\n\r\n"])
def test_an_answer_without_a_length_ends_with_its_connection(head: bytes) -> None:
    server = Server(head + b"hello")
    assert asked(server, 2) == [b"hello"] * 2 and server.connections == 2


def test_a_connection_that_was_closed_meanwhile_is_replaced() -> None:
    async def work() -> None:
        server = Server(PLAIN)
        async with listening(server) as port, client() as made:
            url = f"http://127.0.0.1:{port}/"
            assert await ask(made, url) == b"hello"
            await server.gone.wait()
            assert await ask(made, url) == b"hello" and server.connections == 2

    asyncio.run(work())


def test_what_comes_before_an_answer_is_passed_over() -> None:
    assert asked(Server(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + CHUNKED)) == [b"hello"]


@pytest.mark.parametrize(("answer", "words"), [
    (PLAIN[:-1], "^$"), (CHUNKED[:-5], "^$"), (b"", "^$"), (PLAIN[:20], "^$"), (b"SSH-2.0-x\r\n", "not HTTP"), (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx", "compressed"),
    (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", "protocol"),
    ([b"HTTP/1.1 200 OK\r\n", *[b"x-%d: %s\r\n" % (i, b"y" * 1000) for i in range(100)]], "headers do not end"),
])
def test_what_is_no_whole_answer_is_an_error(answer: bytes | list[bytes], words: str) -> None:
    with pytest.raises(BrokenOff, match=words):
        asked(Server(answer))


def test_a_second_answer_to_one_request_is_not_taken_for_the_next_ones() -> None:
    other = PLAIN.replace(b"hello", b"other")
    assert asked(Server([PLAIN + other], PLAIN), 2) == [b"hello"] * 2
    assert asked(Server([CHUNKED + other], PLAIN), 2) == [b"hello"] * 2


@pytest.mark.parametrize("said", [b"", PLAIN[:30], PLAIN[:-2], CHUNKED[:-6]])
def test_a_silent_server_is_a_timeout_and_loses_its_connection(said: bytes) -> None:
    async def work() -> None:
        server = Server(said, stays=True)
        async with listening(server) as port, client() as made:
            with pytest.raises(asyncio.TimeoutError):
                try:
                    answer = await made.send(prepare(f"http://127.0.0.1:{port}/", {}), b"", silence_s=0.05)
                    while await answer.read():
                        pass
                except asyncio.TimeoutError:
                    if said in (PLAIN[:-2], CHUNKED[:-6]):
                        answer.leave()
                    raise
            await server.gone.wait()

    asyncio.run(work())


@pytest.mark.parametrize("before", [(), (PLAIN,)])
def test_an_answer_that_cannot_be_read_closes_its_connection(before: tuple[bytes, ...]) -> None:
    async def work() -> None:
        server = Server(*before, b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 9\r\n\r\nx", stays=True)
        async with listening(server) as port, client() as made:
            for _ in before:
                await ask(made, f"http://127.0.0.1:{port}/")
            with pytest.raises(BrokenOff):
                await ask(made, f"http://127.0.0.1:{port}/")
            await server.gone.wait()
            assert server.connections == 1

    asyncio.run(work())


def test_nobody_there_is_an_error_and_nobody_in_time_too() -> None:
    async def work() -> None:
        async with client(connect_s=0) as made:
            with pytest.raises((NoConnection, OSError)):
                await ask(made, "http://127.0.0.1:1/")

    asyncio.run(work())


def test_no_more_is_read_than_somebody_wants() -> None:
    async def work() -> None:
        sent = 0

        async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 << 20))
            for _ in range(64):
                writer.write(b"x" * (1 << 20))
                await writer.drain()
                sent += 1
            writer.close()

        async with listening(server) as port, client() as made:
            answer = await made.send(prepare(f"http://127.0.0.1:{port}/", {}), b"", silence_s=20)
            before = -1
            while sent != before:  # until the server can send no more
                before = sent
                for _ in range(1000):
                    await asyncio.sleep(0)
            assert sent < 32
            size = biggest = 0
            while data := await answer.read():
                size, biggest = size + len(data), max(biggest, len(data))
            assert size == 64 << 20 and biggest < AHEAD + (1 << 20)
            answer.leave()

    asyncio.run(work())


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=60, deadline=None)
def test_an_answer_is_the_same_however_it_is_cut(pieces: list[bytes], cuts: list[int]) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\ntrailer: x\r\n\r\n"
    ends = sorted({min(c, len(whole)) for c in cuts} | {0, len(whole)})
    server = Server([whole[a:b] for a, b in pairwise(ends)], PLAIN)
    assert asked(server, 2) == [b"".join(pieces), b"hello"] and server.connections == 1


def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def work() -> bytes:
        async with listening(Server(CHUNKED, CHUNKED), context) as port, client() as made:
            await ask(made, f"https://localhost:{port}/")
            return await ask(made, f"https://localhost:{port}/")

    with pytest.raises(ssl.SSLCertVerificationError):
        asyncio.run(work())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert asyncio.run(work()) == b"hello"


def test_tls_goes_through_a_proxy_in_a_tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("worker.invalid").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    heard: list[bytes] = []

    async def work(status: bytes) -> bytes:
        async with listening(Server(CHUNKED), context) as port:
            async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                heard.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n")
                if not status.startswith(b"200"):
                    writer.close()
                    return
                other, there = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(_pass(reader, there), _pass(other, writer))

            async with listening(proxy) as proxy_port, client() as made:
                monkeypatch.setenv("https_proxy", f"http://me:p%40w@127.0.0.1:{proxy_port}")
                return await ask(made, "https://worker.invalid/v1")

    assert asyncio.run(work(b"200 Connection established")) == b"hello"
    assert heard[0].startswith(b"CONNECT worker.invalid:443 HTTP/1.1\r\n") and b"\r\nProxy-Authorization: Basic bWU6cEB3\r\n" in heard[0]
    with pytest.raises(NoConnection, match="answered 407"):
        asyncio.run(work(b"407 Proxy Authentication Required"))
    with pytest.raises(NoConnection, match="answered nothing"):
        asyncio.run(work(b""))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("url", ["ftp://x/", "http://", "x", "http://a b/", "http://x/a b", "http://x/\r\nEvil: 1", "http://x:port/", "http://x:99999999/"])
def test_what_is_no_url_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(ValueError):
        prepare(url, {})


def test_user_and_password_of_a_url_become_a_header_that_a_key_replaces() -> None:
    assert b"\r\nAuthorization: Basic bWU6cEB3\r\n" in prepare("http://me:p%40w@host/v1", {}).head
    assert b"Basic" not in prepare("http://me:pw@host/v1", {"Authorization": "Bearer k"}).head
    assert prepare("https://[::1]:8443/v1", {}).origin == (True, "::1", 8443) and b"\r\nHost: [::1]:8443\r\n" in prepare("https://[::1]:8443/v1", {}).head
    assert prepare("http://bücher.example/", {}).origin[1] == "xn--bcher-kva.example"


def test_a_proxy_of_an_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(ValueError, match="socks5"):
        prepare("http://worker.invalid/", {})


# --- hosts that are gone (with real links that are cut: test_hosts.py) ---


def test_the_system_asks_for_us_whether_the_other_host_is_still_there() -> None:
    with socket.socket() as end:
        liveness.watch(end)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in liveness.OPTIONS.items():
            if hasattr(socket, name):
                assert end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


@pytest.mark.parametrize(("error", "is_gone"), [
    (OSError(errno.ETIMEDOUT, "timed out"), True), (OSError(errno.EHOSTUNREACH, "no route"), True), (ConnectionResetError(errno.ECONNRESET, "reset"), False),
    (ValueError("x"), False), (None, False)])
def test_a_host_that_says_something_is_there(error: Exception | None, is_gone: bool) -> None:
    assert liveness.gone(error) is is_gone
