"""Who adds and takes away pods: KEDA by requests and memory, or Kubernetes' own autoscaler by memory and processor. Pure.

KEDA looks at three things: requests that wait inside the servers, requests that the gateways have in hand for the workers' nodes (what
wakes a worker at zero, where no server is there to ask), and memory. Metrics are those that serve/metrics.py and the servers really have.
"""

from __future__ import annotations

from typing import Any

from lmgraph.kubernetes import gateway, pods
from lmgraph.kubernetes.decided import Deployment, Plan
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.values import Replicas, Values

HASTE = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]}
KSERVE = "-predictor"
"""what KServe calls the Deployment of an InferenceService"""


def of_gateway(plan: Plan) -> list[Object]:
    """The autoscaler of the gateways: memory, processor, answers in the making."""
    values, given, name = plan.values, plan.values.gateway, gateway.name(plan.values)
    if given.replicas.min == given.replicas.max or values.scaling.kind == "none":
        return []
    if values.scaling.kind == "keda":
        busy = f"sum(lmgraph_active{{{where(values, name)}}})"
        return [_scaled(values, name, "gateway", name, given.replicas, [_asked(values, "answers", busy, given.active)])]
    metrics = []
    if values.monitoring.kind != "none" and values.scaling.custom_metrics:
        target = {"type": "AverageValue", "averageValue": str(given.active)}
        metrics.append({"type": "Pods", "pods": {"metric": {"name": "lmgraph_active"}, "target": target}})
    return [_horizontal(values, name, "gateway", given.replicas, metrics)]


def of_worker(values: Values, worker: Deployment) -> list[Object]:
    """The autoscaler of a worker's pods; Knative has its own."""
    spec = worker.spec
    if spec.replicas.min == spec.replicas.max or values.scaling.kind == "none" or spec.serving == "knative":
        return []
    target = worker.name + (KSERVE if spec.serving == "kserve" else "")
    if values.scaling.kind == "hpa":
        return [_horizontal(values, worker.name, "worker", spec.replicas, [], target)]
    waiting = f"sum({worker.engine.waiting}{{{where(values, worker.name)}}})"
    nodes = "|".join(worker.nodes)
    held = f'sum(lmgraph_node_active{{{where(values, gateway.name(values))},node=~"{nodes}"}})'
    triggers = [_asked(values, "waiting", waiting, max(spec.slots // 4, 1))]
    triggers += [_asked(values, "held", held, spec.slots)] if nodes else []
    return [_scaled(values, worker.name, "worker", target, spec.replicas, triggers)]


def where(values: Values, name: str) -> str:
    """The labels by which Prometheus knows the series of one of our deployments; monitoring.py sees to `job`."""
    return f'namespace="{values.namespace}",job="{name}"'


def _asked(values: Values, name: str, query: str, target: int) -> Object:
    """A KEDA trigger: so many of what the query counts for each pod. Anything above zero wakes what sleeps."""
    about = {"serverAddress": values.scaling.prometheus, "query": query, "threshold": str(target), "activationThreshold": "0"}
    return {"type": "prometheus", "name": name, "metricType": "AverageValue", "metadata": about}


def _scaled(values: Values, name: str, component: str, target: str, replicas: Replicas, triggers: list[Object]) -> Object:
    used = [
        {"type": kind, "metricType": "Utilization", "metadata": {"value": str(percent)}}
        for kind, percent in _resources(values, component)
        if percent
    ]
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": target},
        "pollingInterval": values.scaling.poll_s,
        "cooldownPeriod": values.scaling.cooldown_s,
        "minReplicaCount": replicas.min,
        "maxReplicaCount": replicas.max,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behaviour(values)}},
        "triggers": [*triggers, *used],
    }
    return pods.thing("keda.sh/v1alpha1", "ScaledObject", values, name, component, spec=spec)


def _horizontal(values: Values, name: str, component: str, replicas: Replicas, metrics: list[Any], target: str = "") -> Object:
    used = [
        {"type": "Resource", "resource": {"name": kind, "target": {"type": "Utilization", "averageUtilization": percent}}}
        for kind, percent in (("memory", values.scaling.memory), ("cpu", values.scaling.cpu))
        if percent
    ]
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": target or name},
        "minReplicas": replicas.min,
        "maxReplicas": replicas.max,
        "metrics": [*used, *metrics],
        "behavior": _behaviour(values),
    }
    return pods.thing("autoscaling/v2", "HorizontalPodAutoscaler", values, name, component, spec=spec)


def _resources(values: Values, component: str) -> list[tuple[str, int]]:
    """(resource, percent) that KEDA looks at: a worker on a full processor is doing its work, and its requests say when it has too much."""
    memory = ("memory", values.scaling.memory)
    return [memory, ("cpu", values.scaling.cpu)] if component == "gateway" else [memory]


def _behaviour(values: Values) -> Object:
    """Up at once, down slowly: a pod that goes takes warm caches with it."""
    slowly = {
        "stabilizationWindowSeconds": values.scaling.cooldown_s,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
    }
    return {"scaleUp": HASTE, "scaleDown": slowly}
