"""GET /v1/videos/{id}/content?variant=… over the real server: small pictures of a finished video."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from fake_mesh import moving_frames
from PIL import Image

from gateway import variants
from gateway.media.stills import fit, sprite_sheet

PATIENCE_S = 20


def ask(gateway, video_id, variant):
    with httpx2.Client(timeout=PATIENCE_S) as client:
        return client.get(f"{gateway.url}/v1/videos/{video_id}/content", params={"variant": variant})


def pixels(answer):
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int)


def finished(gateway, **changes):
    video_id = gateway.create(**changes)
    gateway.wait(video_id)
    return video_id


def test_a_thumbnail_is_a_small_webp_of_the_middle(gateway, fake):
    video_id = finished(gateway)
    answer = ask(gateway, video_id, "thumbnail")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert f'filename="{video_id}.thumbnail.webp"' in answer.headers["content-disposition"]
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
    frames = moving_frames(fake.submitted[0].params).astype(int)
    distances = [abs(pixels(answer) - frame).mean() for frame in frames]
    assert np.argmin(distances) == 8
    assert distances[8] < 4


def test_a_sheet_shows_the_first_and_the_last_frame_among_sixteen(gateway, fake):
    answer = ask(gateway, finished(gateway), "spritesheet")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    sheet, frames = pixels(answer), moving_frames(fake.submitted[0].params).astype(int)
    assert sheet.shape == (256, 256, 3)
    assert abs(sheet[:64, :64] - frames[0]).mean() < 4
    assert abs(sheet[192:, 192:] - frames[16]).mean() < 4
    assert abs(sheet[192:, 192:] - frames[14]).mean() > 4, "the test could not tell two frames apart"


def test_a_sheet_of_few_frames_has_as_many_tiles(gateway):
    assert pixels(ask(gateway, finished(gateway, num_frames=5), "spritesheet")).shape == (128, 256, 3)
    assert pixels(ask(gateway, finished(gateway, num_frames=1), "spritesheet")).shape == (64, 64, 3)


def test_tiles_lie_in_rows():
    tiles = [np.full((2, 3, 3), 10 * number, np.uint8) for number in range(1, 6)]
    sheet = sprite_sheet(tiles, 3)
    assert sheet[::2, ::3, 0].tolist() == [[10, 20, 30], [40, 50, 0]]


@pytest.mark.parametrize(("shape", "small"), [((480, 832), (295, 512)), ((2000, 4), (512, 1)), ((64, 64), (64, 64))])
def test_large_frames_are_shrunk_and_small_ones_stay(shape, small):
    assert fit(np.zeros((*shape, 3), np.uint8), 512).shape == (*small, 3)


def test_many_who_ask_at_once_have_it_made_once_and_a_leaver_takes_nothing_away(gateway, monkeypatch):
    video_id, made, asked, go_on = finished(gateway), [], [], threading.Event()
    real_make, real_get = variants.Variants._make, variants.Variants.get

    def make(*args):
        made.append(args)
        assert go_on.wait(PATIENCE_S)
        real_make(*args)

    async def get(*args):
        asked.append(args)
        if len(asked) == 21:
            go_on.set()
        return await real_get(*args)

    monkeypatch.setattr(variants.Variants, "_make", make)
    monkeypatch.setattr(variants.Variants, "get", get)
    with pytest.raises(httpx2.ReadTimeout), httpx2.Client(timeout=0.5) as client:
        client.get(f"{gateway.url}/v1/videos/{video_id}/content", params={"variant": "thumbnail"})
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda _: ask(gateway, video_id, "thumbnail"), range(20)))
    assert len({(answer.status_code, answer.content) for answer in answers}) == 1
    assert answers[0].status_code == 200
    assert ask(gateway, video_id, "thumbnail").content == answers[0].content
    assert len(made) == 1
    assert {path.name for path in gateway.videos.iterdir()} == {f"{video_id}.mp4", f"{video_id}.thumbnail.webp"}
    assert not gateway.runner.outputs.derived(video_id, "spritesheet.jpg").exists()


def test_one_that_failed_is_made_by_the_next_who_asks(gateway, monkeypatch):
    video_id = finished(gateway)
    video = gateway.videos / f"{video_id}.mp4"
    video.rename(video.with_suffix(".away"))
    answer = ask(gateway, video_id, "spritesheet")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    video.with_suffix(".away").rename(video)
    assert ask(gateway, video_id, "spritesheet").status_code == 200


def test_before_the_end_there_is_none(gateway, fake):
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    answer = ask(gateway, video_id, "thumbnail")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_not_ready")
    fake.release()


def test_an_unknown_variant_is_told_the_right_ones(gateway):
    answer = ask(gateway, finished(gateway, num_frames=1), "poster")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "variant"
    assert all(word in error["message"] for word in ("video", "thumbnail", "spritesheet"))
