"""The pods that answer: one deployment for all nodes that share a base. Pure.

It knows how each engine is started (its arguments, what it must be able to write, how it is emptied before it ends). Who scales it is
scaling.py's; other ways to run the same pods are serving.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmgraph.kubernetes import pods
from lmgraph.kubernetes.decided import MASTER, Deployment
from lmgraph.kubernetes.engines import LINGER_S, MODELS
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.values import Resources, Values

FETCHER = Resources({"cpu": "250m", "memory": "256Mi"}, {"cpu": "1", "memory": "1Gi"})
"""of the init container that fetches a catalogue model"""
AFTER_S = 10
"""seconds between the end of draining and being killed"""


def arguments(worker: Deployment) -> list[str]:
    """What the server is started with."""
    spec, place, port = worker.spec, worker.place, str(worker.engine.port)
    if worker.engine.name == "llamacpp":
        out = ["--model", place, "--alias", worker.model, "--host", "0.0.0.0", "--port", port, "--metrics"]
        out += ["--ctx-size", str(spec.context * spec.slots), "--parallel", str(spec.slots)]
        if worker.adapters:
            places = dict.fromkeys(adapter.place for adapter in worker.adapters)
            out += ["--lora", ",".join(places), "--lora-init-without-apply"]  # each request says which one it wants
    elif worker.engine.name == "vllm":
        out = [place, "--served-model-name", worker.model, "--host", "0.0.0.0", "--port", port]
        out += ["--max-model-len", str(spec.context), "--max-num-seqs", str(spec.slots), "--shutdown-timeout", str(spec.drain_s)]
        if spec.gpus > 1:
            out += ["--tensor-parallel-size", str(spec.gpus)]
        if worker.adapters:
            count = len(worker.adapters)
            out += ["--enable-lora", "--max-loras", str(min(count, 8)), "--max-cpu-loras", str(count)]
            out += ["--max-lora-rank", str(spec.max_lora_rank), "--lora-modules"]
            out += [f"{adapter.name}={adapter.place}" for adapter in worker.adapters]
    else:
        # --hostname: its default is the variable HOSTNAME, which in a pod is the pod's name
        out = ["--model-id", place, "--hostname", "0.0.0.0", "--port", port, "--json-output"]
        out += ["--max-total-tokens", str(spec.context), "--max-input-length", str(spec.context - 1)]
        out += ["--max-batch-prefill-tokens", str(max(spec.context, 4096)), "--max-concurrent-requests", str(max(4 * spec.slots, 128))]
        out += ["--num-shard", str(spec.gpus)]
    return [*out, *spec.args]


def objects(values: Values, worker: Deployment) -> list[Object]:
    """The claim of its cache, Deployment, Service, PodDisruptionBudget."""
    spec = worker.spec
    fixed = {"replicas": spec.replicas.min} if values.scaling.kind == "none" or spec.replicas.min == spec.replicas.max else {}
    # A new pod beside the old ones would need a GPU, or a disk, that nobody else has.
    tight = spec.gpus or spec.cache.access.startswith("ReadWriteOnce")
    body = {
        **fixed,
        "revisionHistoryLimit": 5,
        "selector": {"matchLabels": pods.selector(values, worker.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0 if tight else 1, "maxUnavailable": 1 if tight else 0}},
        "template": pods.template(values, worker.name, "worker", pod(values, worker)),
    }
    nodes = {"lmgraph/nodes": ",".join(worker.nodes)} if worker.nodes else None
    return [
        *claims(values, worker),
        pods.thing("apps/v1", "Deployment", values, worker.name, "worker", annotations=nodes, spec=body),
        pods.service(values, worker.name, "worker", worker.engine.port),
        *([pods.disruption(values, worker.name, "worker")] if spec.replicas.max > 1 else []),
    ]


def claims(values: Values, worker: Deployment) -> list[Object]:
    """The PersistentVolumeClaim of its model cache, where one is asked for."""
    cache = worker.spec.cache
    if not cache.access:
        return []
    spec = {
        "accessModes": [cache.access],
        "resources": {"requests": {"storage": cache.size}},
        **({"storageClassName": cache.storage_class} if cache.storage_class else {}),
    }
    return [pods.thing("v1", "PersistentVolumeClaim", values, worker.name, "worker", spec=spec)]


def pod(values: Values, worker: Deployment) -> Object:
    """The spec of one pod."""
    spec, engine = worker.spec, worker.engine
    volumes, mounts = _volumes(values, worker)
    main = pods.container(
        "server",
        values.images.master if worker.key == MASTER else getattr(values.images, engine.name),
        spec.resources,
        args=arguments(worker),
        env=_environment(worker),
        mounts=mounts,
        gpus={spec.gpu_resource: spec.gpus},
        ports=[{"name": "http", "containerPort": engine.port, "protocol": "TCP"}],
        startupProbe=pods.probe("/health", every_s=10, failures=-(-spec.startup_s // 10)),
        readinessProbe=pods.probe("/health", every_s=5, failures=3),
        livenessProbe=pods.probe("/health", every_s=20, failures=6, timeout_s=15),
        lifecycle={"preStop": _stopping(worker)},
    )
    taint = [{"key": spec.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}] if spec.gpus else []
    return pods.pod(
        values,
        worker.name,
        engine.user,
        [main],
        first=_fetching(values, worker),
        volumes=volumes,
        grace_s=LINGER_S + spec.drain_s + AFTER_S,
        node_selector=spec.node_selector,
        tolerations=[*taint, *spec.tolerations],
    )


def _environment(worker: Deployment) -> list[Object]:
    spec, engine = worker.spec, worker.engine
    env = pods.plain(engine.environment)
    if engine.name == "llamacpp":
        env.append(pods.cores("LLAMA_ARG_THREADS"))
    if spec.hub_token.secret:
        env.append(pods.secret("HUGGING_FACE_HUB_TOKEN" if engine.name == "lorax" else "HF_TOKEN", spec.hub_token))
    return [*env, *pods.plain(spec.env)]


def _volumes(values: Values, worker: Deployment) -> tuple[list[Object], list[Object]]:
    """(volumes, mounts): the model cache, the graph's files, shared memory for GPU servers."""
    cache = worker.spec.cache
    claim = cache.claim or (worker.name if cache.access else "")
    kept: Mapping[str, Any] = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {"sizeLimit": cache.size}}
    volumes: list[Object] = [{"name": "models", **kept}]
    mounts: list[Object] = [{"name": "models", "mountPath": MODELS}]
    if worker.files:
        volume, mount = pods.files(values)
        volumes.append(volume)
        mounts.append(mount)
    if worker.spec.gpus:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return volumes, mounts


