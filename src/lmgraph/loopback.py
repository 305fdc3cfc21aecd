"""llama.cpp's own loopback door, for what the binding does not expose (tokenising, templating); guarded by a random key.

It knows HTTP and JSON, and nothing of models.
"""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

from lmgraph.errors import EngineError


class Loopback:
    """One server's door; a connection for each thread. `post` raises EngineError when it does not answer, or refuses."""

    def __init__(self, address: str, key: str) -> None:
        parts = urlsplit(address)
        self._host, self._port, self._key = parts.hostname or "127.0.0.1", parts.port, key
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a JSON body."""
        payload = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        for attempt in (1, 2):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = http.client.HTTPConnection(self._host, self._port or 80, timeout=60)
                self._open.append(connection)
            try:
                connection.request("POST", path, payload, headers)
                response = connection.getresponse()
                data = response.read()
                break
            except (http.client.HTTPException, OSError) as error:
                connection.close()
                self._local.connection = None
                if attempt == 2:
                    raise EngineError(f"llama.cpp does not answer on loopback ({path}): {error}") from error
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise EngineError(f"llama.cpp answered {response.status} to {path}: {data[:120]!r}") from error
        if response.status != 200:
            raise EngineError(f"llama.cpp answered {response.status} to {path}: {answer.get('error', {}).get('message', answer)}")
        return dict(answer)

    def close(self) -> None:
        """Close every connection."""
        for connection in self._open:
            connection.close()
