"""What Prometheus is told: where to scrape, and when to wake somebody. Pure.

Metrics are those of serve/metrics.py and of the servers. `job` is the name of the Deployment everywhere: scaling, alerts and the dashboard
ask by it. `/metrics` of a gateway asks for an API key of lmgraph's, which a Secret holds.
"""

from __future__ import annotations

from typing import Any

from lmgraph.kubernetes import gateway, pods
from lmgraph.kubernetes.decided import Plan
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.scaling import where
from lmgraph.kubernetes.values import Values

JOB = "app.kubernetes.io/name"
VERSION = "monitoring.coreos.com/v1"


def monitors(plan: Plan) -> list[Object]:
    """A ServiceMonitor for the gateways and a PodMonitor for all workers (their Services hide which pod is which)."""
    values = plan.values
    name, every = gateway.name(values), f"{values.monitoring.interval_s}s"
    key = {"name": values.monitoring.key.secret, "key": values.monitoring.key.key}
    guarded = {} if values.gateway.open else {"authorization": {"type": "Bearer", "credentials": key}}
    spec: dict[str, Any] = {
        "jobLabel": JOB,
        "selector": {"matchLabels": pods.selector(values, name)},
        "endpoints": [{"port": "http", "path": "/metrics", "interval": every, **guarded}],
    }
    out = [_labelled(values, pods.thing(VERSION, "ServiceMonitor", values, name, "gateway", spec=spec))]
    if plan.workers:
        # Knative gives the port of a container a name of its own.
        ports = ["http"] + (["user-port"] if any(worker.spec.serving == "knative" for worker in plan.workers) else [])
        chosen = {"app.kubernetes.io/instance": values.name, "app.kubernetes.io/component": "worker"}
        spec = {
            "jobLabel": JOB,
            "selector": {"matchLabels": chosen},
            "podMetricsEndpoints": [{"port": port, "path": "/metrics", "interval": every} for port in ports],
        }
        out.append(_labelled(values, pods.thing(VERSION, "PodMonitor", values, f"{values.name}-workers", "worker", spec=spec)))
    return out


def alerts(plan: Plan) -> list[Object]:
    """The PrometheusRule: what clients notice, then what they will notice soon."""
    values = plan.values
    gates = where(values, gateway.name(values))
    failed = f'sum(rate(lmgraph_requests_total{{{gates},path=~"/v1/.*",status=~"5.."}}[5m]))'
    refused = f'sum(rate(lmgraph_requests_total{{{gates},status="429"}}[5m]))'
    everything = f'sum(rate(lmgraph_requests_total{{{gates},path=~"/v1/.*"}}[5m]))'
    slow = f"histogram_quantile(0.99, sum by (le) (rate(lmgraph_first_piece_seconds_bucket{{{gates}}}[10m])))"
    choosing = f"histogram_quantile(0.99, sum by (le) (rate(lmgraph_decision_seconds_bucket{{{gates}}}[10m])))"
    rules = [
        _alert(
            "GatewayAbsent",
            f"absent(lmgraph_active{{{gates}}})",
            "3m",
            "critical",
            "No gateway is scraped: all are down, or the key is wrong.",
        ),
        _alert(
            "Failing", f"{failed} / {everything} > 0.02", "5m", "critical", "More than 2 % of requests end in a 5xx: workers or the master."
        ),
        _alert(
            "StoreDown",
            f"min(lmgraph_store_up{{{gates}}}) == 0",
            "2m",
            "warning",
            "Redis is gone: answers go on without history and cache.",
        ),
        _alert(
            "TurnsDropped",
            f"sum(increase(lmgraph_turns_dropped{{{gates}}}[15m])) > 0",
            "0m",
            "warning",
            "Turns of conversations were not kept.",
        ),
        _alert("Refusing", f"{refused} > 0.1", "10m", "warning", "Requests get a 429: gateways are full, or keys ask too much."),
        _alert(
            "Full",
            f"max(lmgraph_active{{{gates}}}) > {0.9 * values.gateway.max_active:g}",
            "5m",
            "warning",
            "A gateway is near the most answers that it makes at a time.",
        ),
        _alert(
            "FirstPieceSlow", f"{slow} > 30", "10m", "warning", "The first piece of an answer takes more than 30 s for 1 % of requests."
        ),
        _alert(
            "DecisionSlow", f"{choosing} > 2", "10m", "warning", "The master takes more than 2 s for 1 % of decisions: gateways lack cores."
        ),
    ]
    for worker in plan.workers:
        waiting = f"sum({worker.engine.waiting}{{{where(values, worker.name)}}}) > {2 * worker.spec.slots * worker.spec.replicas.max}"
        words = f"Requests pile up at {worker.name}, more than all its pods can work on: raise replicas.max."
        rules.append(_alert("WorkerQueue", waiting, "5m", "warning", words, worker=worker.name))
        if not worker.nodes:
            continue
        nodes = "|".join(worker.nodes)
        held = f'sum(lmgraph_node_active{{{gates},node=~"{nodes}"}})'
        gone = f"{held} > 0 and on () (absent({worker.engine.running}{{{where(values, worker.name)}}}))"
        words = f"Requests wait for {worker.name} and no pod of it is scraped: it does not start."
        rules.append(_alert("WorkerAbsent", gone, f"{max(worker.spec.startup_s // 60, 5)}m", "critical", words, worker=worker.name))
    spec = {"groups": [{"name": values.name, "rules": rules}]}
    return [_labelled(values, pods.thing(VERSION, "PrometheusRule", values, values.name, "gateway", spec=spec))]


def _alert(name: str, expression: str, after: str, severity: str, words: str, **more: str) -> Object:
    labels = {"severity": severity, **more}
    return {"alert": f"Lmgraph{name}", "expr": expression, "for": after, "labels": labels, "annotations": {"summary": words}}


def _labelled(values: Values, found: Object) -> Object:
    found["metadata"]["labels"].update(values.monitoring.labels)
    return found
