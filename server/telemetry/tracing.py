"""OpenTelemetry: one span per request, with totals of its generations. Never a prompt or an output.

An extra (`pip install 'graftwork[otel]'`). Without it, or without OpenTelemetry's environment variables,
nothing of it is imported. The SDK interprets those variables (endpoint, headers, sampler, resource);
this module only checks whether they are set. Attribute names follow OpenTelemetry's conventions for
generative AI, and vLLM's for timings that those do not cover.

    Observation (middleware) -> Tracing.begin -> RequestSpan.end
                                      ^ generations find the span by a context variable
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import structlog

from server.engine.request import GenerationRequest, SamplingParams
from server.generation.observers import IGNORED, Ended, GenerationObserver
from server.store.caller import UNRESTRICTED, Caller

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = structlog.get_logger(__name__)

# An unresponsive collector must not delay shutdown.
CLOSE_SECONDS = 5.0
# A request that ranks thousands of labels has thousands of generations.
MAX_FINISH_REASONS = 64
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CHAT = ("/v1/chat/completions", "/v1/responses")

_current: ContextVar[RequestSpan | None] = ContextVar("graftwork_request_span", default=None)


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's environment variables enable tracing."""
    exporters = environ.get("OTEL_TRACES_EXPORTER", "").lower().replace(" ", "")
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporters == "none":
        return False
    return "otlp" in exporters.split(",") or any(environ.get(name) for name in _ENDPOINTS)


def open_tracing(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """Tracing over OTLP/HTTP; None if it is not enabled or not available."""
    if not wanted(environ):
        return None
    protocol = next((environ[name] for name in _PROTOCOLS if environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("tracing_off", reason=f"OTLP over {protocol}; expected http/protobuf")
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("tracing_off", reason="OpenTelemetry is not installed: graftwork[otel]")
        return None
    resource = Resource.create({"service.version": version("graftwork")})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "graftwork"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


@dataclass(frozen=True)
class Reply:
    """Facts about a request, available when its reply has ended.

    Attributes:
        method, route, status: of the HTTP request; `route` is a template.
        request_id: `x-request-id`.
        adapter, version: the adapter that served it; None if none was requested.
    """

    method: str
    route: str
    status: int
    request_id: str
    adapter: str | None
    version: str | None


class Tracing:
    """Creates the spans of one server; a `server.generation.observers.Observer` of its generations.

    Args:
        provider: the server's own tracer provider, shut down with it.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("graftwork", version("graftwork"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Mapping[str, str]) -> RequestSpan:
        """Start the span of a request; a child span if the request has a `traceparent`.

        Args:
            headers: request headers, names in lower case.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(headers, context=Context())
        return RequestSpan(self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER))

    def began(
        self, request: GenerationRequest, _caller: Caller = UNRESTRICTED, /
    ) -> GenerationObserver:
        """Start a generation of the current task's request."""
        span = _current.get()
        return IGNORED if span is None else span.observe(request)

    def refused(self, adapter: str | None, code: str) -> None:
        """No-op: the reply's status records the refusal."""

    def close(self) -> None:
        """Flush pending spans, for at most `CLOSE_SECONDS`."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


class RequestSpan:
    """One request: accumulates its generations and records them at the end."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._token: Token[RequestSpan | None] = _current.set(self)
        self._sampling: SamplingParams | None = None
        # Prompt tuples by identity: samples of one prompt share a tuple, so its tokens count once.
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._num_choices = 0
        self._output_tokens = 0
        self._finish_reasons: list[Ended] = []
        self._failure: str | None = None
        self._first: tuple[float, float | None] | None = None

    def observe(self, request: GenerationRequest) -> GenerationObserver:
        """Add a generation."""
        if not self._span.is_recording():
            return IGNORED
        self._sampling = self._sampling or request.sampling
        self._prompts[id(request.prompt_token_ids)] = request.prompt_token_ids
        self._num_choices += 1
        return _Observer(self)

    def end(self, reply: Reply) -> None:
        """Set all attributes and end the span."""
        _current.reset(self._token)
        attributes: dict[str, str | int | float | list[str]] = {
            "http.request.method": reply.method,
            "http.route": reply.route,
            "http.response.status_code": reply.status,
            "graftwork.request.id": reply.request_id,
        }
        if reply.adapter is not None:
            attributes["graftwork.adapter.name"] = reply.adapter
            attributes["graftwork.adapter.version"] = reply.version or ""
        self._span.update_name(f"{reply.method} {reply.route}")
        if self._sampling is not None:
            operation = "chat" if reply.route in _CHAT else "text_completion"
            attributes |= self._generation_attributes(self._sampling, operation, reply.adapter)
            self._span.update_name(f"{operation} {reply.adapter or ''}".rstrip())
        self._tell_failure(reply.status, attributes)
        self._span.set_attributes(attributes)
        self._span.end()

    def _generation_attributes(
        self, sampling: SamplingParams, operation: str, model: str | None
    ) -> dict[str, str | int | float | list[str]]:
        attributes: dict[str, str | int | float | list[str]] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "graftwork",
            "gen_ai.request.max_tokens": sampling.max_new_tokens,
            "gen_ai.request.choice.count": max(1, self._num_choices // len(self._prompts)),
            "gen_ai.request.temperature": sampling.temperature if sampling.do_sample else 0.0,
            "gen_ai.usage.input_tokens": sum(len(ids) for ids in self._prompts.values()),
            "gen_ai.usage.output_tokens": self._output_tokens,
            "gen_ai.response.finish_reasons": [str(reason) for reason in self._finish_reasons],
        }
        if model is not None:
            attributes["gen_ai.request.model"] = attributes["gen_ai.response.model"] = model
        if sampling.do_sample:
            attributes["gen_ai.request.top_p"] = sampling.top_p
            attributes["gen_ai.request.top_k"] = sampling.top_k
            attributes["gen_ai.request.seed"] = sampling.seed
        if self._first is not None:
            seconds, queue_seconds = self._first
            attributes["gen_ai.latency.time_to_first_token"] = seconds
            attributes["gen_ai.latency.time_in_queue"] = queue_seconds or 0.0
        return attributes

    def _tell_failure(
        self, status: int, attributes: dict[str, str | int | float | list[str]]
    ) -> None:
        from opentelemetry.trace import StatusCode

        # A stream that fails has already sent status 200.
        error = self._failure or (str(status) if status >= 500 else None)
        if error is not None:
            attributes["error.type"] = error
            self._span.set_status(StatusCode.ERROR)


class _Observer:
    __slots__ = ("_num_tokens", "_span")

    def __init__(self, span: RequestSpan) -> None:
        self._span = span
        self._num_tokens = 0

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        self._num_tokens = 1
        first = self._span._first
        if first is None or seconds < first[0]:
            self._span._first = (seconds, queue_seconds)

    def token(self, seconds: float) -> None:
        self._num_tokens += 1

    def ended(self, how: Ended, seconds: float, code: str | None) -> None:
        span = self._span
        span._output_tokens += self._num_tokens
        span._failure = span._failure or code
        if len(span._finish_reasons) < MAX_FINISH_REASONS:
            span._finish_reasons.append(how)
