"""Traces: what a span says, and that it arrives at a real OTLP/HTTP receiver."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from server.engine.request import GenerationRequest, SamplingParams
from server.telemetry.tracing import MAX_FINISH_REASONS, Reply, Tracing, open_tracing, wanted
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
PROMPT = "a secret that is in no span"


# --- what a span says ----------------------------------------------------------------------


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(memory) -> Iterator[Tracing]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracing = Tracing(provider)
    yield tracing
    tracing.close()


def reply(status: int = 200, route: str = "/generate", adapter: str | None = "complaints") -> Reply:
    return Reply("POST", route, status, "r-1", adapter, None if adapter is None else "3")


def request(prompt: tuple[int, ...] = (5, 6, 7), **sampling) -> GenerationRequest:
    return GenerationRequest("g", prompt, SamplingParams(max_new_tokens=9, **sampling))


def test_a_generation_becomes_attributes(tracing, memory):
    span = tracing.begin({})
    watch = tracing.began(request(do_sample=True, temperature=0.7, top_p=0.9, top_k=11, seed=3))
    watch.first_token(0.5, 0.2)
    watch.token(0.1)
    watch.ended("length", 0.6, None)
    span.end(reply())
    (told,) = memory.get_finished_spans()
    assert told.name == "text_completion complaints"
    assert told.kind is SpanKind.SERVER
    assert told.status.status_code is StatusCode.UNSET
    assert dict(told.attributes) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "graftwork.request.id": "r-1",
        "graftwork.adapter.name": "complaints",
        "graftwork.adapter.version": "3",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "graftwork",
        "gen_ai.request.model": "complaints",
        "gen_ai.response.model": "complaints",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 11,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_to_first_token": 0.5,
        "gen_ai.latency.time_in_queue": 0.2,
    }


def test_samples_of_one_prompt_count_its_tokens_once(tracing, memory):
    span = tracing.begin({})
    one, other = request(), request(tuple([8, 8]))
    watches = [tracing.began(each) for each in (one, one, other, other)]
    for seconds, watch in zip((0.4, 0.3, 0.9, 0.8), watches, strict=True):
        watch.first_token(seconds, seconds / 2)
        watch.ended("stop", seconds, None)
    span.end(reply(route="/v1/chat/completions"))
    (told,) = memory.get_finished_spans()
    assert told.name == "chat complaints"
    assert told.attributes["gen_ai.usage.input_tokens"] == 5
    assert told.attributes["gen_ai.usage.output_tokens"] == 4
    assert told.attributes["gen_ai.request.choice.count"] == 2
    assert told.attributes["gen_ai.response.finish_reasons"] == ("stop",) * 4
    assert told.attributes["gen_ai.latency.time_to_first_token"] == 0.3
    assert told.attributes["gen_ai.latency.time_in_queue"] == 0.15
    assert told.attributes["gen_ai.request.temperature"] == 0.0  # it was not sampled


def test_a_request_that_generates_nothing_is_called_by_its_route(tracing, memory):
    tracing.begin({}).end(reply(404, "/adapters/{name}", adapter=None))
    (told,) = memory.get_finished_spans()
    assert told.name == "POST /adapters/{name}"
    assert told.status.status_code is StatusCode.UNSET  # the client's mistake
    assert not [name for name in told.attributes if "adapter" in name or "gen_ai" in name]


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(500, None, "500"), (424, "adapter_corrupt", "adapter_corrupt"), (200, "aborted", "aborted")],
)
def test_failures_are_told(tracing, memory, status, code, error):
    span = tracing.begin({})
    tracing.began(request()).ended("error", 0.1, code)
    span.end(reply(status))
    (told,) = memory.get_finished_spans()
    assert told.status.status_code is StatusCode.ERROR
    assert told.attributes["error.type"] == error


def test_a_request_of_thousands_of_labels_lists_some_reasons(tracing, memory):
    span = tracing.begin({})
    for index in range(1000):
        watch = tracing.began(request((index,)))
        watch.first_token(0.1, None)
        watch.ended("length", 0.1, None)
    span.end(reply(route="/classify"))
    (told,) = memory.get_finished_spans()
    assert len(told.attributes["gen_ai.response.finish_reasons"]) == MAX_FINISH_REASONS
    assert told.attributes["gen_ai.usage.output_tokens"] == 1000


def test_a_generation_of_no_request_goes_untraced(tracing, memory):
    watch = tracing.began(request())
    watch.first_token(0.1, None)
    watch.token(0.1)
    watch.ended("stop", 0.2, None)
    assert memory.get_finished_spans() == ()


def test_a_parent_is_honoured_and_nonsense_is_not(tracing, memory):
    tracing.begin({"traceparent": f"00-{TRACE}-{PARENT}-01"}).end(reply())
    tracing.begin({"traceparent": "00-zz-1-01"}).end(reply())
    child, orphan = memory.get_finished_spans()
    assert f"{child.context.trace_id:032x}" == TRACE
    assert f"{child.parent.span_id:016x}" == PARENT
    assert orphan.parent is None


def test_a_parent_that_was_not_sampled_leaves_nothing(tracing, memory):
    span = tracing.begin({"traceparent": f"00-{TRACE}-{PARENT}-00"})
    tracing.began(request()).ended("stop", 0.1, None)
    span.end(reply())
    assert memory.get_finished_spans() == ()


def test_a_sampler_that_wants_nothing_gets_nothing(memory):
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracing = Tracing(provider)
    span = tracing.begin({})
    tracing.began(request()).ended("stop", 0.1, None)
    span.end(reply())
    tracing.close()
    assert memory.get_finished_spans() == ()


# --- when there are traces -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
    ],
)
def test_the_standard_variables_decide(environ, expected):
    assert wanted(environ) is expected


def test_another_protocol_than_http_is_off():
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    assert open_tracing(environ) is None


def test_nothing_of_it_is_imported_unless_asked_for():
    # FastAPI itself imports OpenTelemetry's API; what makes and sends spans comes with the extra.
    script = (
        "import sys, server.telemetry.tracing\n"
        "names = lambda: [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        "assert server.telemetry.tracing.open_tracing({}) is None and not names(), names()\n"
        "import server.app\n"
        "print([n for n in names() if n.split('.')[1:2] in (['sdk'], ['exporter'])])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_extra_the_server_goes_on_without_traces():
    # As if it were not installed: None in sys.modules is what import finds then.
    script = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from server.telemetry.tracing import open_tracing\n"
        "print(open_tracing({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:1'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip().endswith("None"), done.stderr
    assert "graftwork[otel]" in done.stdout + done.stderr


# --- a real receiver -----------------------------------------------------------------------


class Receiver:
    """An OTLP/HTTP collector on a loopback port, which keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.raw = b""
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                receiver.raw += body
                receiver.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_arguments) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> dict[str, Span]:
        """By request id."""
        spans = [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return {attributes(span)["graftwork.request.id"]: span for span in spans}

    def wait_for(self, *request_ids: str) -> dict[str, Span]:
        end = time.monotonic() + 30
        while not set(request_ids) <= self.spans().keys():
            assert time.monotonic() < end, f"only {self.spans().keys()} came"
            time.sleep(0.02)
        return self.spans()


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join(10)


def attributes(span: Span) -> dict:
    return {pair.key: plain(pair.value) for pair in span.attributes}


def plain(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(one) for one in value.array_value.values]
    return getattr(value, kind)


@pytest.fixture(scope="module")
def traced(tiny_base, tmp_path_factory):
    """A server whose spans go to a receiver, and the receiver."""
    home = tmp_path_factory.mktemp("traced")
    with receiving() as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_server(make_settings(tiny_base, home / "data")) as client:
            upload(client, save_prefix_adapter(home / "a"), "complaints")
            yield client, receiver


def test_a_span_arrives_with_its_parent_and_without_the_prompt(traced):
    client, receiver = traced
    reply = client.post(
        "/generate?adapter=complaints",
        json={
            "inputs": PROMPT,
            "parameters": {"max_new_tokens": 6, "ignore_eos": True, "details": True},
        },
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "whole"},
    )
    details = reply.json()["details"]
    span = receiver.wait_for("whole")["whole"]
    told = attributes(span)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "text_completion complaints"
    assert told["gen_ai.usage.input_tokens"] == details["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["graftwork.adapter.version"] == "1"
    assert told["http.route"] == "/generate"
    assert 0 <= told["gen_ai.latency.time_in_queue"] <= told["gen_ai.latency.time_to_first_token"]
    first_ms = round(told["gen_ai.latency.time_to_first_token"] * 1000)
    assert str(first_ms) == reply.headers["x-time-to-first-token"]
    assert PROMPT.encode() not in receiver.raw
    assert reply.json()["generated_text"].encode() not in receiver.raw


def test_a_stream_has_one_span_that_ends_with_it(traced):
    client, receiver = traced
    body = {"inputs": "x", "parameters": {"max_new_tokens": 5, "ignore_eos": True}}
    with client.stream("POST", "/generate_stream", json=body, headers={"x-request-id": "s"}) as r:
        frames = [line for line in r.iter_lines() if line]
    told = attributes(receiver.wait_for("s")["s"])
    assert len(frames) == 5
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.request.model"] == "tiny-base"


def test_choices_share_a_span(traced):
    client, receiver = traced
    body = {"model": "complaints", "prompt": "x y", "n": 3, "max_tokens": 2, "ignore_eos": True}
    reply = client.post("/v1/completions", json=body, headers={"x-request-id": "n"})
    usage = reply.json()["usage"]
    told = attributes(receiver.wait_for("n")["n"])
    assert told["gen_ai.request.choice.count"] == 3
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6


def test_refusals_have_spans_and_probes_have_none(traced):
    client, receiver = traced
    client.get("/livez", headers={"x-request-id": "probe"})
    client.get("/metrics", headers={"x-request-id": "scrape"})
    client.get("/adapters/nobody", headers={"x-request-id": "unknown"})
    spans = receiver.wait_for("unknown")
    assert spans["unknown"].name == "GET /adapters/{name}"
    assert attributes(spans["unknown"])["http.response.status_code"] == 404
    assert not {"probe", "scrape"} & spans.keys()


def test_the_service_has_a_name(traced):
    client, receiver = traced
    client.get("/v1/models", headers={"x-request-id": "models"})
    receiver.wait_for("models")
    resource = receiver.requests[0].resource_spans[0].resource
    assert {p.key: plain(p.value) for p in resource.attributes}["service.name"] == "graftwork"
