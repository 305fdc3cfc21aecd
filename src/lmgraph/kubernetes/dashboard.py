"""A dashboard for Grafana, as data: what comes in, how long it takes, where it goes, what waits, whether memory works. Pure.

It is a ConfigMap with the label that Grafana's sidecar looks for. Its data source is chosen in Grafana; its queries name our namespace.
"""

from __future__ import annotations

import json
from typing import Any

from lmgraph.kubernetes import gateway, pods
from lmgraph.kubernetes.decided import Plan
from lmgraph.kubernetes.names import digest
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.scaling import where

WIDTH, HEIGHT = 12, 8
"""of a panel, in Grafana's grid of 24 columns"""


def objects(plan: Plan) -> list[Object]:
    """The ConfigMap of the dashboard."""
    values = plan.values
    name = f"{values.name}-dashboard"
    text = json.dumps(dashboard(plan), indent=1) + "\n"
    found = pods.thing("v1", "ConfigMap", values, name, "gateway", data={f"{values.name}.json": text})
    found["metadata"]["labels"]["grafana_dashboard"] = "1"
    return [found]


def dashboard(plan: Plan) -> dict[str, Any]:
    """The dashboard in Grafana's JSON model (schema 39)."""
    values = plan.values
    gates = where(values, gateway.name(values))
    rows: list[tuple[str, str, list[tuple[str, str]]]] = [
        ("Requests by status", "reqps", [(f"sum by (status) (rate(lmgraph_requests_total{{{gates}}}[5m]))", "{{status}}")]),
        ("Answers by node", "reqps", [(f"sum by (node) (rate(lmgraph_answers_total{{{gates}}}[5m]))", "{{node}}")]),
        ("First piece", "s", _quantiles("lmgraph_first_piece_seconds", gates)),
        ("Whole answer", "s", _quantiles("lmgraph_answer_seconds", gates)),
        ("Decision of the master", "s", _quantiles("lmgraph_decision_seconds", gates)),
        ("Answers in the making by gateway", "short", [(f"lmgraph_active{{{gates}}}", "{{pod}}")]),
        ("Answers in the making by node", "short", [(f"sum by (node) (lmgraph_node_active{{{gates}}})", "{{node}}")]),
        ("Tokens by kind", "short", [(f"sum by (kind) (rate(lmgraph_tokens_total{{{gates}}}[5m]))", "{{kind}} per second")]),
        ("Cache", "reqps", [(f"sum by (result) (rate(lmgraph_cache_total{{{gates}}}[5m]))", "{{result}}")]),
        (
            "Store",
            "short",
            [(f"min(lmgraph_store_up{{{gates}}})", "up"), (f"sum(lmgraph_turns_dropped{{{gates}}})", "turns dropped")],
        ),
    ]
    for worker in plan.workers:
        here, engine = where(values, worker.name), worker.engine
        gauges = [(f"sum({engine.waiting}{{{here}}})", "waiting"), (f"sum({engine.running}{{{here}}})", "running")]
        rows.append((f"Requests at {worker.name}", "short", [*gauges, (f"count({engine.running}{{{here}}})", "pods")]))
    return {
        "uid": digest(f"{values.namespace}/{values.name}", 12),
        "title": f"lmgraph: {values.namespace}/{values.name}",
        "tags": ["lmgraph"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]},
        "panels": [_panel(i, *row) for i, row in enumerate(rows)],
    }


def _quantiles(metric: str, gates: str) -> list[tuple[str, str]]:
    return [
        (f"histogram_quantile({quantile}, sum by (le) (rate({metric}_bucket{{{gates}}}[5m])))", f"p{round(quantile * 100)}")
        for quantile in (0.5, 0.9, 0.99)
    ]


def _panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": legend}
            for i, (query, legend) in enumerate(queries)
        ],
    }
