"""What is decided before anything is written: the deployments, who is asked where, the graph as the gateways read it. Pure data.

plan.py decides it; everything that writes objects reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmgraph.kubernetes.engines import Engine
from lmgraph.kubernetes.values import Reference, Values, Worker

MASTER = "master"
"""key of the master's own servers, which answer for no node"""


@dataclass(frozen=True)
class Known:
    """What was found on this machine: bundles inside the package; the base of adapters that lie here, by path as values name them."""

    bundles: frozenset[str] = frozenset()
    bases: Mapping[str, str] = field(default_factory=dict)
    masters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """bundle -> names of what `lmgraph pull --bundle` makes of it: the merged weights, then the adapter for walks where it has one"""


@dataclass(frozen=True)
class Adapter:
    """A LoRA on a worker's base: the name that requests say, and where the server finds it."""

    node: str
    name: str
    place: str


@dataclass(frozen=True)
class Deployment:
    """One deployment of workers. `spec` has the engine's own values where the operator's say nothing."""

    key: str
    name: str
    """of its objects"""
    engine: Engine
    spec: Worker
    nodes: tuple[str, ...]
    model: str
    """what requests call the base"""
    place: str
    """where the server finds the base: a hub id, or a path in its container"""
    pull: tuple[str, ...]
    """what an init container fetches: arguments of `lmgraph pull`, () for nothing"""
    adapters: tuple[Adapter, ...]
    url: str
    files: bool
    """whether it needs the volume with the graph's files"""


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything is written."""

    values: Values
    workers: tuple[Deployment, ...]
    outside: tuple[tuple[str, int], ...]
    """(host, port) of servers that are not ours"""
    keys: Mapping[str, Reference]
    """environment variable of the gateway -> the Secret that has it"""
    graph: str
    """graph.yaml as the gateways read it"""
    files: bool
    """whether the gateway needs the volume with the graph's files"""
    fetches: bool
    """whether the gateway fetches weights"""
