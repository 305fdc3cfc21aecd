"""A worker process: a llama.cpp server (xllamacpp's) with one model and, where one is named, a LoRA that is always on.

worker.py MODEL.gguf --address 10.0.0.1 --port 8080 [--adapter LORA.gguf]
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp

SLOTS, CONTEXT = 4, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--adapter")
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.hostnames, params.port = [given.address], given.port
    params.n_parallel, params.n_ctx = SLOTS, CONTEXT * SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity, params.warmup, params.fit_params, params.cache_ram_mib = -1, False, False, 0
    if given.adapter:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = given.adapter, 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    print(f"ready at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
