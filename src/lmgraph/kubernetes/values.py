"""What an operator may say about a cluster (values.yaml): a tree of frozen dataclasses, each with its default. Pure.

The same tree with its comments is data/values.yaml, which `lmgraph kubernetes values` prints. It does not know how it is read (reading.py),
nor what becomes of it. Where a default is 0, -1 or empty and a comment says "the engine's", engines.py has the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmgraph import __version__
from lmgraph.kubernetes.engines import LLAMACPP, LORAX, VLLM

SCALERS = ("hpa", "keda", "none")
SERVINGS = ("deployment", "kserve", "knative")
EXPOSURES = ("none", "ingress", "route")
MONITORS = ("none", "operator")
STORES = ("trial", "url", "secret")
WEIGHTS = ("fetch", "baked")
ACCESS = ("", "ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod")
EVERYWHERE = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True)
class Reference:
    """A key of a Secret that exists in the namespace. Its value is never written anywhere."""

    secret: str = ""
    key: str = ""


@dataclass(frozen=True)
class Images:
    """Container images, each with a pinned tag or a digest."""

    gateway: str = f"lmgraph:{__version__}"
    llamacpp: str = LLAMACPP.image
    vllm: str = VLLM.image
    lorax: str = LORAX.image
    redis: str = "redis:7.2.7-alpine"
    master: str = LLAMACPP.image


@dataclass(frozen=True)
class Replicas:
    """Fewest and most pods."""

    min: int = 1
    max: int = 1


@dataclass(frozen=True)
class Resources:
    """What a container asks for and may use at most: quantities by resource (cpu, memory, ephemeral-storage)."""

    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cache:
    """Where fetched weights are kept. Without `claim` and `access` in a volume that goes with its pod."""

    size: str = "10Gi"
    claim: str = ""
    """a PersistentVolumeClaim that exists"""
    access: str = ""
    """access mode of a PersistentVolumeClaim that is rendered"""
    storage_class: str = ""


@dataclass(frozen=True)
class Gateway:
    """The pods that clients talk to. `active`: answers in the making per pod above which another pod is started."""

    replicas: Replicas = Replicas(2, 10)
    active: int = 64
    max_active: int = 1024
    open: bool = False
    weights: str = "fetch"
    cache_size: str = "2Gi"
    resources: Resources = Resources({"cpu": "1", "memory": "1Gi"}, {"cpu": "2", "memory": "2Gi"})
    env: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Master:
    """Servers of their own for the master's weights: one base, and a LoRA for each node that brings one. Else each gateway has them."""

    served: bool = False
    replicas: Replicas = Replicas(1, 4)
    slots: int = 8
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    resources: Resources = Resources({"cpu": "2", "memory": "1Gi"}, {"cpu": "4", "memory": "2Gi"})
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Files:
    """The folder of the graph as containers see it: models, bundles and adapters that the graph names by path."""

    claim: str = ""
    path: str = "/files"


@dataclass(frozen=True)
class Redis:
    """What the gateways share. trial: a small one of our own; url: one without a password; secret: a Secret holds its whole URL."""

    kind: str = "trial"
    url: str = ""
    secret: Reference = Reference("lmgraph-redis", "password")
    namespace: str = ""
    port: int = 6379
    size: str = "4Gi"
    storage_class: str = ""
    resources: Resources = Resources({"cpu": "100m", "memory": "256Mi"}, {"cpu": "1", "memory": "768Mi"})


@dataclass(frozen=True)
class Adapter:
    """A LoRA of a node: a hub id, a ./path beside the graph or a /path in the container; the base that it was trained on ('': not said)."""

    path: str = ""
    base: str = ""


@dataclass(frozen=True)
class Worker:
    """One deployment of workers: all `nodes` that share its base."""

    engine: str = ""
    base: str = ""
    nodes: tuple[str, ...] = ()
    adapters: Mapping[str, Adapter] = field(default_factory=dict, metadata={"of": Adapter, "short": "path"})
    max_lora_rank: int = 64
    replicas: Replicas = Replicas(1, 4)
    slots: int = 0
    context: int = 4096
    gpus: int = -1
    gpu_resource: str = "nvidia.com/gpu"
    resources: Resources = Resources()
    cache: Cache = Cache()
    hub_token: Reference = Reference()
    accept_licence: bool = False
    startup_s: int = 0
    start_timeout_s: int = 300
    drain_s: int = 120
    serving: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Scaling:
    """Who adds and takes away pods. `prometheus`: the URL that KEDA asks; `cpu`, `memory`: percent of what a pod requests, 0: not by it."""

    kind: str = "hpa"
    prometheus: str = ""
    custom_metrics: bool = True
    cpu: int = 80
    memory: int = 90
    poll_s: int = 15
    cooldown_s: int = 300


@dataclass(frozen=True)
class Parent:
    """The Gateway of the Gateway API that a route hangs on."""

    name: str = ""
    namespace: str = ""
    section: str = ""


@dataclass(frozen=True)
class Expose:
    """How clients outside the cluster get in. `controller`: the namespace in which the ingress controller's (or Gateway's) pods run."""

    kind: str = "none"
    host: str = ""
    controller: str = ""
    ingress_class: str = "nginx"
    tls_secret: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    gateway: Parent = Parent()
    paths: tuple[str, ...] = ("/v1",)
    timeout_s: int = 3600


@dataclass(frozen=True)
class Network:
    """Who may talk to whom. `clients`: namespaces that may ask the gateway; none: its own."""

    policies: bool = True
    clients: tuple[str, ...] = ()
    dns: str = "kube-system"
    fetch: tuple[str, ...] = EVERYWHERE
    external: tuple[str, ...] = EVERYWHERE
    serverless: tuple[str, ...] = ("knative-serving", "kourier-system")


@dataclass(frozen=True)
class Monitoring:
    """What Prometheus and Grafana are told. `key`: an API key of lmgraph's, which /metrics asks for."""

    kind: str = "none"
    namespace: str = "monitoring"
    key: Reference = Reference("lmgraph-metrics", "token")
    labels: Mapping[str, str] = field(default_factory=dict)
    interval_s: int = 15


@dataclass(frozen=True)
class Values:
    """All of it."""

    name: str = "lmgraph"
    namespace: str = "lmgraph"
    serving: str = "deployment"
    images: Images = Images()
    pull_secrets: tuple[str, ...] = ()
    gateway: Gateway = Gateway()
    master: Master = Master()
    files: Files = Files()
    redis: Redis = Redis()
    secrets: Mapping[str, Reference] = field(default_factory=dict, metadata={"of": Reference})
    workers: Mapping[str, Worker] = field(default_factory=dict, metadata={"of": Worker})
    scaling: Scaling = Scaling()
    expose: Expose = Expose()
    network: Network = Network()
    monitoring: Monitoring = Monitoring()
