"""Who may talk to whom, and how clients get in from outside: NetworkPolicies, Ingress, HTTPRoute. Pure.

First nothing is allowed, then what is needed: clients to gateways, gateways to workers, Redis and servers elsewhere, Prometheus to
/metrics, whoever fetches weights to port 443. A policy knows addresses and labels, no names of hosts: servers outside the cluster are
reached at the ports that the graph names, within `network.external`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from lmgraph.kubernetes import gateway, memory, pods
from lmgraph.kubernetes.decided import Deployment, Plan
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.values import Values

Place = tuple[str, int]
"""host and port"""
NAMESPACE = "kubernetes.io/metadata.name"
LARGEST = "5m"
"""body that an ingress lets pass: what `lmgraph serve` takes (4 MiB) and its head"""


def policies(plan: Plan) -> list[Object]:
    """The NetworkPolicies of all our pods."""
    values, network = plan.values, plan.values.network
    if not network.policies:
        return []
    everyone = {"app.kubernetes.io/instance": values.name, "app.kubernetes.io/part-of": "lmgraph"}
    out = [_policy(values, f"{values.name}-nothing", everyone, [], [])]
    gates = gateway.name(values)
    callers = [*(network.clients or (values.namespace,)), *([values.expose.controller] if values.expose.kind != "none" else [])]
    clients = [_rule("from", [_namespace(name) for name in dict.fromkeys(callers)], [gateway.PORT])]
    places = [*plan.outside, *_urls(values.gateway.env), *([memory.place(values)] if values.redis.kind != "trial" else [])]
    to = [*_dns(values), *_reach(values, places)]
    for worker in plan.workers:
        direct = worker.spec.serving != "knative"
        peers = [_pods(values, worker.name)] if direct else [_namespace(name) for name in network.serverless]
        to.append(_rule("to", peers, [worker.engine.port] if direct else [80, 8080, 8081]))
    if values.redis.kind == "trial":
        to.append(_rule("to", [_pods(values, memory.name(values))], [memory.PORT]))
    if plan.fetches:
        to.append(_rule("to", _blocks(network.fetch), [443]))
    watched = _watchers(values, gateway.PORT)
    out.append(_policy(values, gates, pods.selector(values, gates), [*clients, *watched], to))
    out += [_of_worker(values, worker) for worker in plan.workers]
    if values.redis.kind == "trial":
        name = memory.name(values)
        out.append(_policy(values, name, pods.selector(values, name), [_rule("from", [_pods(values, gates)], [memory.PORT])], []))
    return out


def _of_worker(values: Values, worker: Deployment) -> Object:
    port, fetches = worker.engine.port, bool(worker.pull) or not worker.place.startswith("/")
    fetches = fetches or any(not adapter.place.startswith("/") for adapter in worker.adapters)
    if worker.spec.serving == "knative":  # requests come through the pod's own proxy, and its autoscaler asks that for numbers
        callers = [_rule("from", [_namespace(name) for name in values.network.serverless], [8012, 8013, 8022, 9090, 9091])]
    else:
        callers = [_rule("from", [_pods(values, gateway.name(values))], [port])]
    mirrors = _urls({**(values.gateway.env if worker.pull else {}), **worker.spec.env})
    out = [*_dns(values), _rule("to", _blocks(values.network.fetch), [443]), *_reach(values, mirrors)] if fetches else []
    return _policy(values, worker.name, pods.selector(values, worker.name), [*callers, *_watchers(values, port)], out)


def _policy(values: Values, name: str, chosen: dict[str, str], come: Sequence[Object], go: Sequence[Object]) -> Object:
    spec = {
        "podSelector": {"matchLabels": chosen},
        "policyTypes": ["Ingress", "Egress"],
        **({"ingress": list(come)} if come else {}),
        **({"egress": list(go)} if go else {}),
    }
    return pods.thing("networking.k8s.io/v1", "NetworkPolicy", values, name, "network", spec=spec)


def _rule(way: str, peers: Sequence[Object], ports: Iterable[int], protocols: Sequence[str] = ("TCP",)) -> Object:
    return {way: list(peers), "ports": [{"protocol": protocol, "port": port} for port in ports for protocol in protocols]}


def _pods(values: Values, name: str) -> Object:
    return {"podSelector": {"matchLabels": pods.selector(values, name)}}


def _namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {NAMESPACE: name}}}


def _blocks(blocks: Iterable[str]) -> list[Object]:
    return [{"ipBlock": {"cidr": block}} for block in blocks]


def _dns(values: Values) -> list[Object]:
    return [_rule("to", [_namespace(values.network.dns)], [53], ("UDP", "TCP"))]


def _watchers(values: Values, port: int) -> list[Object]:
    if values.monitoring.kind == "none":
        return []
    return [_rule("from", [_namespace(values.monitoring.namespace)], [port])]


def _urls(variables: Mapping[str, str]) -> list[Place]:
    """The places that variables name: mirrors, proxies, a collector of traces."""
    found = [urlsplit(value) for value in variables.values() if value.startswith(("http://", "https://"))]
    return [(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)) for parts in found]


def _reach(values: Values, places: Iterable[Place]) -> list[Object]:
    """The way to places that are not ours: an address as it is, a Service by its namespace, any other name within `network.external`."""
    found: dict[str, tuple[list[Object], set[int]]] = {}
    for host, port in places:
        parts = host.split(".")
        try:
            address = ipaddress.ip_address(host)
            peers = _blocks([f"{address}/{address.max_prefixlen}"])
        except ValueError:
            if len(parts) == 1 and host:
                peers = [_namespace(values.namespace)]
            else:
                peers = [_namespace(parts[1])] if parts[2:3] == ["svc"] else _blocks(values.network.external)
        found.setdefault(str(peers), (peers, set()))[1].add(port)
    return [_rule("to", peers, sorted(ports)) for peers, ports in found.values()]


def exposure(values: Values) -> list[Object]:
    """Ingress or HTTPRoute; nothing where the gateway is for the cluster only. Answers may be long, and are passed on as they come."""
    expose, name = values.expose, gateway.name(values)
    if expose.kind == "none":
        return []
    if expose.kind == "route":
        parent = {
            "name": expose.gateway.name,
            **({"namespace": expose.gateway.namespace} if expose.gateway.namespace else {}),
            **({"sectionName": expose.gateway.section} if expose.gateway.section else {}),
        }
        rule = {
            "matches": [{"path": {"type": "PathPrefix", "value": path}} for path in expose.paths],
            "backendRefs": [{"name": name, "port": 80}],
            "timeouts": {"request": f"{expose.timeout_s}s", "backendRequest": f"{expose.timeout_s}s"},
        }
        spec: dict[str, Any] = {"parentRefs": [parent], "hostnames": [expose.host], "rules": [rule]}
        return [pods.thing("gateway.networking.k8s.io/v1", "HTTPRoute", values, name, "network", spec=spec)]
    backend = {"service": {"name": name, "port": {"name": "http"}}}
    spec = {
        "ingressClassName": expose.ingress_class,
        "tls": [{"hosts": [expose.host], "secretName": expose.tls_secret}],
        "rules": [
            {"host": expose.host, "http": {"paths": [{"path": path, "pathType": "Prefix", "backend": backend} for path in expose.paths]}}
        ],
    }
    notes = {**(_nginx(expose.timeout_s) if expose.ingress_class == "nginx" else {}), **expose.annotations}
    return [pods.thing("networking.k8s.io/v1", "Ingress", values, name, "network", annotations=notes, spec=spec)]


def _nginx(seconds: int) -> dict[str, str]:
    """What nginx needs to be told, or it gathers a stream and ends it after a minute of silence."""
    return {
        f"nginx.ingress.kubernetes.io/{key}": value
        for key, value in (
            ("proxy-buffering", "off"),
            ("proxy-read-timeout", str(seconds)),
            ("proxy-send-timeout", str(seconds)),
            ("proxy-body-size", LARGEST),
        )
    }
