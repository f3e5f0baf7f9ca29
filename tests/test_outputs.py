"""Where results lie and for how long: a folder, and a real S3 server that comes and goes."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import boto3
import httpx2
import pytest
import structlog
from fake_mesh import MODEL_FOLDER, moving_frames
from moto.server import ThreadedMotoServer
from PIL import Image
from served import BODY, eventually, names

from gateway.app import create_app
from gateway.catalog import Catalog
from gateway.jobs import bucket as bucket_module
from gateway.jobs import sweeper as sweeper_module
from gateway.jobs.bucket import Bucket, StorageFailed, Stored
from gateway.jobs.outputs import Outputs
from gateway.jobs.store import JobStore
from gateway.media.mp4 import read_frames
from runtime.config import Config, check_config, save_frozen
from runtime.errors import InvalidInput, StartFailed

ROOT = Path(__file__).parent.parent
FRAMES = 17
HOUR = 3600.0
STORE = "s3://results/of/tests"


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


class S3:
    """A server with the bucket `results`; what it holds survives a stop, its port too."""

    def __init__(self) -> None:
        self._port = 0
        self._server: ThreadedMotoServer | None = None

    def start(self) -> None:
        if self._server is None:
            self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
            self._server.start()
            self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def clear(self) -> None:
        httpx2.post(f"{self.endpoint}/moto-api/reset").raise_for_status()
        self.client = boto3.client(
            "s3", "us-east-1", endpoint_url=self.endpoint, aws_access_key_id="testing", aws_secret_access_key="testing"
        )
        self.client.create_bucket(Bucket="results")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def get(self, name: str) -> bytes | None:
        try:
            return self.client.get_object(Bucket="results", Key=f"of/tests/{name}")["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket="results", Key=f"of/tests/{name}", Body=content)


@pytest.fixture(scope="module")
def s3_server():
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    s3_server.start()
    s3_server.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return s3_server


@pytest.fixture
def sweeping(monkeypatch):
    """Sweepers that never rest; call the result to wait until one went over everything there is now."""
    monkeypatch.setattr(sweeper_module, "SWEEP_EVERY_S", 0.02)
    monkeypatch.setattr(sweeper_module, "LIST_EVERY_S", 0.0)

    def swept(gateway) -> None:
        # Two of them: a sweep that was under way may have passed the place of the first already.
        for number in range(2):
            mark = gateway.videos / f"video_{number}.fragments.mp4"
            write(mark, age_h=2)
            eventually(lambda mark=mark: not mark.exists())

    return swept


def write(path: Path, content: bytes = b"old", age_h: float = 0.0) -> Path:
    path.write_bytes(content)
    os.utime(path, (time.time() - HOUR * age_h,) * 2)
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def check_ranges(gateway, url: str, content: bytes) -> None:
    """Whole and in parts, from wherever the file lies."""
    size = len(content)
    whole = gateway.http.get(url)
    assert (whole.status_code, whole.content) == (200, content)
    assert (whole.headers["accept-ranges"], whole.headers["content-length"]) == ("bytes", str(size))
    parts = {
        "bytes=0-99": (0, 100),
        "bytes=100-": (100, size),
        "bytes=-10": (size - 10, size),
        f"bytes=10-{size + 5}": (10, size),
    }
    for wanted, (first, end) in parts.items():
        answer = gateway.http.get(url, headers={"range": wanted})
        assert (answer.status_code, answer.content) == (206, content[first:end]), wanted
        assert int(answer.headers["content-length"]) == end - first
        assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{size}"
    for wanted in (f"bytes={size}-", "bytes=9-3", "bytes=-0"):
        answer = gateway.http.get(url, headers={"range": wanted})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
    for wanted in (
        "bytes=0-1,5-6",
        "lines=1-2",
        "bytes=-",
        "bytes=a-b",
        f"bytes=-{size + 5}",
        "nonsense",
        f"bytes=0-{'9' * 5000}",
    ):
        answer = gateway.http.get(url, headers={"range": wanted})
        assert (answer.status_code, answer.content) == (200, content), wanted
    for header, status in {whole.headers["etag"]: 206, whole.headers["last-modified"]: 206, '"other"': 200}.items():
        assert gateway.http.get(url, headers={"range": "bytes=0-9", "if-range": header}).status_code == status


# ---- a folder ----------------------------------------------------------------------------------------------------


def test_a_file_in_the_folder_is_served_whole_and_in_parts(gateway):
    video_id = gateway.create()
    gateway.wait(video_id)
    content = (gateway.videos / f"{video_id}.mp4").read_bytes()
    check_ranges(gateway, f"/v1/videos/{video_id}/content", content)


def test_what_is_derived_from_a_video_goes_with_it(gateway):
    video_id, other = gateway.create(), gateway.create(num_frames=1)
    gateway.wait(video_id)
    gateway.wait(other)
    outputs = gateway.runner.outputs
    outputs.derived(video_id, "thumbnail.webp").write_bytes(b"small")
    outputs.derived(video_id, "spritesheet.jpg").write_bytes(b"many")
    kept = outputs.derived(other, "thumbnail.webp")
    kept.write_bytes(b"small")
    assert kept.name == f"{other}.thumbnail.webp"
    assert gateway.http.delete(f"/v1/videos/{video_id}").json()["deleted"]
    assert files(gateway.videos) == {f"{other}.mp4", kept.name}


@pytest.mark.parametrize("name", ["../a.webp", "a/b.webp", "fragments.mp4", "A.webp", "", "webp", "a.b.webp"])
def test_no_name_leaves_the_folder(tmp_path, name):
    outputs = Outputs(tmp_path)
    with pytest.raises(ValueError, match="derived"):
        outputs.derived("video_00", name)
    for video_id in ("../video_00", "video_00/../../x", "image_00", ""):
        with pytest.raises(ValueError, match="video id"):
            outputs.derived(video_id, "thumbnail.webp")
    with pytest.raises(ValueError, match="image id"):
        asyncio.run(outputs.keep_image("../image_00", ".png", b""))
    assert asyncio.run(outputs.image("../image_00")) is None


def test_options_that_mean_nothing_are_refused(tmp_path):
    for wrong, field in [
        ({"output_store": "bucket/prefix"}, "output_store"),
        ({"output_store": "s3://"}, "output_store"),
        ({"output_store": "s3://key:secret@bucket/a"}, "output_store"),
        ({"output_store": "https://bucket.s3.amazonaws.com"}, "output_store"),
        ({"keep_results_hours": -1.0}, "keep_results_hours"),
        ({"keep_results_hours": float("nan")}, "keep_results_hours"),
    ]:
        with pytest.raises(InvalidInput) as refused:
            check_config(Config(**wrong))
        assert refused.value.field == field
    check_config(Config(output_store=STORE, output_redirect=True, keep_results_hours=0.5))
    with pytest.raises(InvalidInput, match="no effect without output_store"):
        create_app(Config(output_redirect=True), Catalog([]), JobStore(f"sqlite:///{tmp_path}/jobs"))


# ---- a bucket ----------------------------------------------------------------------------------------------------


def test_a_finished_video_lies_in_the_bucket_and_is_served_from_there(start, s3, tmp_path):
    gateway = start(output_store=STORE)
    video_id = gateway.create()
    video = gateway.wait(video_id)
    url = f"/v1/videos/{video_id}/content"
    stored = s3.get(f"videos/{video_id}.mp4")
    assert stored
    assert files(gateway.videos) == set(), "the local copy went"

    check_ranges(gateway, url, stored)
    whole = gateway.http.get(url)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["content-disposition"] == f'inline; filename="{video_id}.mp4"'

    pictures = [picture for _, name, data in gateway.events(video_id, frames="jpeg") if name == "frames"
                for picture in data["jpeg"]]  # fmt: skip
    assert len(pictures) == FRAMES
    width, height = Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size
    assert f"{width}x{height}" == video["size"]

    gateway.runner.outputs.derived(video_id, "thumbnail.webp").write_bytes(b"small")
    assert files(tmp_path / "cache") == {f"{video_id}.mp4"}
    gateway.http.delete(f"/v1/videos/{video_id}").raise_for_status()
    assert s3.get(f"videos/{video_id}.mp4") is None
    assert files(gateway.videos) | files(tmp_path / "cache") == set()


def test_clients_are_sent_to_the_bucket_if_the_operator_wants_it(start, s3):
    gateway = start(output_store=STORE, output_redirect=True)
    video_id = gateway.create(num_frames=1)
    gateway.wait(video_id)
    answer = gateway.http.get(f"/v1/videos/{video_id}/content")
    assert answer.status_code == 302
    assert answer.headers["location"].startswith(f"{s3.endpoint}/results/of/tests/videos/{video_id}.mp4?")
    assert "X-Amz-Signature" in answer.headers["location"]
    with httpx2.Client() as elsewhere:
        fetched = elsewhere.get(answer.headers["location"], headers={"range": "bytes=4-7"})
    assert (fetched.status_code, fetched.content) == (206, b"ftyp")


def test_images_by_url_lie_in_the_bucket_too(start, s3, tmp_path):
    gateway = start(output_store=STORE)
    body = {"prompt": "a", "num_inference_steps": 2, "response_format": "url", "output_format": "webp"}
    made = gateway.http.post("/v1/images/generations", json=body).raise_for_status().json()["data"][0]
    stored = s3.get(f"images/{made['id']}.webp")
    answer = gateway.http.get(made["url"])
    assert answer.content == stored
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(stored)).format == "WEBP"
    assert files(tmp_path / "images") == set()
    missing = gateway.http.get("/v1/images/image_00/content")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "image_not_found")


def test_large_files_go_up_in_parts(s3, tmp_path):
    path = tmp_path / "large.mp4"
    content = os.urandom(bucket_module.PART_BYTES * 2 + 1000)
    path.write_bytes(content)

    async def main() -> tuple[Stored | None, bytes]:
        store = Bucket(STORE)
        await store.put("videos/large.mp4", path, "video/mp4")
        stored = await store.head("videos/large.mp4")
        assert stored is not None
        return stored, b"".join([part async for part in store.read(stored.name, 0, stored.size)])

    stored, read = asyncio.run(main())
    assert read == content
    assert stored.etag.endswith('-3"'), "S3 counts the parts in the etag"
    described = s3.client.head_object(Bucket="results", Key="of/tests/videos/large.mp4")
    assert described["ContentType"] == "video/mp4"


def test_a_file_that_was_uploaded_before_the_end_was_noted_is_not_made_again(start, s3, fake):
    fake.held = {"deliver"}
    first = start(output_store=STORE)
    video_id = first.create()
    eventually(lambda: fake.stored == [video_id])
    assert s3.get(f"videos/{video_id}.mp4")
    assert first.video(video_id)["status"] == "in_progress"
    first.close()

    second = start(output_store=STORE)
    assert second.video(video_id)["status"] == "completed"
    assert second.http.get(f"/v1/videos/{video_id}/content").content == s3.get(f"videos/{video_id}.mp4")
    assert len(fake.submitted) == 1


def test_a_file_that_was_finished_but_not_uploaded_is_uploaded(start, s3, fake):
    fake.held = {"denoise:1"}
    first = start(output_store=STORE)
    video_id = first.create()
    fake.wait_for("denoise:1")
    first.close()
    (first.videos / f"{video_id}.mp4").write_bytes(b"whole")
    second = start(output_store=STORE)
    assert second.video(video_id)["status"] == "completed"
    assert second.http.get(f"/v1/videos/{video_id}/content").content == b"whole"
    assert s3.get(f"videos/{video_id}.mp4") == b"whole"
    assert files(second.videos) == set()


def test_variants_are_made_of_what_lies_in_the_bucket(start, s3):
    gateway = start(output_store=STORE)
    video_id = gateway.create(num_frames=5)
    gateway.wait(video_id)
    url = f"/v1/videos/{video_id}/content"
    thumbnail = gateway.http.get(url, params={"variant": "thumbnail"})
    assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/webp")
    assert files(gateway.videos) == {f"{video_id}.thumbnail.webp"}
    s3.client.delete_object(Bucket="results", Key=f"of/tests/videos/{video_id}.mp4")
    (gateway.videos.parent / "cache" / f"{video_id}.mp4").unlink()
    assert gateway.http.get(url, params={"variant": "thumbnail"}).content == thumbnail.content
    answer = gateway.http.get(url, params={"variant": "spritesheet"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    s3.stop()
    answer = gateway.http.get(url, params={"variant": "spritesheet"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")


def test_a_bucket_that_is_gone_for_some_time_costs_time_only(start, s3, fake, logs):
    gateway = start(output_store=STORE)
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    s3.stop()
    fake.release()
    eventually(lambda: any(entry["event"] == "an upload failed" for entry in logs))
    assert gateway.video(video_id)["status"] == "in_progress"
    assert fake.stored == [], "the mesh keeps what it needs to decode again"
    s3.start()
    gateway.wait(video_id)
    (gateway.videos / "here.mp4").write_bytes(s3.get(f"videos/{video_id}.mp4"))
    frames = read_frames(gateway.videos / "here.mp4")
    assert abs(frames.astype(int) - moving_frames(fake.submitted[0].params)).mean() < 4


def test_a_bucket_that_stays_away_fails_the_job_with_the_reason(start, s3, fake, monkeypatch):
    monkeypatch.setattr(bucket_module, "PATIENCE_S", 0.5)
    gateway = start(output_store=STORE)
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    s3.stop()
    fake.release()
    error = gateway.wait(video_id, "failed")["error"]
    assert error["code"] == "storage_failed"
    assert "object store" in error["message"]
    assert s3.endpoint not in error["message"]
    eventually(lambda: fake.cancelled == [video_id])
    assert files(gateway.videos) == set()


def test_while_the_bucket_is_away_clients_are_told_to_come_back_and_cancel_is_quick(start, s3, fake):
    gateway = start(output_store=STORE)
    done = gateway.create(num_frames=1)
    gateway.wait(done)
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    s3.stop()
    answer = gateway.http.get(f"/v1/videos/{done}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
    assert answer.headers["retry-after"]
    told = gateway.events(done, frames="jpeg")
    assert names(told)[-1] == "done"
    fake.release()
    eventually(lambda: gateway.video(video_id)["progress"] == 99)
    began = time.monotonic()
    assert gateway.http.post(f"/v1/videos/{video_id}/cancel").json()["status"] == "cancelled"
    assert time.monotonic() - began < 3


def test_a_bucket_that_does_not_exist_stops_the_start_in_one_line(s3, fake, tmp_path):
    config_file = tmp_path / "config.json"
    save_frozen(Config(output_path=str(tmp_path / "out"), port=0, output_store="s3://elsewhere/a"), config_file)
    command = [sys.executable, "-P", "-m", "gateway", "--config", str(config_file), "--model-folder", str(MODEL_FOLDER)]
    command += ["--scheduler", fake.endpoint, "--frames", f"ipc://{fake.folder}/frames"]
    (tmp_path / "out").mkdir()
    ran = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.splitlines()[-1] == "error: output_store: there is no bucket for s3://elsewhere/a; make it first"
    assert "Traceback" not in ran.stderr


def test_other_reasons_not_to_start_are_named(s3, monkeypatch):
    s3.stop()
    with pytest.raises(StartFailed, match=r"^output_store: s3://results cannot be written: "):
        asyncio.run(Bucket("s3://results").check())
    with pytest.raises(StorageFailed):
        asyncio.run(Bucket("s3://results").head("videos/a"))
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StartFailed, match=r"pip install 'framemesh\[s3\]'"):
        Bucket("s3://results")


# ---- expiry ------------------------------------------------------------------------------------------------------


def test_results_expire_with_their_files(start, fake, sweeping):
    gateway = start(keep_results_hours=1 / 3600)
    fake.held = {"decode:2"}
    running = gateway.create()
    fake.wait_for("decode:2")
    video_id = gateway.create(num_frames=1)
    [video] = [told for _, name, told in gateway.events(video_id) if name == "done"]
    assert video["expires_at"] == pytest.approx(video["completed_at"], abs=2)
    eventually(lambda: gateway.http.get(f"/v1/videos/{video_id}").status_code == 404)
    answer = gateway.http.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    assert files(gateway.videos) == {f"{running}.fragments.mp4"}
    assert gateway.video(running)["expires_at"] is None


def test_without_a_limit_results_stay(start, sweeping):
    gateway = start()
    video_id = gateway.create(num_frames=1)
    assert gateway.wait(video_id)["expires_at"] is None
    strange = write(gateway.videos / "video_12.mp4", age_h=10_000)
    picture = write(gateway.videos.parent / "images" / "image_12.png", age_h=10_000)
    sweeping(gateway)
    assert gateway.video(video_id)["status"] == "completed"
    assert strange.exists(), "it may have been moved here from another store"
    assert picture.exists()


def test_what_nobody_refers_to_is_swept_and_nothing_else(start, fake, sweeping):
    gateway = start(keep_results_hours=5.0)
    done = gateway.create(num_frames=1)
    gateway.wait(done)
    fake.held = {"decode:2"}
    running = gateway.create()
    fake.wait_for("decode:2")
    growing = gateway.videos / f"{running}.fragments.mp4"
    eventually(growing.exists)
    for path in (growing, gateway.videos / f"{done}.mp4"):
        os.utime(path, (time.time() - 100 * HOUR,) * 2)
    images = gateway.videos.parent / "images"
    kept = [
        growing,
        gateway.videos / f"{done}.mp4",
        write(gateway.videos / "video_aa.fragments.mp4", age_h=0.5),
        write(gateway.videos / "video_ab.mp4", age_h=3),
        write(gateway.videos / "notes.txt", age_h=100),
        write(images / "image_aa.png", age_h=3),
        write(images / "holiday.png", age_h=100),
    ]
    inputs = gateway.videos.parent / "inputs" / "ab"
    inputs.mkdir(parents=True)
    kept.append(write(inputs / "ab1.png", age_h=28))
    gone = [
        write(inputs / "ab2.png", age_h=30),
        write(gateway.videos / "video_ba.fragments.mp4", age_h=2),
        write(gateway.videos / "video_bb.thumbnail.webp", age_h=2),
        write(gateway.videos / "video_bc.mp4", age_h=6),
        write(images / "image_ba.png", age_h=6),
    ]
    sweeping(gateway)
    assert [path.name for path in gone if path.exists()] == []
    assert [path.name for path in kept if not path.exists()] == []
    fake.release()
    assert gateway.wait(running)["status"] == "completed"


def test_the_bucket_is_swept_too(start, s3, fake, sweeping, monkeypatch, tmp_path):
    gateway = start(output_store=STORE, keep_results_hours=1.0)
    done = gateway.create(num_frames=1)
    gateway.wait(done)
    s3.put("videos/video_ba.mp4", b"orphan")
    s3.put("images/image_ba.png", b"old")
    s3.put("videos/notes.txt", b"not ours")
    cached = write(gateway.runner.outputs.local_copy(f"{done}.mp4"), age_h=2)
    sweeping(gateway)
    assert s3.get("videos/video_ba.mp4") == b"orphan"
    assert not cached.exists(), "a copy that nobody used for an hour"

    later = time.time() + 2 * HOUR
    monkeypatch.setattr(sweeper_module.time, "time", lambda: later)
    eventually(lambda: s3.get("videos/video_ba.mp4") is None and s3.get("images/image_ba.png") is None)
    eventually(lambda: gateway.http.get(f"/v1/videos/{done}").status_code == 404)
    eventually(lambda: s3.get(f"videos/{done}.mp4") is None)
    assert s3.get("videos/notes.txt") == b"not ours"


def test_two_sweepers_do_no_harm(start, fake, sweeping):
    first = start(keep_results_hours=1.0)
    ids = [first.create(num_frames=1) for _ in range(4)]
    for video_id in ids:
        first.wait(video_id)
    sweeper = first.app.state.sweeper
    write(first.videos / "video_ba.fragments.mp4", age_h=2)

    async def twice() -> None:
        await asyncio.gather(*(sweeper.sweep(everything=True) for _ in range(2)))

    asyncio.run_coroutine_threadsafe(twice(), first._loop).result(10)
    assert {video["id"] for video in first.http.get("/v1/videos").json()["data"]} == set(ids)
    assert files(first.videos) == {f"{video_id}.mp4" for video_id in ids}


def test_the_body_of_a_video_is_no_place_for_these_options(gateway):
    refused = gateway.http.post("/v1/videos", json=BODY | {"expires_at": 1})
    assert refused.json()["error"]["code"] == "unknown_parameter"
