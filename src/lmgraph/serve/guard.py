"""Who may ask, and how much: API keys, each key's rate and concurrency, and which pages in a browser may ask at all.

It knows keys and the store that keeps them. It does not know what is asked; `app` says which paths need what. A store that is
down lets in whoever was seen a moment ago, and nobody else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from lmgraph.errors import RequestError
from lmgraph.serve.http import Request
from lmgraph.store.base import ApiKey, Store, digest_of

SECRET = "lmg-"
"""how every secret of ours begins"""
REMEMBER_S = 5.0
"""how long a key that was found is not looked up again: a revoked one lets go after that many seconds"""
MANY = 10_000
HOLD_S = 60.0
"""how long a request that died with its gateway still counts among a key's concurrent ones"""
BURST_S = 10.0
"""a rate's bucket holds what comes in so many seconds"""


class Guard:
    """The door. `required`: a key must be shown; else it may be. `local`: only this machine's own people can come without one."""

    def __init__(self, store: Store, *, required: bool, local: bool) -> None:
        self.required, self.local = required, local and not required
        self._store = store
        self._known: dict[str, tuple[ApiKey, float]] = {}

    async def enter(self, request: Request) -> ApiKey | None:
        """The key that was shown. Raises RequestError (401, 403), StoreError when keys cannot be looked up."""
        self.refuse_strange_pages(request)
        scheme, _, secret = request.headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        if not secret.startswith(SECRET):
            if self.required:
                raise _unknown("No API key was shown.")
            return None  # clients must send something: `api_key="none"`
        digest = digest_of(secret)
        key, until = self._known.get(digest, (None, 0.0))
        if key is None or until < time.monotonic():
            key = await self._store.key(digest)
            if key is None:
                self._known.pop(digest, None)
                raise _unknown("This API key is not known, or it was revoked.")
            if len(self._known) >= MANY:
                self._known.clear()
            self._known[digest] = (key, time.monotonic() + REMEMBER_S)
        request.key = key.id
        return key

    def refuse_strange_pages(self, request: Request) -> None:
        """A page from elsewhere may not ask in the name of whoever sits before the browser, nor may a name that points here.

        Raises RequestError (403).
        """
        host = request.headers.get(b"host", b"").decode("latin-1")
        origin = request.headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            raise RequestError("Pages of other sites may not use this server.", code="forbidden", status=403)
        if self.local and not loopback(_name(host)):
            raise RequestError(
                f"The request is for the host {host[:100]!r}, and this server is only for its own machine.",
                "Ask for 127.0.0.1 or localhost, or let it require keys: --require-keys.",
                code="forbidden",
                status=403,
            )

    def sees_all(self, key: ApiKey | None) -> bool:
        """Whether everybody's history is theirs to read: administrators, and whoever sits at a machine that asks for no key."""
        return self.local if key is None else key.admin

    @staticmethod
    def admin(key: ApiKey | None) -> None:
        """Raises RequestError (401, 403) for whoever is not an administrator."""
        if key is None:
            raise _unknown("This needs an administrator's API key.", "Make one: lmgraph keys create NAME --admin")
        if not key.admin:
            raise RequestError(
                f"The key {key.name!r} is not an administrator's.", "lmgraph keys create NAME --admin", code="forbidden", status=403
            )

    async def spend(self, key: ApiKey | None) -> None:
        """Count one request. Raises RequestError (429) when the key's rate is used up."""
        if key is None or key.rate_per_minute is None:
            return
        burst = max(1, math.floor(key.rate_per_minute * BURST_S / 60))
        wait = await self._store.take(f"key:{key.id}", key.rate_per_minute, burst, time.time())
        if wait > 0:
            raise RequestError(
                f"The key {key.name!r} may ask {key.rate_per_minute:g} times a minute; try again in {wait:.1f} s.",
                code="rate_limit",
                status=429,
                retry_after_s=wait,
            )

    @asynccontextmanager
    async def place(self, key: ApiKey | None) -> AsyncIterator[None]:
        """Hold one of the key's places, shared by all gateways on a Redis. Raises RequestError (429) when all are taken."""
        if key is None or key.concurrent is None:
            yield
            return
        name, holder, limit = f"key:{key.id}", f"{random.getrandbits(128):032x}", key.concurrent

        async def hold() -> bool:
            now = time.time()
            return await self._store.hold(name, holder, limit, now + HOLD_S, now)

        async def stay() -> None:
            while True:
                await hold()
                await asyncio.sleep(HOLD_S / 2)

        if not await hold():
            raise RequestError(f"The key {key.name!r} may have {limit} requests at the same time.", code="rate_limit", status=429)
        staying: list[asyncio.Task[None]] = []
        timer = asyncio.get_running_loop().call_later(HOLD_S / 2, lambda: staying.append(asyncio.create_task(stay())))
        try:
            yield
        finally:
            timer.cancel()
            for task in staying:
                task.cancel()
            await self._store.let_go(name, holder)


def loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return (urlsplit(f"//{host}").hostname or "") if host.isprintable() and "[" not in host.strip("[") else ""


def _unknown(message: str, hint: str = "") -> RequestError:
    hint = hint or "Send it as a header, Authorization: Bearer lmg-...; make one: lmgraph keys create NAME"
    return RequestError(message, hint, code="invalid_api_key", status=401)
