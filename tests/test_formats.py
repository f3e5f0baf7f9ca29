"""Videos in the format that was asked for, made of the frames while they come, over the real server."""

import base64

import pytest

PROMPT = "the secret of the blue vase"


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
    files["mp4"] = download(gateway, prompt=PROMPT, num_frames=1).content
    assert {kind: PROMPT.encode() in file for kind, file in files.items()} == dict.fromkeys(files, metadata)
