"""Graph + values -> which deployments there are, who is asked where, and the graph as the gateways read it. Pure.

Nodes that share a base share one deployment. It knows models, adapters, files and secrets by name; it does not know how an object of
Kubernetes looks, and finds nothing on a disk: `Known` says what others have found.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from lmgraph.assets import CATALOGUE
from lmgraph.graph import Graph
from lmgraph.graphfile import dump, to_dict
from lmgraph.kubernetes.decided import MASTER, Adapter, Deployment, Known, Plan
from lmgraph.kubernetes.engines import ENGINES, EXTERNAL, LLAMACPP, MODELS, Engine
from lmgraph.kubernetes.names import collisions, label
from lmgraph.kubernetes.reading import Draft
from lmgraph.kubernetes.values import Cache, Reference, Resources, Worker

RESERVED = ("gateway", "redis", "graph", MASTER)
"""names of our own objects"""
KEPT = ("system", "timeout_s", "start_timeout_s", "retries", "max_tokens", "temperature", "price", "stream")
"""what a worker keeps of itself wherever it runs"""
MOST = 1_000_000
"""bytes of a ConfigMap (etcd takes 1 MiB with all around it)"""
CONTEXT = 1024
"""tokens of a decision: prompt, trace and request"""
HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


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
        spec = self.graph.master
        places = [(f"node {node.name!r}", url) for node in asked_elsewhere for url in node.worker.urls]
        outside = sorted({where for what, url in [*places, ("the master", spec.server)] if url for where in self.ends(what, url)})
        keys = self.keys([*(node.worker.key_env for node in asked_elsewhere), spec.key_env])
        data = self.data
        for worker in workers:
            for name in worker.nodes:
                data["nodes"][name]["worker"] = self.rewritten(data["nodes"][name]["worker"], worker, name)
        before = len(self.beside)
        master = self.graph.master.bundle
        place = master
        if master not in self.known.bundles:
            place = data["master"]["bundle"] = self.file(master, "master.bundle")
        for name, node in self.graph.nodes.items():
            if node.adapter and not self.graph.master.server:  # else that server has it
                data["nodes"][name]["adapter"] = self.file(node.adapter, f"nodes.{name}.adapter")
        if self.values.master.served:
            served = self.served(place)
            workers = (*workers, served)
            data["master"]["server"] = served.url.removesuffix("/v1")
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
        elsewhere = spec.server or self.values.master.served or master.endswith(".gguf")
        fetches = self.values.gateway.weights == "fetch" and not elsewhere
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
        pull = (asset, *(["--accept-licence"] if spec.accept_licence else [])) if asset else ()
        return Deployment(key, name, engine, spec, nodes, model, place, pull, adapters, url, len(self.beside) > before)

    def served(self, place: str) -> Deployment:
        """The servers of the master at this place: a bundle's name, or its path in a container."""
        given, name = self.values.master, f"{self.values.name}-{MASTER}"
        bundle = self.graph.master.bundle
        if self.graph.master.server:
            self.say((MASTER, "served"), f"the graph has a server for its master already: {self.graph.master.server}")
        weights, *walks = self.known.masters.get(bundle, ("",)) if not bundle.endswith(".gguf") else (place,)
        paths = [node.adapter for node in self.graph.nodes.values() if node.adapter]
        listed = [f"{MODELS}/masters/{walk}" for walk in walks] + [
            self.file(path, "an adapter") for path in paths if not self.graph.master.server
        ]
        made = [Adapter("", posixpath.basename(lora), lora) for lora in dict.fromkeys(listed)]
        if len({adapter.name for adapter in made}) < len(made):
            self.wrong(f"adapters of nodes are asked for by their file names, and some are the same: {', '.join(a.place for a in made)}")
        spec = Worker(
            engine=LLAMACPP.name,
            base=bundle,
            replicas=given.replicas,
            slots=given.slots,
            context=CONTEXT,
            gpus=given.gpus,
            gpu_resource=given.gpu_resource,
            resources=given.resources,
            cache=Cache(size=self.values.gateway.cache_size),
            startup_s=LLAMACPP.startup_s,
            serving="deployment",
            args=(*(("--gpu-layers", "999") if given.gpus else ()), *given.args),
            env=given.env,
            node_selector=given.node_selector,
            tolerations=given.tolerations,
        )
        pull = () if bundle.endswith(".gguf") else ("--bundle", place)
        where = weights if not pull else f"{MODELS}/masters/{weights}"
        url = f"http://{name}.{self.values.namespace}.svc:{LLAMACPP.port}/v1"
        files = place != bundle or any(lora.startswith(self.values.files.path) for lora in listed)
        return Deployment(MASTER, name, LLAMACPP, spec, (), bundle, where, pull, tuple(made), url, files)

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

    def ends(self, what: str, url: str) -> list[tuple[str, int]]:
        """(host, port) of a URL that somebody else serves; [] where it is none."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            self.wrong(f"{what} is asked at {url!r}, which is no URL")
            return []
        if "@" in parts.netloc:
            self.wrong(f"{what} has a password in its URL, which a ConfigMap would show; use key_env")
        if host in HERE:
            name = what.removeprefix("node ").strip("'")
            engine = f"Give it an engine, workers: {{NAME: {{engine: vllm, base: HUB_ID, nodes: [{name}]}}}}, or write"
            self.wrong(
                f"{what} is asked at {url}, which in a cluster is the gateway's own pod. {'Write' if what == 'the master' else engine} "
                "the server's address there"
            )
        return [(host, port)]

    def keys(self, variables: Iterable[str]) -> dict[str, Reference]:
        """The Secrets of the keys that servers elsewhere ask for, by the variables that the graph names ('': none)."""
        wanted = [variable for variable in dict.fromkeys(variables) if variable]
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
