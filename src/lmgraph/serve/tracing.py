"""OpenTelemetry traces of finished answers, sent over OTLP/HTTP where the environment names a collector. The one home of its SDK.

Spans are written after an answer is over, from what was measured anyhow, and are sent by a thread of their own: a slow or dead collector
costs an answer nothing, and what does not fit its queue is dropped. Names and attributes follow the GenAI semantic conventions; what has
no name there begins with `lmgraph.`. No text of a message, an answer or an error is ever in a span.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lmgraph import __version__
from lmgraph.errors import MissingExtra, SettingsError
from lmgraph.types import Decision, Step

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanKind

TRACES, BASE, PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
EXPORT_S = 3.0
"""one try to send a batch, retries included"""
CLOSE_S = 3.0
Value = str | int | float | bool


def open_tracing(environment: Mapping[str, str]) -> Tracing | None:
    """What records traces, None where no collector is named. Raises MissingExtra, SettingsError for what cannot be an address.

    `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is a whole address, `OTEL_EXPORTER_OTLP_ENDPOINT` one that `/v1/traces` is put behind. Headers,
    certificates, service name and sampling are read by the SDK from its own variables (OpenTelemetry's environment variable specification).
    """
    whole, base = environment.get(TRACES, ""), environment.get(BASE, "")
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or not (whole or base):
        return None
    name = TRACES if whole else BASE
    if urlsplit(whole or base).scheme not in ("http", "https"):
        raise SettingsError(f"{name} is {environment[name]!r}, expected an address that begins with http:// or https://.")
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get(PROTOCOL) or "http/protobuf"
    if protocol != "http/protobuf":
        raise SettingsError(f"{PROTOCOL} is {protocol!r}; lmgraph sends http/protobuf.", "Most collectors take it on port 4318.")
    named = "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "") or environment.get("OTEL_SERVICE_NAME")
    return Tracing(whole or f"{base.rstrip('/')}/v1/traces", {} if named else {"service.name": "lmgraph"})


class Tracing:
    """Sends spans to one collector. Make one with `open_tracing`; `close` it, or its last spans are lost."""

    def __init__(self, endpoint: str, resource: Mapping[str, str]) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingExtra("Sending traces", "otel") from error
        self._api = trace
        self._parents = TraceContextTextMapPropagator()
        about = Resource.create({**resource, "service.version": __version__})
        self._provider = TracerProvider(resource=about, shutdown_on_exit=False)  # at exit it would wait for up to 30 s
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)))
        self._tracer = self._provider.get_tracer("lmgraph", __version__)

    def record(
        self,
        request_id: str,
        trace_parent: str | None,
        began_ns: int,
        ended_ns: int,
        status: int,
        decision: Decision | None = None,
        steps: Sequence[Step] = (),
        attributes: Mapping[str, Value] | None = None,
        ended: Mapping[int, int] | None = None,
    ) -> None:
        """One finished request: a span for it, with one for the decision and one for each step in it. Never waits.

        `trace_parent` is the request's W3C `traceparent` header; times are nanoseconds since 1970, `status` is HTTP's. `attributes` are the
        request's own, such as `gen_ai.request.model`; none of them may hold message text. Steps follow one another and the last one ends
        with the request, so their places in time are counted back from there; voters come before all others and begin together. The steps
        of a walk's hop are counted back from when it `ended` (number of the hop -> nanoseconds since 1970): hops may run side by side.
        """
        kinds, own = self._api.SpanKind, dict(attributes or {})
        carrier = {"traceparent": trace_parent} if trace_parent else {}
        last = next((step for step in reversed(steps) if not step.error), None)
        if last is not None:
            own = {**({"gen_ai.response.model": f"lmgraph/{last.node}"} if status < 400 else {}), **_usage(steps), **own}
        own = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "lmgraph", **own}
        own |= {"lmgraph.request.id": request_id, "http.response.status_code": status}
        name = f"{own['gen_ai.operation.name']} {own.get('gen_ai.request.model', 'lmgraph')}"
        root = self._tracer.start_span(name, self._parents.extract(carrier), kinds.SERVER, own, start_time=began_ns)
        ends: dict[int | None, int] = dict((ended or {}).items())
        voters = [step for step in steps if step.voter]
        for group in (*([step] for step in reversed(steps) if not step.voter), *([voters] if voters else [])):
            hop = group[0].hop
            at = min(max(began_ns, ends.get(hop, ended_ns)), ended_ns)
            start = max(began_ns, at - int(max(step.ms for step in group) * 1e6))
            for step in group:
                end = min(at, start + int(step.ms * 1e6))
                self._child(root, f"chat {step.node}", kinds.CLIENT, start, end, _of_step(step), bool(step.error))
            ends[hop] = start
        if decision is not None:
            at = max(began_ns, min(ends.values(), default=ended_ns))
            took = decision.tokenise_ms + decision.prefill_ms + decision.decode_ms
            self._child(root, "decide lmgraph", kinds.INTERNAL, max(began_ns, at - int(took * 1e6)), at, _of_decision(decision), False)
        self._end(root, ended_ns, status >= 500)

    def _child(self, root: Span, name: str, kind: SpanKind, start: int, end: int, attributes: Mapping[str, Value], failed: bool) -> None:
        place = self._api.set_span_in_context(root)
        self._end(self._tracer.start_span(name, place, kind, attributes, start_time=start), end, failed)

    def _end(self, span: Span, at: int, failed: bool) -> None:
        if failed:
            span.set_status(self._api.StatusCode.ERROR)
        span.end(at)

    def close(self) -> None:
        """Send what is left, for at most `CLOSE_S` seconds; what is not sent by then is lost. Blocks: call it in a thread."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _of_decision(decision: Decision) -> dict[str, Value]:
    return {
        "lmgraph.decision.node": decision.node,
        "lmgraph.decision.chosen": decision.chosen,
        "lmgraph.decision.token": decision.token,
        "lmgraph.decision.probability": decision.probability,
        "lmgraph.decision.fallback": decision.fallback,
        "lmgraph.decision.rewritten": decision.rewritten != decision.query,
        "gen_ai.usage.input_tokens": decision.prompt_tokens,
        "gen_ai.usage.output_tokens": decision.rewrite_tokens,
    }


def _of_step(step: Step) -> dict[str, Value]:
    found: dict[str, Value] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lmgraph",
        "gen_ai.request.model": f"lmgraph/{step.node}",
        "lmgraph.step.attempts": step.attempts,
        **_usage([step]),
    }
    if step.hop is not None:
        found["lmgraph.step.hop"] = step.hop
    if step.first_ms:
        found["gen_ai.response.time_to_first_chunk"] = step.first_ms / 1000
    return {**found, "error.type": "worker_error"} if step.error else found


def _usage(steps: Sequence[Step]) -> dict[str, Value]:
    names = {"prompt_tokens": "gen_ai.usage.input_tokens", "completion_tokens": "gen_ai.usage.output_tokens"}
    return {names[name]: sum(s.usage.get(name, 0) for s in steps) for name in names if any(name in s.usage for s in steps)}
