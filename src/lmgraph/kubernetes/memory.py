"""What the gateways share: a small Redis for trials, or the address of one's own. Pure.

The trial Redis is one pod with one disk and a password of the operator's Secret: it survives restarts (append-only file), not the loss of
its disk, and is no cluster. lmgraph wants `noeviction`: keys of the API must not be evicted (docs/operations.md).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from lmgraph.kubernetes import pods
from lmgraph.kubernetes.pods import Object
from lmgraph.kubernetes.values import Values

PORT = 6379
USER = 999
"""of the image"""
STORE, PASSWORD = "LMGRAPH_STORE", "REDIS_PASSWORD"
READY = ["sh", "-c", "redis-cli ping | grep -q PONG"]
"""redis-cli has the password from REDISCLI_AUTH"""


UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def size(quantity: str) -> float:
    """Bytes of a quantity of memory, such as 4Gi."""
    number = quantity.rstrip("kKMGTi")
    return float(number) * UNITS[quantity[len(number) :]]


def name(values: Values) -> str:
    """Of Redis' objects."""
    return f"{values.name}-redis"


def place(values: Values) -> tuple[str, int]:
    """(host, port) of the operator's own Redis, as far as it is known: of a URL in a Secret we are told where it is."""
    redis = values.redis
    if redis.kind == "url":
        parts = urlsplit(redis.url)
        return parts.hostname or "", parts.port or PORT
    return (f"redis.{redis.namespace}.svc" if redis.namespace else ""), redis.port


def variables(values: Values) -> list[Object]:
    """The gateway's environment variables that say where the store is. A password is put into the URL by Kubernetes, not by us."""
    redis = values.redis
    if redis.kind == "url":
        return [{"name": STORE, "value": redis.url}]
    if redis.kind == "secret":
        return [pods.secret(STORE, redis.secret)]
    url = f"redis://:$({PASSWORD})@{name(values)}.{values.namespace}.svc:{PORT}/0"
    return [pods.secret(PASSWORD, redis.secret), {"name": STORE, "value": url}]


def objects(values: Values) -> list[Object]:
    """StatefulSet and Service of the trial Redis; nothing where the operator has one."""
    if values.redis.kind != "trial":
        return []
    redis, called = values.redis, name(values)
    main = pods.container(
        "redis",
        values.images.redis,
        redis.resources,
        command=["redis-server"],
        args=[
            *("--requirepass", f"$({PASSWORD})", "--dir", "/data", "--appendonly", "yes", "--appendfsync", "everysec"),
            *("--maxmemory", str(int(0.7 * size(redis.resources.limits["memory"])) if "memory" in redis.resources.limits else 0)),
            *("--maxmemory-policy", "noeviction", "--save", ""),
        ],
        env=[pods.secret(PASSWORD, redis.secret), pods.secret("REDISCLI_AUTH", redis.secret)],
        mounts=[{"name": "data", "mountPath": "/data"}],
        ports=[{"name": "redis", "containerPort": PORT, "protocol": "TCP"}],
        startupProbe={"exec": {"command": READY}, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 60},
        readinessProbe={"exec": {"command": READY}, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        livenessProbe={"tcpSocket": {"port": "redis"}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
    )
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": redis.size}},
        **({"storageClassName": redis.storage_class} if redis.storage_class else {}),
    }
    body = {
        "replicas": 1,
        "serviceName": called,
        "selector": {"matchLabels": pods.selector(values, called)},
        "template": pods.template(values, called, "redis", pods.pod(values, called, USER, [main], spread=False)),
        "volumeClaimTemplates": [{"metadata": {"name": "data", "labels": pods.selector(values, called)}, "spec": claim}],
    }
    ports = [{"name": "redis", "port": PORT, "targetPort": "redis", "protocol": "TCP"}]
    return [
        pods.thing("apps/v1", "StatefulSet", values, called, "redis", spec=body),
        pods.thing(
            "v1", "Service", values, called, "redis", spec={"clusterIP": "None", "selector": pods.selector(values, called), "ports": ports}
        ),
    ]
