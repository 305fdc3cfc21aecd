"""Graph + values -> which deployments there are, who is asked where, and the graph as the gateways read it. Pure.

Nodes that share a base share one deployment. It knows models, adapters, files and secrets by name; it does not know how an object of
Kubernetes looks, and finds nothing on a disk: `Known` says what others have found.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from lmgraph.assets import CATALOGUE
from lmgraph.graph import Graph, Node
from lmgraph.graphfile import dump, to_dict
from lmgraph.kubernetes.engines import ENGINES, EXTERNAL, MODELS, Engine
from lmgraph.kubernetes.names import collisions, label
from lmgraph.kubernetes.reading import Draft
from lmgraph.kubernetes.values import Reference, Resources, Values, Worker

RESERVED = ("gateway", "redis", "graph")
"""names of our own objects"""
KEPT = ("system", "timeout_s", "start_timeout_s", "retries", "max_tokens", "temperature", "price", "stream")
"""what a worker keeps of itself wherever it runs"""
MOST = 1_000_000
"""bytes of a ConfigMap (etcd takes 1 MiB with all around it)"""
HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True)
class Known:
    """What was found on this machine: bundles inside the package; the base of adapters that lie here, by path as values name them."""

    bundles: frozenset[str] = frozenset()
    bases: Mapping[str, str] = field(default_factory=dict)


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
    asset: str
    """name in our catalogue, where an init container fetches it; '' else"""
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


def make(graph: Graph, draft: Draft, known: Known | None = None) -> Plan:
    """The plan. Raises DataError with every problem of the values, and of the graph and the values together."""
    return _Planner(graph, draft, known or Known()).plan()


class _Planner:
    def __init__(self, graph: Graph, draft: Draft, known: Known) -> None:
        self.graph, self.draft, self.values, self.known = graph, draft, draft.values, known
        self.data = to_dict(graph)
        self.beside: list[str] = []
        """what containers need of the graph's folder"""

    def plan(self) -> Plan:
        owners = self.owners()
        rows = {key: row for key, row in owners.items() if row[0].engine != EXTERNAL}
        workers = tuple(made for key, (spec, nodes) in rows.items() if (made := self.deployment(key, spec, nodes)))
        asked_elsewhere = [
            node
            for name, node in self.graph.nodes.items()
            if node.worker.kind == "openai" and not any(name in nodes for _, nodes in rows.values())
        ]
        outside = sorted({where for node in asked_elsewhere for where in self.ends(node)})
        keys = self.keys(asked_elsewhere)
        data = self.data
        for worker in workers:
            for name in worker.nodes:
                data["nodes"][name]["worker"] = self.rewritten(data["nodes"][name]["worker"], worker, name)
        before = len(self.beside)
        master = self.graph.master.bundle
        if master not in self.known.bundles:
            data["master"]["bundle"] = self.file(master, "master.bundle")
        for name, node in self.graph.nodes.items():
            if node.adapter:
                data["nodes"][name]["adapter"] = self.file(node.adapter, f"nodes.{name}.adapter")
        text = dump(data)
        if len(text.encode()) > MOST:
            self.wrong(f"the graph has {len(text.encode()):,} bytes, and a ConfigMap holds at most {MOST:,}")
        if self.beside and not self.values.files.claim:
            self.say(
                ("files", "claim"),
                f"no container sees what lies beside the graph: {', '.join(dict.fromkeys(self.beside))}. Put the graph's folder on a "
                "PersistentVolumeClaim and name it here",
            )
        self.draft.fail()
        fetches = self.values.gateway.weights == "fetch" and not master.endswith(".gguf")
        return Plan(self.values, workers, tuple(outside), keys, text, len(self.beside) > before, fetches)

    def say(self, path: tuple[str, ...], text: str) -> None:
        self.draft.reader.say(path, text)

    def wrong(self, text: str) -> None:
        """Note a problem of the graph in a cluster."""
        self.draft.reader.problems.append(f"graph: {text}")

    # ------------------------------------------------------------ who answers for whom

    def owners(self) -> dict[str, tuple[Worker, tuple[str, ...]]]:
        """Key of a deployment -> (its values, its nodes): the operator's, then one for every model of embedded nodes that are left."""
        found: dict[str, tuple[Worker, tuple[str, ...]]] = {}
        taken: dict[str, str] = {}
        for key, worker in self.values.workers.items():
            if key in RESERVED:
                self.say(("workers", key), f"is a name of our own; any but {', '.join(RESERVED)} will do")
            nodes = self.members(key, worker)
            for name in nodes:
                if name in taken:
                    self.say(("workers", key), f"node {name!r} is in workers.{taken[name]} already")
                taken[name] = key
            found[key] = (worker, nodes)
        models: dict[str, list[str]] = {}
        for name, node in self.graph.nodes.items():
            if node.worker.kind == "embedded" and name not in taken:
                model = node.worker.model
                if model.startswith(("/", "~")):
                    self.wrong(f"node {name!r} has the model {model}, which does not lie in the graph's folder; put it there")
                    continue
                models.setdefault(model if model in CATALOGUE else f"./{posixpath.normpath(model)}", []).append(name)
        for shared, several in collisions(models):
            nodes_of = ", ".join(f"{model} (nodes {', '.join(models[model])})" for model in several)
            self.wrong(
                f"different models would all be called {shared!r}: {nodes_of}. Name them under workers: {{NAME: {{base: MODEL, ...}}}}"
            )
        for model, those in models.items():
            key = label(model)
            if key in self.values.workers or key in RESERVED:
                self.wrong(f"the model {model} (nodes {', '.join(those)}) would be called {key!r}, which is taken; name it under workers")
            else:
                found[key] = (Worker(engine="llamacpp", base=model), tuple(those))
        return found

    def members(self, key: str, worker: Worker) -> tuple[str, ...]:
        """The nodes of a worker that the operator describes."""
        nodes = self.graph.nodes
        naming = [name for name, node in nodes.items() if node.worker.model and _same(node.worker.model, worker.base)]
        chosen = tuple(dict.fromkeys([*(worker.nodes or naming), *worker.adapters]))
        for name in chosen:
            if name not in nodes:
                self.say(("workers", key), f"{name!r} is no node; valid: {', '.join(nodes)}")
            elif nodes[name].worker.kind == "scripted" or (nodes[name].worker.kind == "embedded" and worker.engine == EXTERNAL):
                self.say(("workers", key), f"node {name!r} is {nodes[name].worker.kind}, which no server answers for")
        if not chosen:
            models = ", ".join(sorted({node.worker.model for node in nodes.values() if node.worker.model}))
            self.say(("workers", key), f"no node names the model {worker.base!r}; list its nodes, or take one of: {models}")
        return tuple(name for name in chosen if name in nodes and nodes[name].worker.kind != "scripted")

    # ------------------------------------------------------------ one deployment

    def deployment(self, key: str, given: Worker, nodes: tuple[str, ...]) -> Deployment | None:
        engine = ENGINES.get(given.engine)
        if engine is None or not given.base:
            return None  # said already
        before = len(self.beside)
        spec = replace(
            given,
            gpus=engine.gpus if given.gpus < 0 else given.gpus,
            slots=given.slots or engine.slots,
            startup_s=given.startup_s or engine.startup_s,
            serving=given.serving or self.values.serving,
            resources=Resources({**engine.requests, **given.resources.requests}, {**engine.limits, **given.resources.limits}),
        )
        place, asset = self.base(key, engine, spec)
        adapters = tuple(self.adapters(key, engine, spec, nodes))
        name = f"{self.values.name}-{key}"
        port = "" if spec.serving == "knative" else f":{engine.port}"
        url = f"http://{name}.{self.values.namespace}.svc{port}/v1"
        model = spec.base.removeprefix("./") if engine.name == "llamacpp" else place
        return Deployment(key, name, engine, spec, nodes, model, place, asset, adapters, url, len(self.beside) > before)

    def base(self, key: str, engine: Engine, spec: Worker) -> tuple[str, str]:
        """(where the server finds its base, its name in the catalogue)."""
        path, base = ("workers", key, "base"), spec.base
        if engine.name != "llamacpp":
            if base in CATALOGUE or base.endswith(".gguf"):
                self.say(
                    path, f"found {base!r}, and {engine.name} takes a hub id or a ./folder beside the graph; GGUF files are for llamacpp"
                )
            return self.seen(base, f"workers.{key}.base"), ""
        if base in CATALOGUE:
            asset = CATALOGUE[base]
            if asset.terms and not spec.accept_licence:
                self.say(
                    ("workers", key),
                    f"{base} comes under the {asset.licence} ({asset.terms}); if you accept: workers: "
                    f"{{{key}: {{engine: llamacpp, base: {base}, accept_licence: true}}}}",
                )
            return f"{MODELS}/weights/{asset.file}", base
        if not base.endswith(".gguf"):
            self.say(path, f"found {base!r}, expected a GGUF file or one of: {', '.join(CATALOGUE)}")
            return base, ""
        return self.seen(base if base.startswith(("/", ".")) else f"./{base}", f"workers.{key}.base"), ""

    def adapters(self, key: str, engine: Engine, spec: Worker, nodes: Iterable[str]) -> Iterable[Adapter]:
        """The LoRAs of a worker, in the order of its nodes."""
        for node in nodes:
            worker = self.data["nodes"][node]["worker"]
            said, dialect = worker.get("adapter", ""), worker.get("dialect", "")
            if dialect and dialect != engine.name:
                self.wrong(f"node {node!r} speaks the dialect {dialect}, and workers.{key} is {engine.name}")
            if said and not _same(worker["model"], spec.base):
                self.wrong(f"the adapter of node {node!r} is one on {worker['model']}, and workers.{key} has the base {spec.base}")
            path = spec.adapters[node].path if node in spec.adapters else worker.get("adapter_path", "")
            path = path or (said if engine.name == "lorax" else "")
            if not path:
                if said:
                    self.say(("workers", key, "adapters"), f"node {node!r} wants the adapter {said!r}: say where it is, {{{node}: PATH}}")
                continue
            base = (spec.adapters[node].base if node in spec.adapters else "") or self.known.bases.get(path, "")
            if base and not _same(base, spec.base):
                self.say(("workers", key, "adapters", node), f"{path} is an adapter on {base}, and the base here is {spec.base}")
            if engine.name == "llamacpp" and not (path.startswith(("./", "../", "/")) and path.endswith(".gguf")):
                self.say(("workers", key, "adapters", node), f"found {path!r}, expected ./file.gguf beside the graph")
            place = self.seen(path, f"workers.{key}.adapters.{node}")
            yield Adapter(node, (said or node) if engine.name == "vllm" else place, place)  # the others go by where they lie

    def rewritten(self, old: Mapping[str, Any], worker: Deployment, node: str) -> dict[str, Any]:
        """A node's worker as it is asked in the cluster."""
        new = {"kind": "openai", "model": worker.model, "urls": [worker.url], **{key: old[key] for key in KEPT if key in old}}
        if old["kind"] == "embedded":
            new.setdefault("temperature", 0.0)  # what an embedded model does; a server would take a default of its own
        if worker.adapters or worker.engine.name == "lorax":  # else any server's OpenAI API will do
            new["dialect"] = worker.engine.name
        for adapter in worker.adapters:
            if adapter.node == node:
                new["adapter"] = adapter.name
                if worker.engine.name == "lorax" and adapter.place.startswith("/"):
                    new["adapter_source"] = "local"
        if worker.spec.replicas.min == 0:
            if worker.spec.serving == "knative":  # which holds a request until there is a pod
                new["timeout_s"] = new.get("timeout_s", 120.0) + worker.spec.start_timeout_s
            else:
                new.setdefault("start_timeout_s", worker.spec.start_timeout_s)
        return new

    # ------------------------------------------------------------ what is elsewhere

    def ends(self, node: Node) -> list[tuple[str, int]]:
        """(host, port) of each URL of a node that somebody else serves."""
        found = []
        for url in node.worker.urls:
            try:
                parts = urlsplit(url)
                host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            except ValueError:
                self.wrong(f"node {node.name!r} is asked at {url!r}, which is no URL")
                continue
            if "@" in parts.netloc:
                self.wrong(f"node {node.name!r} has a password in its URL, which a ConfigMap would show; use key_env")
            if host in HERE:
                self.wrong(
                    f"node {node.name!r} is asked at {url}, which in a cluster is the gateway's own pod. Give it an engine, workers: "
                    f"{{NAME: {{engine: vllm, base: HUB_ID, nodes: [{node.name}]}}}}, or write the server's address there"
                )
            found.append((host, port))
        return found

    def keys(self, nodes: Iterable[Node]) -> dict[str, Reference]:
        """The Secrets of the keys that these nodes' servers ask for."""
        wanted = dict.fromkeys(node.worker.key_env for node in nodes if node.worker.key_env)
        for variable in wanted:
            if variable not in self.values.secrets:
                self.say(("secrets",), f"the graph's {variable} has no Secret; name it: {variable}: {{secret: NAME, key: KEY}}")
        return {variable: self.values.secrets[variable] for variable in wanted if variable in self.values.secrets}

    def seen(self, path: str, what: str) -> str:
        """Where a container sees what values name: ./path beside the graph; a hub id, or a path from the container's root, as it is."""
        return self.file(path, what) if path.startswith(("./", "../")) else path

    def file(self, path: str, what: str) -> str:
        """Where containers see a file of the graph's folder."""
        plain = posixpath.normpath(path)
        if plain.startswith(("/", "..", "~")):
            self.wrong(f"{what} is {path}, which does not lie in the graph's folder; put it there and name it from there")
        self.beside.append(plain)
        return f"{self.values.files.path}/{plain}"


def _same(one: str, two: str) -> bool:
    """Whether two names of a model are the same, however a path begins."""
    return posixpath.normpath(one) == posixpath.normpath(two)
