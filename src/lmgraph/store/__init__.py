"""Where history, cache, keys and limits are kept. `open_store` opens one by its URL; `base` is the shape of all.

Nothing here knows what a gateway does with it; `shield.Shielded` keeps a gateway alive when its store dies.
"""

from __future__ import annotations

from lmgraph.errors import MissingExtra, SettingsError
from lmgraph.store.base import Store

FORMS = "sqlite:///relative.db, sqlite:////absolute.db, sqlite:// (in memory), redis://host:port/0, rediss://host:port/0"


def open_store(url: str) -> Store:
    """The store behind a URL. A SQLite file is opened (and made) at once; Redis is connected to when it is first asked.

    Raises SettingsError for a URL of no known form, MissingExtra where redis-py is not installed, StoreError for a bad file.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and (rest == "" or (rest.startswith("/") and rest != "/")):
        from lmgraph.store.sqlite import SqliteStore

        return SqliteStore.open(rest[1:] or ":memory:")
    if scheme in ("redis", "rediss") and rest:
        try:
            from lmgraph.store.redis import RedisStore
        except ImportError as error:
            raise MissingExtra("Redis as a store", "redis") from error
        return RedisStore(url)
    found = f"starts with {scheme[:20]!r}" if rest else "is not one"  # no more is shown: there may be a password in it
    raise SettingsError(f"What should be a store's URL {found} and has no form that lmgraph knows.", f"Valid: {FORMS}.")
