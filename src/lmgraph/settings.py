"""Environment -> frozen Settings, read once, at a door. Every variable starts with LMGRAPH_; an unknown one is an error."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmgraph.errors import SettingsError

PROFILES = ("standard", "tiny")
VARIABLES = {
    "LMGRAPH_CACHE": "folder for weights and merged masters (default: the user's cache folder)",
    "LMGRAPH_GRAPH": "graph.yaml to use when --graph is not given (default: ./graph.yaml, else the built-in graph)",
    "LMGRAPH_PROFILE": "standard, or tiny: SmolLM2-135M in place of every built-in worker model",
    "LMGRAPH_STORE": "where the gateway keeps history, cache and keys (default: a SQLite file in the user's data folder)",
    "LMGRAPH_THREADS": "CPU threads for embedded models (default: the cores this process may use)",
}


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    cache: Path
    store: str = "sqlite://"
    """URL: sqlite:///file, sqlite:// (in memory), redis://host"""
    graph: Path | None = None
    profile: str = "standard"
    threads: int = 1


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings out of an environment. Raises SettingsError for a value that cannot be used or a misspelt name."""
    for name in environment:
        if name.startswith("LMGRAPH_") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, 1)
            raise SettingsError(
                f"Unknown environment variable {name}.", f"Did you mean {near[0]}?" if near else f"Valid: {', '.join(VARIABLES)}."
            )
    profile = environment.get("LMGRAPH_PROFILE") or "standard"
    if profile not in PROFILES:
        raise SettingsError(f"LMGRAPH_PROFILE is {profile!r}; valid: {', '.join(PROFILES)}.")
    threads = environment.get("LMGRAPH_THREADS", "")
    if threads and not (threads.isdecimal() and len(threads) < 9 and 1 <= int(threads) <= 1024):
        raise SettingsError(f"LMGRAPH_THREADS is {threads!r}, expected a whole number from 1 to 1024.")
    graph = environment.get("LMGRAPH_GRAPH")
    cache = environment.get("LMGRAPH_CACHE")
    try:
        return Settings(
            cache=Path(cache).expanduser() if cache else _user_cache(environment) / "lmgraph",
            store=environment.get("LMGRAPH_STORE") or f"sqlite:///{_user_data(environment) / 'lmgraph' / 'store.db'}",
            graph=Path(graph).expanduser() if graph else None,
            profile=profile,
            threads=int(threads) if threads else _cores(),
        )
    except RuntimeError as error:  # no home folder: a container's user without an entry, or ~somebody
        raise SettingsError(
            f"A home folder is needed and cannot be found: {error}", "Set LMGRAPH_CACHE, LMGRAPH_GRAPH and LMGRAPH_STORE to full paths."
        ) from error


def _user_cache(environment: Mapping[str, str]) -> Path:
    if sys.platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        return Path(local)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _user_data(environment: Mapping[str, str]) -> Path:
    if sys.platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        return Path(local)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
