"""The graph as the gateway lets it be edited: whole or in part, checked, atomic, with versions and a way back.

It knows the graph's text and its file and tells the runtime. Answers under way keep the graph that they began with. It knows no
HTTP and no keys. Without a file (the built-in graph) edits last as long as the process.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmgraph import graphedit, graphfile
from lmgraph.assets import atomic
from lmgraph.errors import AdapterError, GraphError, RequestError, VocabularyMismatch
from lmgraph.files import builtin_graph
from lmgraph.runtime import Runtime

KEPT = 100
"""versions that can be gone back to"""


class Editor:
    """One graph and its versions. `path`: the file that edits are written to, or None."""

    def __init__(self, runtime: Runtime, path: Path | None) -> None:
        self._runtime, self._path = runtime, path
        self._lock = asyncio.Lock()
        self._text = path.read_text(encoding="utf-8") if path else builtin_graph()
        self._before: list[str] = []
        self._look()

    def _look(self) -> None:
        self.graph = graphfile.to_dict(graphfile.loads(self._text))
        self.version = hashlib.sha256(repr(self.graph).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """What GET /v1/graph says."""
        saved = str(self._path.name) if self._path else None
        return {"object": "graph", "version": self.version, "file": saved, "undo": len(self._before), "graph": self.graph}

    async def put(self, graph: Any, expected: str | None) -> None:
        """Replace the graph whole. `expected`: the version that the caller has seen, if it says so.

        Raises GraphError, RequestError (412, 409), AssetError when the file cannot be written; then nothing has changed.
        """
        wanted = graphfile.to_dict(graphfile.of_dict(graph))
        await self._edit(lambda data: graphedit.merge(data, graphedit.difference(self.graph, wanted)), expected)

    async def patch(self, patch: Mapping[str, Any], expected: str | None) -> None:
        """Put a JSON merge patch (RFC 7396) into the graph. Raises as `put`."""
        await self._edit(lambda data: graphedit.merge(data, patch), expected)

    async def undo(self, expected: str | None) -> None:
        """Go back to the version before. Raises RequestError (409) when there is none, and as `put`."""
        async with self._lock:
            self._same(expected)
            if not self._before:
                raise RequestError("There is no version before this one.", code="nothing_to_undo", status=409)
            await self._take(self._before[-1])
            self._before.pop()

    async def _edit(self, change: Callable[[Any], None], expected: str | None) -> None:
        async with self._lock:
            self._same(expected)
            try:
                text = await asyncio.to_thread(graphedit.edited, self._text, change)
            except (KeyError, TypeError, AttributeError, ValueError) as error:  # a patch of a shape that no graph has
                raise GraphError(f"This patch does not fit a graph: {error!r:.200}", "See GET /v1/graph for its form.") from error
            before = self._text
            if text != before:
                await self._take(text)
                self._before = [*self._before, before][-KEPT:]

    async def _take(self, text: str) -> None:
        """Make a text the graph: first to the runtime, which may refuse, then to the file."""
        if self._path and self._path.read_text(encoding="utf-8") != self._text:
            raise RequestError(
                f"{self._path.name} was changed by somebody else since it was read.", "Start the server again.", code="conflict", status=409
            )
        old = graphfile.loads(self._text)
        try:
            await self._runtime.replace(graphfile.loads(text))
        except (VocabularyMismatch, AdapterError) as error:
            raise RequestError(error.message, error.hint, code=error.code, status=409) from error
        try:
            if self._path:
                with atomic(self._path) as part:
                    part.write_text(text, encoding="utf-8")
        except BaseException:
            await self._runtime.replace(old)
            raise
        self._text = text
        self._look()

    def _same(self, expected: str | None) -> None:
        if expected is not None and expected not in ("*", self.version):
            raise RequestError(
                f"The graph is at version {self.version}, not {expected[:40]!r}.", "Read it again.", code="version_conflict", status=412
            )
