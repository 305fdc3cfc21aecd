"""The same worker pods run by something else than a Deployment: KServe's InferenceService, Knative's Service. Pure.

KServe runs them as plain Deployments here (its mode RawDeployment, called Standard since 0.16) and leaves scaling to us. Knative scales by
itself, to zero too, and holds requests until a pod is there; it takes only part of what a pod can say (its fieldmask.go), and some of that
only with FEATURES switched on.
"""

from __future__ import annotations

from typing import Any

from lmgraph.kubernetes import pods, workers
from lmgraph.kubernetes.decided import Deployment
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.values import Values

FEATURES = {
    "initContainers": "init-containers",
    "nodeSelector": "nodeselector",
    "persistentVolumeClaim": "persistent-volume-claim",
    "resourceFieldRef": "fieldref",
    "securityContext": "securitycontext",
    "tolerations": "tolerations",
}
"""field of a pod -> the feature (kubernetes.podspec-...) of Knative's ConfigMap config-features that must be enabled for it"""
LONGEST_S = 600
"""Knative's own limit of a request, unless its config-defaults say otherwise"""


def objects(values: Values, worker: Deployment) -> list[Object]:
    """Everything of one worker, however it is run."""
    if worker.spec.serving == "kserve":
        return inference(values, worker)
    return knative(values, worker) if worker.spec.serving == "knative" else workers.objects(values, worker)


def inference(values: Values, worker: Deployment) -> list[Object]:
    """The claim of its cache, InferenceService, and a Service of our own: KServe's may be without a port to speak of."""
    replicas = worker.spec.replicas
    spec = workers.pod(values, worker)
    spec["containers"][0]["name"] = "kserve-container"
    predictor = {
        "minReplicas": max(replicas.min, 1),
        "maxReplicas": replicas.max,
        "labels": pods.labels(values, worker.name, "worker"),
        **spec,
    }
    notes = {
        "serving.kserve.io/deploymentMode": "RawDeployment",
        "serving.kserve.io/autoscalerClass": "external",
        "lmgraph/nodes": ",".join(worker.nodes),
    }
    kind = "InferenceService"
    return [
        *workers.claims(values, worker),
        pods.thing("serving.kserve.io/v1beta1", kind, values, worker.name, "worker", annotations=notes, spec={"predictor": predictor}),
        pods.service(values, worker.name, "worker", worker.engine.port),
        *([pods.disruption(values, worker.name, "worker")] if replicas.max > 1 else []),
    ]


def features(values: Values, worker: Deployment) -> list[str]:
    """What must be enabled in Knative's ConfigMap config-features for a worker's pods; [] where Knative does not run them."""
    if worker.spec.serving != "knative":
        return []
    said = _fields(workers.pod(values, worker))
    written = {"persistent-volume-write"} if worker.spec.cache.claim or worker.spec.cache.access else set()
    return sorted(f"kubernetes.podspec-{feature}" for feature in {FEATURES[field] for field in said & FEATURES.keys()} | written)


def _fields(found: Any) -> set[str]:
    """The names of all fields below."""
    if isinstance(found, list):
        return set().union(*map(_fields, found))
    return set(found).union(*map(_fields, found.values())) if isinstance(found, dict) else set()


def knative(values: Values, worker: Deployment) -> list[Object]:
    """The claim of its cache and Knative's Service, which can be reached inside the cluster only."""
    replicas, spec = worker.spec.replicas, workers.pod(values, worker)
    for field in ("terminationGracePeriodSeconds", "automountServiceAccountToken", "topologySpreadConstraints"):
        del spec[field]  # not taken; the ServiceAccount itself has no token
    spec["securityContext"].pop("fsGroupChangePolicy")
    main = spec["containers"][0]
    del main["lifecycle"]  # Knative's own proxy empties a pod
    main["ports"] = [{"containerPort": worker.engine.port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        main[probe]["httpGet"]["port"] = worker.engine.port
    revision = {
        "autoscaling.knative.dev/min-scale": str(replicas.min),
        "autoscaling.knative.dev/max-scale": str(replicas.max),
        "autoscaling.knative.dev/metric": "concurrency",
        "autoscaling.knative.dev/target": str(worker.spec.slots),
        "autoscaling.knative.dev/scale-to-zero-pod-retention-period": f"{values.scaling.cooldown_s}s",
    }
    found = pods.template(values, worker.name, "worker", {"timeoutSeconds": LONGEST_S, "containerConcurrency": 0, **spec})
    found["metadata"]["annotations"] = revision
    service = pods.thing(
        "serving.knative.dev/v1",
        "Service",
        values,
        worker.name,
        "worker",
        annotations={"lmgraph/nodes": ",".join(worker.nodes)},
        spec={"template": found},
    )
    service["metadata"]["labels"]["networking.knative.dev/visibility"] = "cluster-local"
    return [*workers.claims(values, worker), service]