def _fetching(values: Values, worker: Deployment) -> list[Object]:
    """The init container that fetches a catalogue model; vLLM and LoRAX fetch for themselves."""
    if not worker.pull:
        return []
    env = [*pods.plain({"LMGRAPH_CACHE": MODELS, "HOME": "/tmp"}), *pods.plain(values.gateway.env)]
    # flock: pods that share a claim fetch one after the other, and all but the first find the file there
    command = ["flock", f"{MODELS}/.lmgraph-lock", "lmgraph", "pull", *worker.pull]
    mounts = [{"name": "models", "mountPath": MODELS}, *([pods.files(values)[1]] if worker.files else [])]
    room = values.gateway.resources if worker.key == MASTER else FETCHER  # a master is merged, not only fetched
    return [pods.container("pull", values.images.gateway, room, command=command, env=env, mounts=mounts)]


def _stopping(worker: Deployment) -> Object:
    """What a pod does before it is told to stop: others are still sending to it, and some servers end at once."""
    if not worker.engine.drain:
        return {"sleep": {"seconds": LINGER_S}}
    script = (
        f"sleep {LINGER_S}; end=$(($(date +%s) + {worker.spec.drain_s})); "
        f"while [ $(date +%s) -lt $end ] && {worker.engine.drain}; do sleep 1; done"
    )
    return {"exec": {"command": ["sh", "-c", script]}}
