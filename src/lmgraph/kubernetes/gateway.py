"""The pods that clients talk to: Deployment, Service, budget, ServiceAccount, and the ConfigMap of the graph. Pure.

A gateway keeps nothing: what it knows of conversations, cache, limits and keys is in Redis. The ConfigMap is named by its content, so a
changed graph is a rolling update, and an old pod never sees a new graph.
"""

from __future__ import annotations

from lmgraph.kubernetes import memory, pods
from lmgraph.kubernetes.decided import Plan
from lmgraph.kubernetes.engines import LINGER_S
from lmgraph.kubernetes.names import digest
from lmgraph.kubernetes.pods import USER, Object
from lmgraph.kubernetes.values import Values

PORT = 8000
CONFIG, CACHE, BAKED = "/etc/lmgraph", "/cache", "/opt/lmgraph/cache"
GRAPH = f"{CONFIG}/graph.yaml"
ANSWERS_S = 30
"""seconds that `lmgraph serve` lets running answers go on after SIGTERM"""


def name(values: Values) -> str:
    """Of the gateway's objects."""
    return f"{values.name}-gateway"


def config(plan: Plan) -> Object:
    """The ConfigMap of the graph."""
    called = f"{plan.values.name}-graph-{digest(plan.graph)}"
    found = pods.thing("v1", "ConfigMap", plan.values, called, "gateway", immutable=True, data={"graph.yaml": plan.graph})
    found["metadata"]["labels"]["app.kubernetes.io/name"] = name(plan.values)
    return found


def account(values: Values) -> Object:
    """The ServiceAccount of all pods, which may do nothing in the cluster."""
    return pods.thing("v1", "ServiceAccount", values, values.name, "account", automountServiceAccountToken=False)


def objects(plan: Plan) -> list[Object]:
    """Deployment, Service, PodDisruptionBudget."""
    values = plan.values
    return [deployment(plan), pods.service(values, name(values), "gateway", 80), pods.disruption(values, name(values), "gateway")]


def deployment(plan: Plan) -> Object:
    """The Deployment. How many pods it has is the autoscaler's, where there is one."""
    values, given = plan.values, plan.values.gateway
    baked = given.weights == "baked"
    env = [
        {"name": "LMGRAPH_CACHE", "value": BAKED if baked else CACHE},
        *memory.variables(values),
        pods.cores("LMGRAPH_THREADS"),
        {"name": "HOME", "value": "/tmp"},
        *(pods.secret(variable, reference) for variable, reference in plan.keys.items()),
        *pods.plain(given.env),
    ]
    volumes: list[Object] = [{"name": "graph", "configMap": {"name": config(plan)["metadata"]["name"]}}]
    mounts: list[Object] = [{"name": "graph", "mountPath": CONFIG, "readOnly": True}]
    if not baked:
        volumes.append({"name": "cache", "emptyDir": {"sizeLimit": given.cache_size}})
        mounts.append({"name": "cache", "mountPath": CACHE})
    if plan.files:
        volume, mount = pods.files(values)
        volumes.append(volume)
        mounts.append(mount)
    first = []
    if plan.fetches:
        pull = [variable for variable in env if variable["name"] in ("LMGRAPH_CACHE", "HOME", *given.env)]
        first = [pods.container("pull", values.images.gateway, given.resources, args=["pull", "--graph", GRAPH], env=pull, mounts=mounts)]
    arguments = ["serve", GRAPH, "--host", "0.0.0.0", "--port", str(PORT), "--max-active", str(given.max_active), "--log", "json"]
    main = pods.container(
        "gateway",
        values.images.gateway,
        given.resources,
        args=[*arguments, *(["--open"] if given.open else [])],
        env=env,
        mounts=mounts,
        ports=[{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        startupProbe=pods.probe("/readyz", every_s=5, failures=60),
        readinessProbe=pods.probe("/readyz", every_s=5, failures=2),
        livenessProbe=pods.probe("/healthz", every_s=10, failures=6),
        lifecycle={"preStop": {"sleep": {"seconds": LINGER_S}}},
    )
    spec = pods.pod(
        values,
        name(values),
        USER,
        [main],
        first=first,
        volumes=volumes,
        grace_s=LINGER_S + ANSWERS_S + 10,
        node_selector=given.node_selector,
        tolerations=given.tolerations,
    )
    fixed = {"replicas": given.replicas.min} if values.scaling.kind == "none" or given.replicas.min == given.replicas.max else {}
    body = {
        **fixed,
        "revisionHistoryLimit": 5,
        "selector": {"matchLabels": pods.selector(values, name(values))},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": pods.template(values, name(values), "gateway", spec),
    }
    return pods.thing("apps/v1", "Deployment", values, name(values), "gateway", spec=body)
