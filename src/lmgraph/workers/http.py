"""HTTP/1.1 calls to workers: a request is sent, the answer's bytes are read as they come. llhttp (httptools) does the parsing.

It knows connections and when they can be used again, TLS and tunnels (RFC 9112, RFC 9110 section 9.3.6). It knows nothing of what is
asked nor how a URL is read (target.py), follows no redirect and keeps no cookie. A general client costs more for each piece of an
answer than the rest of the gateway does (docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import httptools

from lmgraph.patience import Patience
from lmgraph.workers import liveness
from lmgraph.workers.target import Target

HEAD_LIMIT = 64 << 10
"""bytes of an answer's status line and headers"""
AHEAD = 256 << 10
"""bytes that are read ahead of whoever reads an answer"""


class BrokenOff(ConnectionError):
    """The connection ended, or what came is not HTTP; the text says which."""


class NoConnection(ConnectionError):
    """There was no connection in time, the proxy gives none, or the other host is not heard of any more."""


class Client:
    """Connections to any targets, kept for a while to be used again. Belongs to the event loop that first calls it."""

    def __init__(self, *, connect_s: float, idle_s: float) -> None:
        self._connect_s, self._idle_s = connect_s, idle_s
        self._idle: dict[Target, list[tuple[Connection, float]]] = {}
        self._all: set[Connection] = set()
        self._tls: ssl.SSLContext | None = None

    async def send(self, target: Target, body: bytes, *, silence_s: float, connect_s: float | None = None) -> Connection:
        """Send the target's request with this body; the answer's head is there when this returns.

        `silence_s` bounds every wait for the other side to say something; `connect_s` the wait for a connection, where it is given, in
        place of what the client was made with. Raises NoConnection, BrokenOff, asyncio.TimeoutError, OSError (ssl.SSLError among them).
        """
        request = b"%sContent-Length: %d\r\n\r\n%s" % (target.head, len(body), body)
        while True:
            kept = self._kept(target)
            connection = kept or await self._connect(target, self._connect_s if connect_s is None else connect_s)
            connection.ask(request, silence_s)
            try:
                await connection.answer()
                return connection
            except BaseException as error:
                connection.close()
                if kept and isinstance(error, BrokenOff) and not connection.heard:
                    continue  # it had been closed before it took this request: on another one
                raise

    def close(self) -> None:
        """Close every connection; answers under way break off."""
        for connection in list(self._all):
            connection.close()
        self._idle.clear()

    def _kept(self, target: Target) -> Connection | None:
        idle = self._idle.get(target)
        now = time.monotonic()
        while idle:
            connection, until = idle.pop()
            if until > now and connection.usable:
                return connection
            connection.close()
        return None

    def _free(self, connection: Connection) -> None:
        """A connection whose answer is over."""
        idle = self._idle.setdefault(connection.target, [])
        now = time.monotonic()
        while idle and idle[0][1] <= now:
            idle.pop(0)[0].close()
        idle.append((connection, now + self._idle_s))

    async def _connect(self, target: Target, seconds: float) -> Connection:
        secure, host, port = target.origin
        patience = Patience(seconds, partial(NoConnection, "no connection in time"))
        try:
            with patience:
                return await self._open(target, secure, host, port)
        finally:
            patience.end()

    async def _open(self, target: Target, secure: bool, host: str, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        made: Callable[[], Connection] = lambda: Connection(target, self._free, self._all)  # noqa: E731
        if secure and self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        if not target.proxy:
            tls = self._tls if secure else None
            return (await loop.create_connection(made, host, port, ssl=tls, server_hostname=host if secure else None))[1]
        proxy, proxy_port, _ = target.proxy
        if not secure:
            return (await loop.create_connection(made, proxy, proxy_port))[1]
        transport, tunnel = await loop.create_connection(_Tunnel, proxy, proxy_port)
        try:
            transport.write(target.tunnel)
            status = await tunnel.status
            if status != b"200":
                raise NoConnection(f"the proxy {proxy}:{proxy_port} answered {status[:40].decode(errors='replace') or 'nothing'}")
            connection = made()
            transport.set_protocol(connection)
            assert self._tls is not None
            secured = await loop.start_tls(transport, connection, self._tls, server_hostname=host)
            assert secured is not None
        except BaseException:
            transport.abort()
            raise
        connection.connection_made(secured)
        return connection


class _Tunnel(asyncio.Protocol):
    """Waits for what a proxy says to CONNECT: `status`, b'' when it says nothing."""

    def __init__(self) -> None:
        self.status: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._said = b""

    def data_received(self, data: bytes) -> None:
        self._said += data
        if b"\r\n\r\n" in self._said or len(self._said) > HEAD_LIMIT:
            self._tell(([*self._said.split(b"\r\n", 1)[0].split(b" ", 2), b"", b""])[1])

    def connection_lost(self, error: Exception | None) -> None:
        self._tell(b"")

    def _tell(self, status: bytes) -> None:
        if not self.status.done():
            self.status.set_result(status)


class Connection(asyncio.Protocol):
    """One connection (since `opened`) and the answer that comes over it: `status`, `headers` (in small letters), `read` to its end."""

    def __init__(self, target: Target, free: Callable[[Connection], None], known: set[Connection]) -> None:
        self.target, self._free, self._known = target, free, known
        self.opened = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lost: Exception | None = None
        self._idle = True
        """no answer is expected"""
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.heard = self.over = False
        """whether the other side has said anything to this request; whether its answer is there whole"""
        self._head = False
        """the head is there"""
        self._body: list[bytes] = []
        self._size = self._head_size = 0
        self._linger = self._paused = self._again = False

    # ---- for whoever reads

    @property
    def usable(self) -> bool:
        """Whether a request can be sent over it."""
        return self._idle and self._lost is None and self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes, silence_s: float) -> None:
        """Send a request."""
        self._reset()
        self._idle = False
        self._silence_s = silence_s
        assert self._transport is not None
        self._transport.write(request)
        self._heard_at = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(silence_s, self._ring)

    async def answer(self) -> None:
        """Wait for the head."""
        while not self._head:
            if self._lost:
                raise self._lost
            await self._wait()
        if self.headers.get("content-encoding", "identity") not in ("", "identity"):
            raise BrokenOff(f"its answer is compressed ({self.headers['content-encoding'][:40]}), which nobody asked for")

    async def read(self) -> bytes:
        """What has come since the last time, b'' at the end. Raises BrokenOff, asyncio.TimeoutError."""
        while not self._body:
            if self.over:
                return b""
            if self._lost:
                raise self._lost
            await self._wait()
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._size = 0
        if self._paused and self._transport:
            self._paused = False
            self._transport.resume_reading()
        return data

    def leave(self, linger_s: float = 0) -> None:
        """Done with the answer. If it is over (or is so within `linger_s`) its connection can be used again, else it is closed."""
        if self.over:
            self._release()
        elif linger_s and self._lost is None and not self._paused:
            self._linger = True
            self._body.clear()
            self._silence_s = linger_s
            self._cancel()
            self._timer = self._loop.call_later(linger_s, self.close)
        else:
            self.close()

    def close(self) -> None:
        """Close at once."""
        self._cancel()
        self._known.discard(self)
        if self._transport is not None:
            self._transport.abort()

    # ---- for the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._known.add(self)
        liveness.watch(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        if self._idle:  # nobody has asked for anything
            self.close()
            return
        self.heard = True
        self._heard_at = self._loop.time()
        if not self._head:
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("it wants to speak another protocol")
        except httptools.HttpParserError as error:
            self._fail(f"what it sent is not HTTP ({error})")
        if not self._head and self._head_size > HEAD_LIMIT:
            self._fail("its headers do not end")
        if self._size > AHEAD and not self._paused and self._transport and not self.over:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._head and not self.over and not self._linger and error is None and not self.headers.keys() & _FRAMED:
            self.over = True  # such an answer ends where its connection does
        self._idle = False
        if self._lost is None:
            self._lost = (NoConnection if liveness.gone(error) else BrokenOff)(str(error) if error else "")
        self.close()
        self._wake()

    # ---- for the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head:  # what comes behind a body says nothing that anybody here wants to know
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._head:  # of a second answer, which on_message_complete refuses
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:  # "continue" and the like come before an answer
            self.headers.clear()
        else:
            self._head = True

    def on_body(self, body: bytes) -> None:
        if not self._linger and not self.over:
            self._body.append(body)
            self._size += len(body)

    def on_message_complete(self) -> None:
        if not self._head:
            return
        if self.over:
            self._fail("it answered twice")
            return
        self.over = True
        self._again = self._parser.should_keep_alive()
        if self._linger:
            self._release()

    # ---- inside

    def _release(self) -> None:
        alive = self._lost is None and self._again and not self._body
        if self._linger:
            self._cancel()
        if alive and self._transport is not None and not self._transport.is_closing():
            self._idle, self._linger = True, False
            if self._paused:
                self._paused = False
                self._transport.resume_reading()
            self._free(self)
        else:
            self.close()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        self._heard_at = self._loop.time()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self._body or self.over or self._lost or self._head):
            waiter.set_result(None)

    def _fail(self, words: str) -> None:
        self._lost = BrokenOff(words)
        self.close()

    def _ring(self) -> None:
        """The timer, one for the whole answer: nothing was heard for as long as that while somebody waited."""
        self._timer = None
        left = self._heard_at + self._silence_s - self._loop.time()
        waiter = self._waiter
        if waiter is None or left > 0.001:
            self._timer = self._loop.call_later(left if waiter is not None else self._silence_s, self._ring)
        elif not waiter.done():
            waiter.set_exception(asyncio.TimeoutError())

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_FRAMED = frozenset({"content-length", "transfer-encoding"})
"""headers that say where an answer ends"""
