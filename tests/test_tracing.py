"""The way of a call's id and trace context: in with HTTP, over ZMQ, into the store, out as spans of an SDK."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags
from served import eventually
from starlette.requests import Request

from gateway.mesh import Frames
from gateway.metrics import Metrics
from gateway.tracing import traceparent
from gateway.watch import Watch
from runtime.protocol import Progress

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@dataclass
class Recorded:
    """A span as an SDK would keep it."""

    name: str
    parent: SpanContext
    attributes: dict
    start: int
    end: int = 0
    status: StatusCode | None = None


@dataclass
class Recorder:
    """As much of an SDK's tracer as it takes to see what was recorded."""

    spans: list[Recorded] = field(default_factory=list)

    def start_span(self, name, context=None, attributes=None, start_time=None):
        recorded = Recorded(name, trace.get_current_span(context).get_span_context(), attributes or {}, start_time)
        self.spans.append(recorded)
        return _Recording(recorded, len(self.spans))


class _Recording(NonRecordingSpan):
    def __init__(self, recorded, number):
        super().__init__(SpanContext(recorded.parent.trace_id, number, False, TraceFlags(1)))
        self.recorded = recorded

    def is_recording(self):
        return True

    def set_status(self, status, description=None):
        self.recorded.status = status

    def end(self, end_time=None):
        self.recorded.end = end_time


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(trace, "get_tracer", lambda name: recorder)
    return recorder


def create(gateway, **headers):
    answer = gateway.http.post("/v1/videos", json={"prompt": "a cat", "num_inference_steps": 2}, headers=headers)
    return answer.raise_for_status().json()["id"]


# ---- ids ---------------------------------------------------------------------------------------------------------


def test_the_calls_id_and_context_travel_to_the_ranks(gateway, fake, logs):
    gateway.wait(create(gateway, **{"x-request-id": "mine", "traceparent": PARENT}))
    (request,) = fake.submitted
    assert (request.trace, request.traceparent) == ("mine", PARENT)
    stages = [entry for entry in logs if entry["event"] == "stage" and entry["trace"] == "mine"]
    assert [entry["stage"] for entry in stages][:3] == ["encode", "denoise", "decode"]


@pytest.mark.parametrize("sent", ["", "nonsense", PARENT.upper(), f"00-{'0' * 32}-00f067aa0ba902b7-01", PARENT + "-1"])
def test_a_context_that_is_none_is_not_passed_on(gateway, fake, sent):
    gateway.wait(create(gateway, traceparent=sent))
    assert fake.submitted[0].traceparent == ""
    assert fake.submitted[0].trace.startswith("req_")


def test_a_job_that_is_taken_up_again_keeps_them(start, fake):
    first = start()
    fake.held = {"denoise:1"}
    video_id = create(first, **{"x-request-id": "mine", "traceparent": PARENT})
    fake.wait_for("denoise:1")
    first.close()
    fake.release()
    start().wait(video_id)
    again = fake.submitted[-1]
    assert len(fake.submitted) == 2
    assert (again.trace, again.traceparent) == ("mine", PARENT)


def test_where_a_span_is_open_its_context_goes_on_instead_of_what_was_sent():
    request = Request({"type": "http", "headers": [(b"traceparent", PARENT.encode())]})
    assert traceparent(request) == PARENT
    ours = SpanContext(int(TRACE_ID, 16), 0xABC, False, TraceFlags(1))
    with trace.use_span(NonRecordingSpan(ours)):
        assert traceparent(request) == f"00-{TRACE_ID}-0000000000000abc-01"


# ---- spans -------------------------------------------------------------------------------------------------------


def test_a_span_for_the_generation_and_one_for_each_stage(gateway, fake, recorder):
    fake.held = {"denoise:1"}
    video_id = create(gateway, traceparent=PARENT)
    # Frames come on a socket of their own: on a busy machine they would be here before all news.
    eventually(lambda: gateway.video(video_id)["stage"] == "denoise")
    fake.release()
    gateway.wait(video_id)
    eventually(lambda: recorder.spans and recorder.spans[0].end)
    whole, *stages = recorder.spans
    assert whole.name == "generate"
    assert f"{whole.parent.trace_id:032x}" == TRACE_ID
    assert whole.attributes == {"framemesh.request": video_id, "framemesh.model": "demo"}
    assert whole.status is None
    assert [span.name for span in stages][:4] == ["queued", "encode", "denoise", "decode"]
    assert {span.parent.span_id for span in stages} == {1}
    assert [span.start for span in stages] == [whole.start] + [span.end for span in stages[:-1]]
    assert stages[-1].end == whole.end
    assert all(span.start <= span.end for span in stages)


def test_frames_and_news_that_overtake_each_other_make_no_stage_twice(recorder):
    def frames(first):
        return Frames(first, 3, np.zeros((1, 2, 2, 3), np.uint8), {})

    def news(stage):
        return Progress("a", stage, 1, 2, 0.5)

    with Watch(Metrics(), "demo", "a") as seen:
        for event in (
            news("denoise"),
            frames(0),
            news("denoise"),
            news("decode"),
            news("deliver"),
            frames(1),
            frames(2),
        ):
            seen(event)
    assert [span.name for span in recorder.spans] == ["generate", "queued", "denoise", "decode", "deliver"]
    with Watch(Metrics(), "demo", "b") as seen:
        for event in (news("decode"), frames(0), news("queued"), news("encode"), news("denoise"), frames(1)):
            seen(event)
    again = [span.name for span in recorder.spans[5:]]
    assert again == ["generate", "queued", "decode", "queued", "encode", "denoise", "decode"], "a restart is told"


def test_the_span_of_a_failure_says_so(gateway, fake, recorder):
    fake.failures["denoise:1"] = ("internal_error", "boom")
    gateway.wait(create(gateway), "failed")
    assert recorder.spans[0].status is StatusCode.ERROR
    assert [span.name for span in recorder.spans] == ["generate", "queued", "encode", "denoise"]


def test_without_an_sdk_there_are_none(gateway):
    with trace.use_span(trace.get_tracer("framemesh").start_span("probe")) as span:
        assert not span.is_recording()
    gateway.wait(create(gateway, traceparent=PARENT))
