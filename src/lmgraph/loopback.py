"""A llama.cpp server's door over HTTP: its own loopback one, for what the binding does not expose (tokenising, templating), guarded by a
random key; or that of a server elsewhere, which is asked for everything.

It knows HTTP, JSON and server-sent events, and nothing of models. It blocks: the engine calls it from its threads.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from lmgraph.errors import EngineError

CONNECT_S, SILENCE_S = 5, 60
"""longest wait for a connection, and for a server to say something"""


class Loopback:
    """One server's door; a connection for each thread. Everything raises EngineError when it does not answer."""

    def __init__(self, address: str, key: str) -> None:
        parts = urlsplit(address)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port
        self._beside = parts.path.rstrip("/").removesuffix("/v1")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []
        self.address = f"{self._host}:{self._port}" if self._port else self._host
        """without anything secret"""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a JSON body. Raises EngineError when it is refused."""
        return self._good(path, *self._ask("POST", path, body))

    def get(self, path: str) -> Any:
        """What lies at a path. Raises EngineError when it is refused."""
        return self._good(path, *self._ask("GET", path))

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a JSON body; a refusal as it is ({"error": ...})."""
        return self._read(path, *self._ask("POST", path, body))

    def pieces(self, path: str, body: dict[str, Any], take: Callable[[Any], bool]) -> Any:
        """Give every server-sent event of an answer to `take` until that says True, or it ends; a refusal is returned."""
        connection = self._connect()
        try:
            connection.request("POST", self._beside + path, json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                return self._read(path, response.status, response.read())
            for line in response:
                if line.startswith(b"data: [DONE]") or (line.startswith(b"data: ") and take(json.loads(line[6:]))):
                    return None
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise self._silent(path, error) from error
        finally:
            connection.close()
        raise EngineError(f"llama.cpp at {self.address} broke off its answer ({path}).")

    def close(self) -> None:
        """Close every connection."""
        for connection in self._open:
            connection.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        payload = None if body is None else json.dumps(body).encode()
        for attempt in (1, 2):  # a connection that was kept may be closed by now
            connection = getattr(self._local, "connection", None)
            try:
                if connection is None:
                    connection = self._local.connection = self._connect()
                    self._open.append(connection)
                connection.request(method, self._beside + path, payload, self._headers)
                response = connection.getresponse()
                return response.status, response.read()
            except (http.client.HTTPException, OSError) as error:
                if connection is not None:
                    connection.close()
                self._local.connection = None
                if connection is None or attempt == 2:
                    raise self._silent(path, error) from error
        raise AssertionError

    def _connect(self) -> http.client.HTTPConnection:
        connection = self._kind(self._host, self._port, timeout=CONNECT_S)
        connection.connect()
        connection.sock.settimeout(SILENCE_S)
        return connection

    def _silent(self, path: str, error: Exception) -> EngineError:
        return EngineError(f"llama.cpp at {self.address} does not answer ({path}): {error or type(error).__name__}")

    def _good(self, path: str, status: int, data: bytes) -> Any:
        answer = self._read(path, status, data)
        if status != 200:
            error = answer.get("error", answer) if isinstance(answer, dict) else answer
            said = error.get("message", error) if isinstance(error, dict) else error
            raise EngineError(f"llama.cpp at {self.address} answered {status} to {path}: {said}")
        return answer

    def _read(self, path: str, status: int, data: bytes) -> Any:
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise EngineError(f"llama.cpp at {self.address} answered {status} to {path}: {data[:120]!r}") from error
        if status != 200 and not (isinstance(answer, dict) and "error" in answer):
            return {"error": f"status {status}"}
        return answer


class Elsewhere:
    """A llama.cpp server that runs somewhere else, with what the binding has of a server in this process."""

    def __init__(self, url: str, key: str) -> None:
        self.api = Loopback(url, key)

    def look(self) -> tuple[Any, Any]:
        """(its properties, its adapters)"""
        return self.api.get("/props"), self.api.get("/lora-adapters")

    def handle_completions(self, body: dict[str, Any], take: Callable[[Any], bool] | None = None) -> Any:
        """The answer, or all its pieces to `take` and then None; what is refused comes as {"error": ...}."""
        return self.api.pieces("/v1/completions", body, take) if take else self.api.reply("/v1/completions", body)
