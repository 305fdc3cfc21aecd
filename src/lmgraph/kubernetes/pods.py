"""What all our pods have in common: labels, hardening, volumes, probes, who they run as. Pure.

Every pod fits the Pod Security Standard "restricted", has a read-only root and no token of the cluster's. Nothing here knows what runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmgraph.kubernetes.values import Reference, Resources, Values

Object = dict[str, Any]
USER = 10001
"""of the gateway's image"""
TEMPORARY = {"name": "tmp", "mountPath": "/tmp"}
DOMAINS = ("topology.kubernetes.io/zone", "kubernetes.io/hostname")


def labels(values: Values, name: str, component: str) -> dict[str, str]:
    """The recommended labels of an object."""
    return {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/instance": values.name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "lmgraph",
        "app.kubernetes.io/managed-by": "lmgraph-kubernetes",
    }


def selector(values: Values, name: str) -> dict[str, str]:
    """The labels by which an object's pods are found: those that never change."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/instance": values.name}


def thing(version: str, kind: str, values: Values, name: str, component: str, **body: Any) -> Object:
    """An object: `body` are its sections besides apiVersion, kind and metadata. `annotations` go into its metadata."""
    notes = body.pop("annotations", None)
    meta = {"name": name, "namespace": values.namespace, "labels": labels(values, name, component)}
    return {"apiVersion": version, "kind": kind, "metadata": {**meta, **({"annotations": notes} if notes else {})}, **body}


def container(
    name: str,
    image: str,
    resources: Resources,
    *,
    args: Sequence[str] = (),
    command: Sequence[str] = (),
    env: Sequence[Object] = (),
    mounts: Sequence[Object] = (),
    gpus: Mapping[str, int] | None = None,
    **more: Any,
) -> Object:
    """A hardened container. `gpus`: devices by resource name; `more`: ports, probes, lifecycle."""
    devices = {resource: str(count) for resource, count in (gpus or {}).items() if count}
    limits = {**resources.limits, **devices}
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        **({"command": list(command)} if command else {}),
        **({"args": list(args)} if args else {}),
        **({"env": list(env)} if env else {}),
        **more,
        "resources": {"requests": {**resources.requests, **devices}, **({"limits": limits} if limits else {})},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        },
        "volumeMounts": [*mounts, TEMPORARY],
    }


def pod(
    values: Values,
    name: str,
    user: int,
    containers: Sequence[Object],
    *,
    first: Sequence[Object] = (),
    volumes: Sequence[Object] = (),
    grace_s: int = 30,
    node_selector: Mapping[str, str] | None = None,
    tolerations: Sequence[Mapping[str, Any]] = (),
    spread: bool = True,
) -> Object:
    """The spec of a pod. `first`: init containers; `grace_s`: seconds from being told to end to being killed."""
    spec: Object = {
        "serviceAccountName": values.name,
        "automountServiceAccountToken": False,
        # Service links would set LMGRAPH_PORT and the like, which lmgraph refuses, and PORT-like ones that servers may take for their own.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if values.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in values.pull_secrets]
    if node_selector:
        spec["nodeSelector"] = dict(node_selector)
    if tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in tolerations]
    if spread:
        chosen = {"labelSelector": {"matchLabels": selector(values, name)}}
        spec["topologySpreadConstraints"] = [
            {"maxSkew": 1, "topologyKey": domain, "whenUnsatisfiable": "ScheduleAnyway", **chosen} for domain in DOMAINS
        ]
    if first:
        spec["initContainers"] = list(first)
    spec["containers"] = list(containers)
    spec["volumes"] = [*volumes, {"name": "tmp", "emptyDir": {}}]
    return spec


def template(values: Values, name: str, component: str, spec: Object) -> Object:
    """A pod template."""
    return {"metadata": {"labels": labels(values, name, component)}, "spec": spec}


def probe(path: str, *, every_s: int, failures: int, timeout_s: int = 5) -> Object:
    """A probe over HTTP at the port called http."""
    get = {"path": path, "port": "http"}
    return {"httpGet": get, "periodSeconds": every_s, "timeoutSeconds": timeout_s, "failureThreshold": failures}


def plain(variables: Mapping[str, str]) -> list[Object]:
    """Environment variables with their values."""
    return [{"name": name, "value": value} for name, value in variables.items()]


def secret(variable: str, reference: Reference) -> Object:
    """An environment variable whose value a Secret has."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": reference.secret, "key": reference.key}}}


def cores(variable: str) -> Object:
    """An environment variable with the whole number of cores that the container may use; a process sees all of its machine's."""
    return {"name": variable, "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}


def service(values: Values, name: str, component: str, port: int) -> Object:
    """A Service inside the cluster; its targets are the ports called http."""
    spec = {
        "type": "ClusterIP",
        "selector": selector(values, name),
        "ports": [{"name": "http", "port": port, "targetPort": "http", "protocol": "TCP"}],
    }
    return thing("v1", "Service", values, name, component, spec=spec)


def disruption(values: Values, name: str, component: str) -> Object:
    """A PodDisruptionBudget: nodes are drained one of these pods at a time."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": selector(values, name)}}
    return thing("policy/v1", "PodDisruptionBudget", values, name, component, spec=spec)


def files(values: Values) -> tuple[Object, Object]:
    """(volume, mount) of the graph's folder, to be read only."""
    claim = {"claimName": values.files.claim, "readOnly": True}
    return {"name": "files", "persistentVolumeClaim": claim}, {"name": "files", "mountPath": values.files.path, "readOnly": True}
