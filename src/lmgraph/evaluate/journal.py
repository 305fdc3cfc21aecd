"""What a long evaluation has found so far: one JSON line a finding, written when it is found, read when the evaluation goes on.

It knows a file, keys and what becomes of a line that was cut off. It does not know what a finding is: a frozen dataclass of plain
fields. Without a file it remembers and keeps nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from lmgraph.assets import ELSEWHERE
from lmgraph.errors import AssetError, DataError

Finding = TypeVar("Finding")
OF = "of"
"""name of the part of a line that is for people, and is not read again"""


def key_of(*parts: Any) -> str:
    """A name (32 hex digits of a sha256) for plain data: equal data, equal name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Journal(Generic[Finding]):
    """Findings by key. `open_journal` makes one."""

    def __init__(self, file: FileIO | None, found: dict[str, Finding]) -> None:
        self._file, self._found = file, found

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Finding | None:
        """What was found for a key, None where nothing was."""
        return self._found.get(key)

    def add(self, key: str, finding: Finding, about: Mapping[str, Any]) -> None:
        """Keep a finding; it is in the file when this returns. `about` is for people. Raises AssetError for a full disk."""
        self._found[key] = finding
        if self._file is not None:
            row = {"key": key, OF: dict(about), **asdict(finding)}  # type: ignore[call-overload]
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
            try:
                whole = line.encode(errors="replace")
                if self._file.write(whole) < len(whole):  # unbuffered: one write, so nobody sees half a line but on a full disk
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise AssetError(f"{self._file.name} cannot be written: {error.strerror or error}.", ELSEWHERE) from error


@contextmanager
def open_journal(path: Path | None, kind: type[Finding], *, fresh: bool = False) -> Iterator[Journal[Finding]]:
    """A journal of findings of one kind in a file, made where there is none; `fresh` forgets what is there.

    A last line that was cut off is dropped. Raises DataError for any other line that is no finding, AssetError for a place that
    cannot be written.
    """
    if path is None:
        yield Journal(None, {})
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() and not fresh else b""
        whole = data[: data.rfind(b"\n") + 1]
        found = {key: finding for key, finding in _read(whole, path, kind)}
        file = path.open("wb" if fresh else "ab", buffering=0)
        if len(whole) < len(data):
            os.truncate(path, len(whole))
    except OSError as error:
        raise AssetError(f"{path} cannot be written: {error.strerror or error}.", ELSEWHERE) from error
    with file:
        yield Journal(file, found)


def _read(data: bytes, path: Path, kind: type[Finding]) -> Iterator[tuple[str, Finding]]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
            key = row.pop("key")
            row.pop(OF, None)
            yield str(key), kind(**row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: found {line[:60].decode(errors='replace')!r}, expected a line that this command wrote.",
                "Forget what is there and begin again: --fresh. Or name another folder: --out FOLDER",
            ) from error
