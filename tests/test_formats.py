"""Videos in the format that was asked for, made of the frames while they come, over the real server."""

import base64
import io
import json
import zipfile

import av
import numpy as np
import pytest
import structlog
from fake_mesh import moving_frames
from PIL import Image

from gateway.jobs import outputs
from gateway.media.formats import CUBE, SUFFIXES, open_writer
from gateway.media.frames import each_frame

OTHERS = ("webm", "gif", "png")
MEDIA_TYPES = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif", "png": "application/zip"}
FPS = 24
PROMPT = "the secret of the blue vase"


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


def colours(count, height=48, width=64):
    """Frames of a smooth picture whose colours drift far away from those of the first frame."""
    rows, columns = np.mgrid[:height, :width]
    shift = np.linspace(0, 1, count)[:, None, None]
    red, green = 255 * rows / height * (1 - shift), 255 * columns / width + 0 * shift
    return np.stack([red, green, 255 * shift + 0 * red], -1).clip(0, 255).astype(np.uint8)


def write(path, kind, frames, metadata=None, sizes=(1, 4, 4)):
    _, height, width, _ = frames.shape
    writer = open_writer(kind, path, width, height, FPS, metadata)
    for size in (*sizes, len(frames)):
        writer.write(frames[:size])
        frames = frames[size:]
    writer.finish()
    writer.close()
    return path


def blurred(frame):
    """What the eye makes of dithering."""
    return np.asarray(Image.fromarray(frame).resize((16, 12), Image.Resampling.BOX)).astype(int)


def download(gateway, **changes):
    video_id = gateway.create(**changes)
    gateway.wait(video_id)
    return gateway.http.get(f"/v1/videos/{video_id}/content")


def picture(gateway, kind):
    body = {"prompt": PROMPT, "output_format": kind, "num_inference_steps": 1}
    answer = gateway.http.post("/v1/images/generations", json=body).raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


@pytest.mark.parametrize("metadata", [True, False])
def test_results_say_how_they_were_made_unless_they_are_not_to(start, metadata):
    gateway = start(metadata=metadata)
    files = {kind: picture(gateway, kind) for kind in ("png", "webp", "jpeg")}
    for kind in SUFFIXES:
        files[f"video {kind}"] = download(gateway, prompt=PROMPT, num_frames=1, output_format=kind).content
    assert {kind: PROMPT.encode() in file for kind, file in files.items()} == dict.fromkeys(files, metadata)


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_video_comes_in_the_format_that_was_asked_for(gateway, fake, tmp_path, kind):
    video_id = gateway.create(output_format=kind)
    assert gateway.wait(video_id)["output_format"] == kind
    answer = gateway.http.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPES[kind])
    name = f"{video_id}{SUFFIXES[kind]}"
    assert f'filename="{name}"' in answer.headers["content-disposition"]
    assert [path.name for path in gateway.videos.iterdir()] == [name]
    (tmp_path / name).write_bytes(answer.content)
    frames = np.stack(list(each_frame(tmp_path / name))).astype(int)
    wanted = moving_frames(fake.submitted[0].params).astype(int)
    assert frames.shape == wanted.shape
    assert abs(frames - wanted).mean() < (1 if kind in {"png", "gif"} else 4)
    told = gateway.events(video_id, frames="jpeg")
    stills = [still for _, name, data in told if name == "frames" for still in data["jpeg"]]
    shown = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(still)))) for still in stills])
    assert abs(shown.astype(int) - wanted).mean() < 6
    sheet = gateway.http.get(f"/v1/videos/{video_id}/content", params={"variant": "spritesheet"})
    assert Image.open(io.BytesIO(sheet.content)).size == (256, 256)
    assert gateway.http.delete(f"/v1/videos/{video_id}").json()["deleted"]
    assert list(gateway.videos.iterdir()) == []


