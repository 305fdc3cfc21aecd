"""What the servers behind workers are like: ports, probes, metrics, users, how they are told to stop. Facts as data, pure.

Sources: llama.cpp tools/server and .devops/cpu.Dockerfile (build b11549); vLLM docker/Dockerfile (its user `vllm`, 2000) and
`vllm serve --help` (0.28; --shutdown-timeout since 0.18); LoRAX launcher's reference and router's metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MODELS = "/models"
"""where a worker's model cache lies in its container"""
LINGER_S = 10
"""seconds from the moment that a pod is told to end until it stops: others go on sending to it until they have heard"""


@dataclass(frozen=True)
class Engine:
    """One kind of server. It answers /health and /metrics at its port; `waiting`, `running` are its gauges of requests."""

    name: str
    image: str
    port: int
    user: int
    gpus: int
    slots: int
    """requests that one replica works on at a time, unless values say otherwise"""
    startup_s: int
    """seconds that a start may take: fetching weights, loading them"""
    requests: Mapping[str, str]
    limits: Mapping[str, str]
    waiting: str
    running: str
    environment: Mapping[str, str]
    drain: str = ""
    """shell line that is true as long as requests are under way; '': the server itself ends them when it is told to stop"""


LLAMACPP = Engine(
    name="llamacpp",
    image="ghcr.io/ggml-org/llama.cpp:server-b11176",
    port=8080,
    user=10001,
    gpus=0,
    slots=4,
    startup_s=600,
    requests={"cpu": "2", "memory": "3Gi"},
    limits={"cpu": "4", "memory": "4Gi"},
    waiting="llamacpp:requests_deferred",
    running="llamacpp:requests_processing",
    environment={"HOME": "/tmp"},
    drain="curl -sf -m 5 http://127.0.0.1:8080/metrics | grep -Eq '^llamacpp:requests_(processing|deferred) [1-9]'",
)
VLLM = Engine(
    name="vllm",
    image="vllm/vllm-openai:v0.28.0",
    port=8000,
    user=2000,
    gpus=1,
    slots=64,
    startup_s=1800,
    requests={"cpu": "4", "memory": "16Gi"},
    limits={"cpu": "8", "memory": "32Gi"},
    waiting="vllm:num_requests_waiting",
    running="vllm:num_requests_running",
    # HOME: its own is on the root file system, which is read-only here
    environment={"HOME": "/tmp", "HF_HOME": f"{MODELS}/hub", "VLLM_CACHE_ROOT": f"{MODELS}/vllm", "VLLM_NO_USAGE_STATS": "1"},
)
LORAX = Engine(
    name="lorax",
    image="ghcr.io/predibase/lorax:0.12.1",
    port=8080,
    user=10001,
    gpus=1,
    slots=64,
    startup_s=1800,
    requests={"cpu": "4", "memory": "16Gi"},
    limits={"cpu": "8", "memory": "32Gi"},
    waiting="lorax_queue_length",
    running="lorax_batch_current_size",
    # USER: torch asks who it is, and a container's user without an entry has no name
    environment={"HOME": "/tmp", "USER": "lorax", "HUGGINGFACE_HUB_CACHE": f"{MODELS}/hub"},
)
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (LLAMACPP, VLLM, LORAX)}
EXTERNAL = "external"
"""a server that is none of ours: nothing is rendered for it but the way to it"""
