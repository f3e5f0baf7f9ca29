"""Previews: what a request will look like, told while it is denoised, and without a trace in its latents or frames."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io

import numpy as np
import pytest
from fake_mesh import preview_brightness
from PIL import Image
from served import names

from gateway.media.stills import PREVIEW_SIDE, preview_still
from gateway.mesh import FRAME_CREDITS, Frames, Mesh, Preview
from gateway.stream import EventLog
from runtime.protocol import Completed, FramesChunk, Progress, ToScheduler
from runtime.sampling import SamplingParams, preview_steps
from runtime.wire import Channel, incarnation

PATIENCE_S = 20.0


@pytest.mark.parametrize(
    ("num_steps", "previews", "due"),
    [
        (20, 0, ()),
        (20, 1, (10,)),
        (20, 3, (5, 10, 15)),
        (50, 4, (10, 20, 30, 40)),
        (4, 20, (1, 2, 3)),
        (2, 5, (1,)),
        (1, 5, ()),
    ],
)
def test_previews_are_spread_evenly_and_none_follows_the_last_step(num_steps, previews, due):
    assert preview_steps(num_steps, previews) == due


# ---- a mesh and its consumer -------------------------------------------------------------------------------------


class Stage:
    """A request that the fake mesh holds in its first step, its consumer, and a rank that sends it chunks."""

    def __init__(self, fake, folder, **asked):
        self._fake, self._asked = fake, asked
        self._endpoint = f"ipc://{folder}/frames-of-previews"
        self.mesh = Mesh(fake.endpoint, self._endpoint)

    async def __aenter__(self):
        self._fake.held = {"denoise:1"}
        await self.mesh.start()
        await self.mesh.wait_ready(PATIENCE_S)
        params = self._fake.card.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=4))
        self.request = self.mesh.request("a", params, **self._asked)
        self.events = self.mesh.run(self.request)
        async for event in self.events:
            if isinstance(event, Progress) and (event.stage, event.step) == ("denoise", 1):
                break
        self._rank = Channel.connect(self._endpoint, ToScheduler, incarnation("rank"))
        return self

    async def __aexit__(self, *_):
        await self.events.aclose()
        self._rank.close()
        await self.mesh.close()

    def send(self, step, attempt=0, shape=(1, 6, 8, 3), request_id="a"):
        pixels = np.full(shape, step, np.uint8)
        header = FramesChunk(request_id, attempt, 0, 1, 1, 6, 8, kind="preview", step=step)
        self._rank.send(header, payload=pixels.data)

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 what is waited for comes from a socket
                await asyncio.sleep(0.002)

    @property
    def inbox(self):
        return self.mesh._inboxes["a"]

    async def rest(self):
        self._fake.release()
        async with asyncio.timeout(PATIENCE_S):
            return [event async for event in self.events]


@pytest.fixture
def play(fake, sockets):
    def play(scene, **asked):
        async def main():
            async with asyncio.timeout(3 * PATIENCE_S), Stage(fake, sockets, **asked) as stage:
                await scene(stage)

        asyncio.run(main())

    return play


def test_the_newest_preview_is_what_a_slow_consumer_gets(play, fake):
    async def scene(stage):
        for step in (1, 2, 3):
            stage.send(step)
        await stage.until(lambda: stage.inbox.preview_step == 3)
        preview = await anext(stage.events)
        assert isinstance(preview, Preview)
        assert (preview.step, preview.pixels.shape, preview.pixels.min()) == (3, (6, 8, 3), 3)
        stage.send(4)
        assert (await anext(stage.events)).step == 4
        rest = await stage.rest()
        assert not any(isinstance(event, Preview) for event in rest)
        assert sum(event.count for event in rest if isinstance(event, Frames)) == stage.request.params.num_frames
        assert isinstance(rest[-1], Completed)
        assert fake.credits == fake.most_credits == FRAME_CREDITS, "a preview gives no credit back"

    play(scene)


def test_previews_that_are_late_old_broken_or_of_nobody_are_dropped(play):
    async def scene(stage):
        stage.send(2)
        assert (await anext(stage.events)).step == 2
        stage.send(2)
        stage.send(1)
        stage.send(3, shape=(1, 6, 7, 3))
        stage.send(3, request_id="b")
        await stage.until(lambda: stage.mesh.dropped_chunks == 4)
        stage.inbox.attempt = 1
        stage.send(3)
        await stage.until(lambda: stage.mesh.dropped_chunks == 5)
        stage.send(3, attempt=1)
        assert (await anext(stage.events)).step == 3

    play(scene)


def test_no_preview_follows_a_frame(play):
    async def scene(stage):
        stage.inbox.next_frame = 1
        stage.send(2)
        await stage.until(lambda: stage.mesh.dropped_chunks == 1)
        stage.inbox.next_frame = 0

    play(scene)


def test_a_request_says_how_many_it_wants(play, fake):
    async def scene(stage):
        assert stage.request.previews == 3
        previews = [event.step for event in await stage.rest() if isinstance(event, Preview)]
        assert previews
        assert set(previews) <= {1, 2, 3}

    play(scene, previews=3)
    assert [step for _, _, step in fake.previews] == [1, 2, 3]


# ---- over HTTP ---------------------------------------------------------------------------------------------------


def previews_of(events):
    return [data for _, name, data in events if name == "preview"]


def test_events_tell_previews_as_jpegs_before_the_frames(gateway, fake):
    fake.held = {"denoise:1", "denoise:2", "denoise:3"}
    video_id = gateway.create(previews=3)
    events = []
    with gateway.follow(video_id) as following:
        for step in (1, 2, 3):
            while len(previews_of(events)) < step:
                events.append(next(following))
            fake.release(f"denoise:{step}")
        events += list(following)
    assert [data["step"] for data in previews_of(events)] == [1, 2, 3]
    assert names(events).index("frames") > max(i for i, name in enumerate(names(events)) if name == "preview")
    video = gateway.video(video_id)
    for data in previews_of(events):
        picture = Image.open(io.BytesIO(base64.b64decode(data["jpeg"])))
        assert picture.format == "JPEG"
        assert picture.size == (data["width"], data["height"])
        assert f"{picture.width}x{picture.height}" == video["size"]
        np.testing.assert_allclose(np.asarray(picture), preview_brightness(data["step"]), atol=3)
    assert fake.credits == fake.most_credits == FRAME_CREDITS, "previews cost no credit"


def test_a_reader_that_comes_late_gets_the_newest_preview_only(gateway, fake):
    fake.held = {"denoise:1", "denoise:2", "denoise:3"}
    video_id = gateway.create(previews=3)
    with gateway.follow(video_id) as following:
        seen = []
        for step in (1, 2, 3):
            while len(previews_of(seen)) < step:
                seen.append(next(following))
            if step < 3:
                fake.release(f"denoise:{step}")
        with gateway.follow(video_id) as late:
            told = []
            while not previews_of(told):
                told.append(next(late))
    assert [data["step"] for data in previews_of(told)] == [3]
    fake.release()
    gateway.wait(video_id)


def test_without_being_asked_for_there_is_none(gateway, fake):
    video_id = gateway.create()
    assert "preview" not in names(gateway.events(video_id))
    assert fake.submitted[-1].previews == 0
    assert fake.previews == []


@pytest.mark.parametrize("wrong", [-1, 21, True, "many"])
def test_a_wrong_number_of_previews_is_refused_by_name(gateway, fake, wrong):
    answer = gateway.http.post("/v1/videos", json={"prompt": "a cat", "previews": wrong})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "previews"
    assert not fake.submitted


def test_a_job_that_is_resumed_still_wants_its_previews(start, fake):
    first = start()
    fake.held = {"denoise:1"}
    video_id = first.create(previews=2)
    fake.wait_for("denoise:1")
    first.close()
    second = start()
    fake.release()
    second.wait(video_id)
    assert {request.previews for request in fake.submitted if request.id == video_id} == {2}


def test_the_log_forgets_superseded_previews_and_keeps_the_count():
    async def main():
        log = EventLog()
        for step in (1, 2, 3):
            await log.publish("preview", {"step": step})
            await log.publish("step", {"step": step})
        await log.publish("done", {})
        assert [(event.id, event.name) async for event in log.follow()] == [
            (2, "step"), (4, "step"), (5, "preview"), (6, "step"), (7, "done")
        ]  # fmt: skip
        assert [event.id async for event in log.follow(4)] == [5, 6, 7]
        assert log.ended

    asyncio.run(main())


def test_a_large_preview_is_bounded_and_keeps_its_shape():
    pixels = np.zeros((90, 160, 3), np.uint8)
    wide, tall = preview_still(pixels, 1280, 720), preview_still(pixels, 64, 96)
    assert (wide.width, wide.height) == (PREVIEW_SIDE, PREVIEW_SIDE * 9 // 16)
    assert (tall.width, tall.height) == (64, 96)
    with contextlib.closing(Image.open(io.BytesIO(wide.file))) as picture:
        assert picture.size == (wide.width, wide.height)
