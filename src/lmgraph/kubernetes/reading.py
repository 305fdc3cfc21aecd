"""values.yaml: text -> Values, with every problem named by its line. Pure.

It knows types, ranges and forms of values, and what they must be together. What they must be with a graph is plan.py's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from lmgraph.errors import DataError, GraphError
from lmgraph.graphfile import parse
from lmgraph.graphread import Reader
from lmgraph.kubernetes import values as form
from lmgraph.kubernetes.engines import ENGINES, EXTERNAL
from lmgraph.kubernetes.names import MOST, PART, is_label
from lmgraph.kubernetes.values import Cache, Images, Reference, Replicas, Resources, Values, Worker

T = TypeVar("T")
Path = tuple[str, ...]
HINT = "The valid form with all defaults: lmgraph kubernetes values"
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kKMGTPE]i?)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRETIVE = re.compile(r"(?i)(key|token|password|passwd|secret|credential)s?$")
"""names of variables whose values are secrets, mostly"""
IMAGE = re.compile(r"[^\s@]+(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class Draft:
    """Values as far as they could be read; `reader` has what is wrong with them, and takes what else is."""

    values: Values
    reader: Reader

    def fail(self) -> None:
        """Raises DataError that lists all problems, where there are any."""
        if problems := self.reader.problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise DataError(f"Nothing was rendered: {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{listed}", HINT)


def read(text: str, name: str = "values.yaml") -> Draft:
    """The values of a text; an empty one has all defaults. Raises DataError only where it is no YAML."""
    try:
        data, at = parse(text, name)
    except GraphError as error:
        raise DataError(error.message, HINT) from error
    reader = Reader(lambda path: f"{name} {at(path)}")
    found = _build(reader, Values, {} if data is None else data, ())
    _check(reader, found)
    _together(reader, found)
    return Draft(found, reader)


def _default(spec: Field[Any]) -> Any:
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


def _build(reader: Reader, kind: type[T], data: Any, path: Path, given: T | None = None) -> T:
    """One dataclass of the tree; what is left out is as in `given`, or its default. Problems go to the reader."""
    specs = {spec.name: spec for spec in fields(kind)}  # type: ignore[arg-type]
    usual = {name: getattr(given, name) if given is not None else _default(spec) for name, spec in specs.items()}
    known = {name: _types(value) for name, value in usual.items()}
    out: dict[str, Any] = {}
    for name, value in reader.take(data, path, known, ()).items():
        default, here = usual[name], (*path, name)
        if is_dataclass(default):
            out[name] = _build(reader, type(default), value, here, default)
        elif isinstance(default, Mapping):
            out[name] = {**default, **_mapping(reader, value, here, specs[name].metadata)}
        elif isinstance(default, tuple):
            out[name] = _list(reader, value, here, name)
        else:
            out[name] = value
    return kind(**{**usual, **out})


def _types(default: Any) -> tuple[type, ...]:
    if is_dataclass(default) or isinstance(default, Mapping):
        return (dict,)
    return (list,) if isinstance(default, tuple) else (type(default),)


def _mapping(reader: Reader, data: Mapping[Any, Any], path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        here = (*path, str(key))
        if not isinstance(key, str):
            reader.say(here, "found a name that is no text; put it in quotes")
        elif "of" in about:
            short = {about["short"]: value} if "short" in about and isinstance(value, str) else value
            out[key] = _build(reader, about["of"], short, here)
        elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
            reader.say(here, "expected text; put it in quotes")
        else:
            out[key] = str(value)
    return out


def _list(reader: Reader, data: list[Any], path: Path, name: str) -> tuple[Any, ...]:
    expected = dict if name == "tolerations" else str
    if not all(isinstance(item, expected) for item in data):
        reader.say(path, f"expected a list of {'mappings' if expected is dict else 'texts'}")
    return tuple(item for item in data if isinstance(item, expected))


def _check(reader: Reader, found: Values) -> None:
    """Everything that a single value must be besides its type."""
    for key, most in (("name", MOST), ("namespace", 63)):
        if not is_label(getattr(found, key), most):
            _no_label(reader, (key,), getattr(found, key), most)
    gateway, scaling, expose, monitoring = found.gateway, found.scaling, found.expose, found.monitoring
    words: tuple[tuple[Path, str, tuple[str, ...]], ...] = (
        (("serving",), found.serving, form.SERVINGS),
        (("gateway", "weights"), gateway.weights, form.WEIGHTS),
        (("redis", "kind"), found.redis.kind, form.STORES),
        (("scaling", "kind"), scaling.kind, form.SCALERS),
        (("expose", "kind"), expose.kind, form.EXPOSURES),
        (("monitoring", "kind"), monitoring.kind, form.MONITORS),
    )
    for path, value, choices in words:
        reader.one_of(value, choices, path)
    for path, number, low, high in (
        (("gateway", "active"), gateway.active, 1, 100_000),
        (("gateway", "max_active"), gateway.max_active, 1, 100_000),
        (("scaling", "cpu"), scaling.cpu, 0, 1000),
        (("scaling", "memory"), scaling.memory, 0, 1000),
        (("scaling", "poll_s"), scaling.poll_s, 1, 3600),
        (("scaling", "cooldown_s"), scaling.cooldown_s, 0, 3600),
        (("expose", "timeout_s"), expose.timeout_s, 1, 86_400),
        (("monitoring", "interval_s"), monitoring.interval_s, 1, 3600),
        (("redis", "port"), found.redis.port, 1, 65_535),
        (("master", "slots"), found.master.slots, 1, 10_000),
        (("master", "gpus"), found.master.gpus, 0, 64),
    ):
        _within(reader, path, number, low, high)
    for name in (spec.name for spec in fields(Images)):
        _image(reader, ("images", name), getattr(found.images, name))
    _replicas(reader, ("gateway", "replicas"), gateway.replicas, 1)
    _replicas(reader, ("master", "replicas"), found.master.replicas, 1)
    _resources(reader, ("gateway", "resources"), gateway.resources)
    _resources(reader, ("master", "resources"), found.master.resources)
    _resources(reader, ("redis", "resources"), found.redis.resources)
    for path, size in ((("gateway", "cache_size"), gateway.cache_size), (("redis", "size"), found.redis.size)):
        _quantity(reader, path, size)
    _environment(reader, ("gateway", "env"), gateway.env)
    _environment(reader, ("master", "env"), found.master.env)
    for section in ("fetch", "external"):
        for block in getattr(found.network, section):
            try:
                ipaddress.ip_network(block)
            except ValueError:
                reader.say(("network", section), f"found {block!r}, expected an address block such as 10.0.0.0/8")
    for variable, reference in found.secrets.items():
        _reference(reader, ("secrets", variable), reference)
    for name, worker in found.workers.items():
        _worker(reader, ("workers", name), name, worker)


def _worker(reader: Reader, path: Path, name: str, worker: Worker) -> None:
    if not is_label(name, PART):
        _no_label(reader, path, name, PART)
    for key in ("engine", "base"):
        if not getattr(worker, key) and not (key == "base" and worker.engine == EXTERNAL):
            reader.say(path, f"needs {key!r}")
    if worker.engine:
        reader.one_of(worker.engine, (*ENGINES, EXTERNAL), (*path, "engine"))
    if worker.serving:
        reader.one_of(worker.serving, form.SERVINGS, (*path, "serving"))
    for key, low, high in (
        ("slots", 0, 10_000),
        ("context", 16, 10_000_000),
        ("gpus", -1, 64),
        ("startup_s", 0, 86_400),
        ("start_timeout_s", 1, 3600),
        ("drain_s", 0, 3600),
        ("max_lora_rank", 1, 1024),
    ):
        _within(reader, (*path, key), getattr(worker, key), low, high)
    _replicas(reader, (*path, "replicas"), worker.replicas, 0)
    _resources(reader, (*path, "resources"), worker.resources)
    _cache(reader, (*path, "cache"), worker.cache)
    _environment(reader, (*path, "env"), worker.env)
    if worker.hub_token != Reference():
        _reference(reader, (*path, "hub_token"), worker.hub_token)
    for node, adapter in worker.adapters.items():
        if not adapter.path:
            reader.say((*path, "adapters", node), "needs its path: a hub id, or ./path beside the graph")


def _together(reader: Reader, found: Values) -> None:
    """What values must be beside each other."""
    scaling, expose, redis = found.scaling, found.expose, found.redis
    if scaling.kind == "keda":
        if not scaling.prometheus.startswith(("http://", "https://")):
            reader.say(("scaling", "prometheus"), f"found {scaling.prometheus!r}, expected the URL at which KEDA reaches Prometheus")
        if found.monitoring.kind == "none":
            reader.say(
                ("monitoring", "kind"), "KEDA scales by what Prometheus knows, and nothing tells Prometheus of us; set it to operator"
            )
    if found.master.served and found.master.gpus and found.images.master == Images().master:
        reader.say(
            ("images", "master"), "master.gpus needs a build of llama.cpp for GPUs, such as ghcr.io/ggml-org/llama.cpp:server-cuda-b11176"
        )
    if scaling.kind == "hpa" and not scaling.cpu and not scaling.memory:
        reader.say(("scaling",), "kind hpa scales by cpu or memory, and both are 0; for a fixed number of pods: kind none")
    if expose.kind != "none":
        needed = ["host", "controller"] + (["tls_secret"] if expose.kind == "ingress" else [])
        for key in needed:
            if not getattr(expose, key):
                reader.say(("expose", key), f"kind {expose.kind} needs it")
        if expose.kind == "route" and not expose.gateway.name:
            reader.say(("expose", "gateway", "name"), "kind route needs the name of its Gateway")
        for place in expose.paths:
            if not place.startswith("/"):
                reader.say(("expose", "paths"), f"found {place!r}, expected a path such as /v1")
    if redis.kind == "url":
        if not re.fullmatch(r"rediss?://[^\s/@]+(/\d+)?", redis.url):
            reader.say(
                ("redis", "url"), "expected redis://HOST:PORT/0 without a password; with one: kind secret, whose Secret holds the whole URL"
            )
    else:
        _reference(reader, ("redis", "secret"), redis.secret)
    if found.monitoring.kind == "operator" and not found.gateway.open:
        _reference(reader, ("monitoring", "key"), found.monitoring.key)
    for name, worker in found.workers.items():
        path, serving = ("workers", name), worker.serving or found.serving
        if worker.replicas.min == 0 and scaling.kind != "keda" and serving != "knative" and worker.engine != EXTERNAL:
            reader.say((*path, "replicas", "min"), f"0 needs scaling.kind keda or serving knative: with {scaling.kind} nothing wakes it")
        if worker.engine == "llamacpp" and worker.gpus > 0:
            reader.say((*path, "gpus"), f"found {worker.gpus}, and llamacpp is a server on CPU here; engines with GPUs: vllm, lorax")
        if worker.engine in ("vllm", "lorax") and worker.gpus == 0:
            reader.say((*path, "gpus"), f"found 0, and {worker.engine} needs at least one; on CPU: llamacpp")
        if worker.cache.access.startswith("ReadWriteOnce") and worker.replicas.max > 1:
            reader.say((*path, "cache", "access"), f"{worker.cache.access} is for one node, and there may be {worker.replicas.max} pods")


def _no_label(reader: Reader, path: Path, found: str, most: int) -> None:
    reader.say(
        path,
        f"{found!r} is no DNS label of at most {most} characters: small letters, digits and '-', a letter first, a letter or digit last",
    )


def _within(reader: Reader, path: Path, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        reader.say(path, f"found {number}, expected {low:,} to {high:,}")


def _replicas(reader: Reader, path: Path, found: Replicas, low: int) -> None:
    _within(reader, (*path, "min"), found.min, low, 1000)
    if found.max < max(found.min, 1):
        reader.say((*path, "max"), f"found {found.max}, expected at least {max(found.min, 1)} (min is {found.min})")


def _quantity(reader: Reader, path: Path, found: str) -> None:
    if not QUANTITY.fullmatch(found):
        reader.say(path, f"found {found!r}, expected a quantity such as 500m, 2 or 4Gi")


def _resources(reader: Reader, path: Path, found: Resources) -> None:
    for section in ("requests", "limits"):
        for resource, amount in getattr(found, section).items():
            _quantity(reader, (*path, section, resource), amount)
            if "/" in resource:
                reader.say((*path, section, resource), "devices are asked for with gpus and gpu_resource")


def _cache(reader: Reader, path: Path, found: Cache) -> None:
    _quantity(reader, (*path, "size"), found.size)
    reader.one_of(found.access, form.ACCESS, (*path, "access"))
    if found.claim and found.access:
        reader.say(path, f"has the claim {found.claim!r} and asks with access for a new one; leave one of them out")


def _image(reader: Reader, path: Path, found: str) -> None:
    if not IMAGE.fullmatch(found) or found.endswith(":latest"):
        reader.say(path, f"found {found!r}, expected an image with a pinned tag (not latest) or a digest")


def _environment(reader: Reader, path: Path, found: Mapping[str, str]) -> None:
    for name, value in found.items():
        if not VARIABLE.fullmatch(name):
            reader.say((*path, name), "is no name of an environment variable")
        elif SECRETIVE.search(name):
            reader.say(
                (*path, name), "looks like a secret, which is never written into a manifest; name its Secret under secrets or hub_token"
            )
        elif re.search(r"//[^/@]*:[^/@]*@", value):
            reader.say((*path, name), "is a URL with a password in it, which is never written into a manifest")


def _reference(reader: Reader, path: Path, found: Reference) -> None:
    if not found.secret or not found.key:
        reader.say(path, "needs the name of a Secret and a key in it: {secret: NAME, key: KEY}")