def test_so_it_does_to_who_waits_for_it(gateway):
    body = {"prompt": PROMPT, "num_inference_steps": 1, "num_frames": 5, "output_format": "gif"}
    answer = gateway.http.post("/v1/videos/sync", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/gif")
    assert Image.open(io.BytesIO(answer.content)).n_frames == 5


def test_a_remix_keeps_the_format_unless_another_is_named(gateway):
    source = gateway.create(output_format="webm", num_frames=1)
    url = f"/v1/videos/{source}/remix"
    assert gateway.http.post(url, json={"prompt": "a"}).json()["output_format"] == "webm"
    assert gateway.http.post(url, json={"prompt": "a", "output_format": "mp4"}).json()["output_format"] == "mp4"


@pytest.mark.parametrize(
    ("body", "field"), [({"output_format": "avi"}, "output_format"), ({"output_format": "gif", "fps": 60}, "fps")]
)
def test_a_format_that_there_is_not_is_named(gateway, body, field):
    answer = gateway.http.post("/v1/videos", json={"prompt": "a", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_the_stream_is_an_mp4_while_it_is_made_and_afterwards_says_where_the_video_is(gateway, fake):
    fake.held = {"decode:3"}
    video_id = gateway.create(output_format="webm")
    fake.wait_for("decode:3")
    with gateway.http.stream("GET", f"/v1/videos/{video_id}/stream.mp4") as response:
        fake.release()
        data = response.read()
    with av.open(io.BytesIO(data)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17
    gateway.wait(video_id)
    answer = gateway.http.get(f"/v1/videos/{video_id}/stream.mp4")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_not_mp4")
    assert f"/v1/videos/{video_id}/content" in answer.json()["error"]["message"]


def test_frames_that_are_made_again_are_there_once(gateway, fake):
    fake.held = {"decode:2"}
    video_id = gateway.create(output_format="png")
    fake.wait_for("decode:2")
    fake.lose_worker()
    fake.release()
    gateway.wait(video_id)
    content = gateway.http.get(f"/v1/videos/{video_id}/content").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"frame_{number:05d}.png" for number in range(17)]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_job_that_fails_leaves_nothing_in_any_format(gateway, fake):
    fake.failures = {"decode:3": ("worker_lost", "rank 0 is gone")}
    for kind in OTHERS:
        gateway.wait(gateway.create(output_format=kind), "failed")
    assert list(gateway.videos.iterdir()) == []


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_full_disk_fails_the_job_and_says_so(gateway, fake, monkeypatch, tmp_path, kind):
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    fake.held = {"denoise:1"}
    video_id = gateway.create(output_format=kind)
    fake.wait_for("denoise:1")
    with monkeypatch.context() as patch:
        if kind == "mp4":
            (gateway.videos / f"{video_id}.fragments.mp4").symlink_to(full)
        patch.setattr(outputs, "open_writer", lambda kind, path, *rest: open_writer(kind, full, *rest))
        fake.release()
        error = gateway.wait(video_id, "failed")["error"]
    assert error["code"] == "storage_failed"
    assert error["message"] == "the video could not be stored: No space left on device"
    assert fake.stored == []
    assert list(gateway.videos.iterdir()) == []
    gateway.wait(gateway.create(output_format=kind))


@pytest.mark.parametrize("kind", OTHERS)
def test_frames_of_any_colour_come_through(tmp_path, kind):
    frames = colours(20)
    path = write(tmp_path / f"video{SUFFIXES[kind]}", kind, frames, {"prompt": PROMPT})
    read = list(each_frame(path))
    assert len(read) == 20
    worst = max(abs(blurred(now) - blurred(before)).mean() for now, before in zip(read, frames, strict=True))
    assert worst < {"webm": 5, "gif": 8, "png": 0.1}[kind]


def test_a_gif_loops_in_time_and_stores_what_changed(tmp_path):
    frames = np.full((25, 128, 128, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:16, 4 * number : 4 * number + 8] = 250
    frames[13:16] = frames[12]
    path = write(tmp_path / "video.gif", "gif", frames, {"prompt": PROMPT})
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (25, 0)
        assert json.loads(image.info["comment"]) == {"prompt": PROMPT}
        durations = []
        for number in range(25):
            image.seek(number)
            durations.append(image.info["duration"])
    assert set(durations) == {40, 50}
    assert abs(sum(durations) - 1000 * 25 / FPS) <= 10
    whole = write(tmp_path / "one.gif", "gif", frames[:1]).stat().st_size
    assert path.stat().st_size < whole + 24 * 400


def test_a_gif_of_fewer_frames_than_its_colours_are_taken_from(tmp_path):
    assert len(list(each_frame(write(tmp_path / "short.gif", "gif", colours(2))))) == 2
    assert len(CUBE) == 3 * 64


@pytest.mark.parametrize("kind", OTHERS)
def test_a_writer_holds_no_more_than_a_few_frames(tmp_path, kind):
    path = tmp_path / f"video{SUFFIXES[kind]}"
    writer = open_writer(kind, path, 256, 256, FPS, None)
    noise, sizes = np.random.default_rng(0), []
    for _ in range(12):
        writer.write(noise.integers(0, 256, (8, 256, 256, 3), np.uint8))
        sizes.append(path.stat().st_size)
    writer.finish()
    assert sizes[-1] > 0.8 * path.stat().st_size
    assert sizes[5] > 0.3 * path.stat().st_size
