"""GET /v1/videos/{id}/stream.mp4 over the real server: frames before the video is done, whole for who comes late."""

import io
import threading

import av
import httpx2
import numpy as np
import pytest
from served import eventually

from gateway.media.mp4 import read_frames


def decoded(data: bytes) -> int:
    """Frames that a player can show of what has come so far."""
    try:
        with av.open(io.BytesIO(data)) as container:
            return sum(1 for _ in container.decode(video=0))
    except av.InvalidDataError:
        return 0


class Reader:
    """A client in a thread of its own, which reads whatever comes."""

    def __init__(self, url):
        self.data, self.status, self.headers, self.error = b"", 0, {}, None
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()

    def _read(self, url):
        try:
            with httpx2.Client(timeout=30) as client, client.stream("GET", url) as response:
                self.status, self.headers = response.status_code, response.headers
                for piece in response.iter_raw():
                    self.data += piece
        except httpx2.TransportError as error:
            self.error = error

    def end(self):
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


@pytest.fixture
def read(gateway):
    """Follow a video's stream."""
    return lambda video_id: Reader(f"{gateway.url}/v1/videos/{video_id}/stream.mp4")


def test_frames_play_before_the_video_is_done(gateway, fake, read, tmp_path):
    fake.held = {"denoise:1", "decode:1", "decode:3"}
    video_id = gateway.create()
    early = read(video_id)
    fake.wait_for("denoise:1")
    assert early.status == 0
    fake.release("denoise:1")
    fake.wait_for("decode:1")
    eventually(lambda: decoded(early.data) == 1)
    assert early.headers["content-type"] == "video/mp4"
    assert early.headers["cache-control"] == "no-store"
    fake.release("decode:1")
    fake.wait_for("decode:3")
    eventually(lambda: decoded(early.data) == 9)
    late = read(video_id)
    eventually(lambda: late.data == early.data)
    fake.release()
    gateway.wait(video_id)
    assert early.end().data == late.end().data
    (tmp_path / "stream.mp4").write_bytes(early.data)
    (tmp_path / "whole.mp4").write_bytes(gateway.http.get(f"/v1/videos/{video_id}/content").content)
    streamed, whole = read_frames(tmp_path / "stream.mp4"), read_frames(tmp_path / "whole.mp4")
    assert streamed.shape == (17, 64, 64, 3)
    assert np.array_equal(streamed, whole)


def test_of_a_finished_job_it_is_the_file(gateway, read):
    video_id = gateway.create()
    gateway.wait(video_id)
    part = gateway.http.get(f"/v1/videos/{video_id}/stream.mp4", headers={"range": "bytes=0-99"})
    whole = gateway.http.get(f"/v1/videos/{video_id}/content").content
    assert (part.status_code, part.content) == (206, whole[:100])
    assert read(video_id).end().data == whole


def test_who_comes_between_the_last_frame_and_the_end_gets_all_of_it(gateway, fake, read):
    fake.held = {"deliver"}
    video_id = gateway.create()
    fake.wait_for("deliver")
    outputs = gateway.runner.outputs
    eventually(lambda: outputs.final(video_id).exists() and not outputs.fragments(video_id).exists())
    reader = read(video_id)
    fake.release()
    assert reader.end().data == gateway.http.get(f"/v1/videos/{video_id}/content").content


def test_the_codec_is_one_that_browsers_play(gateway, read):
    video_id = gateway.create()
    data = read(video_id).end().data
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.profile, context.pix_fmt) == ("h264", "High", "yuv420p")


def test_a_failure_before_the_frames_is_an_error(gateway, fake, read):
    fake.held, fake.failures = {"denoise:1"}, {"denoise:2": ("out_of_memory", "it did not fit")}
    reader = read(gateway.create())
    fake.wait_for("denoise:1")
    fake.release()
    assert reader.end().status == 400
    assert b'"video_failed"' in reader.data
    assert b"it did not fit" in reader.data


def test_a_failure_after_frames_breaks_off(gateway, fake, read):
    fake.held, fake.failures = {"decode:1"}, {"decode:2": ("internal_error", "it broke")}
    reader = read(gateway.create())
    fake.wait_for("decode:1")
    eventually(lambda: decoded(reader.data) == 1)
    fake.release()
    assert isinstance(reader.end().error, httpx2.RemoteProtocolError)


def test_frames_that_are_made_again_are_not_sent_again(gateway, fake, read):
    fake.held = {"decode:2"}
    video_id = gateway.create()
    reader = read(video_id)
    fake.wait_for("decode:2")
    eventually(lambda: decoded(reader.data) == 5)
    fake.lose_worker()
    fake.release()
    gateway.wait(video_id)
    assert decoded(reader.end().data) == 17


@pytest.mark.parametrize("mark", ["denoise:1", "decode:2"])
def test_leaving_cancels_nothing_and_leaves_nothing(gateway, fake, mark):
    gateway.wait(gateway.create())
    before = gateway.tasks()
    fake.held = {mark}
    video_id = gateway.create()
    fake.wait_for(mark)
    with pytest.raises(httpx2.ReadTimeout), httpx2.Client(timeout=0.5) as client:
        client.get(f"{gateway.url}/v1/videos/{video_id}/stream.mp4")
    fake.release()
    assert gateway.wait(video_id)["status"] == "completed"
    assert not fake.cancelled
    eventually(lambda: len(gateway.tasks()) <= len(before))


def test_an_unknown_video_is_404(gateway):
    answer = gateway.http.get("/v1/videos/video_0/stream.mp4")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
