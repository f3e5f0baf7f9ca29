"""Every call of the official OpenAI SDK that concerns images, videos and models, against one server.

`python sdk_calls.py URL` runs them all with whichever SDK can be imported, and prints a JSON object: the SDK's version,
and for each call "" or what was wrong. Each must work unmodified on both SDK lines.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import sys
import traceback
import warnings
from collections.abc import Callable

import openai
import pytest
from openai import OpenAI
from PIL import Image

QUICK = {"num_inference_steps": 3, "seed": 7}
SHORT = QUICK | {"num_frames": 5}
PROMPT = "a red circle moving right"
CALLS: dict[str, Callable[[OpenAI], None]] = {}


def call(work: Callable[[OpenAI], None]) -> Callable[[OpenAI], None]:
    """Registers one call under its function's name."""
    CALLS[work.__name__] = work
    return work


def picture(size: int = 64) -> bytes:
    sink = io.BytesIO()
    Image.new("RGBA", (size, size), (200, 40, 40, 255)).save(sink, "PNG")
    return sink.getvalue()


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


@call
def models_list(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


@call
def models_retrieve(client: OpenAI) -> None:
    model = client.models.retrieve("demo")
    assert (model.id, model.object) == ("demo", "model")


@call
def models_retrieve_unknown(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.request_id


@call
def images_generate(client: OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, model="demo", size="64x64", n=2, extra_body=QUICK)
    assert len(answer.data) == 2
    assert opened(answer.data[0].b64_json).size == (64, 64)
    assert [image.seed for image in answer.data] == [7, 8]


@call
def images_generate_url(client: OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, response_format="url", output_format="webp", extra_body=QUICK)
    assert "/v1/images/" in answer.data[0].url


@call
def images_generate_defaults_that_ask_for_nothing(client: OpenAI) -> None:
    words = {"quality": "auto", "background": "auto", "moderation": "auto", "size": "auto", "user": "someone"}
    assert client.images.generate(prompt=PROMPT, **words, extra_body=QUICK).data[0].b64_json


@call
def images_generate_stream(client: OpenAI) -> None:
    with client.images.generate(
        prompt=PROMPT, size="64x64", stream=True, partial_images=2, extra_body=QUICK | {"num_inference_steps": 6}
    ) as stream:
        events = list(stream)
    assert events[-1].type == "image_generation.completed"
    assert opened(events[-1].b64_json).size == (64, 64)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert 1 <= len(partial) <= 2
    assert all(opened(event.b64_json).size == (64, 64) for event in partial)


@call
def images_generate_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, quality="hd", extra_body=QUICK)
    assert refused.value.param == "quality"


@call
def images_edit(client: OpenAI) -> None:
    _refused("image_input_not_supported", lambda: client.images.edit(image=picture(), prompt=PROMPT))


@call
def images_edit_several(client: OpenAI) -> None:
    pictures = [picture(), picture()]
    _refused("image_input_not_supported", lambda: client.images.edit(image=pictures, prompt=PROMPT, n=1))


@call
def images_edit_mask(client: OpenAI) -> None:
    _refused("image_input_not_supported", lambda: client.images.edit(image=picture(), mask=picture(), prompt=PROMPT))


@call
def images_edit_stream(client: OpenAI) -> None:
    _refused(
        "image_input_not_supported",
        lambda: list(client.images.edit(image=picture(), prompt=PROMPT, stream=True, partial_images=1)),
    )


@call
def videos_create_and_poll(client: OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, size="64x64", model="demo", extra_body=SHORT)
    assert (video.status, video.progress, video.object) == ("completed", 100, "video"), video
    assert video.seed == 7


@call
def videos_create_retrieve_delete(client: OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body=SHORT)
    assert video.status in {"queued", "in_progress"}
    assert client.videos.retrieve(video.id).id == video.id
    assert client.videos.poll(video.id).status == "completed"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.videos.retrieve(video.id)
    assert gone.value.code == "video_not_found"


@call
def videos_list(client: OpenAI) -> None:
    mine = [client.videos.create(prompt=PROMPT, extra_body=SHORT).id for _ in range(3)]
    page = client.videos.list(limit=2)
    assert [video.id for video in page.data] == mine[:0:-1]
    assert page.has_more
    everything = [video.id for video in client.videos.list(limit=2)]
    assert everything[:3] == mine[::-1], "the pages do not join"
    assert len(set(everything)) == len(everything)
    assert [video.id for video in client.videos.list(limit=100, order="asc")] == everything[::-1]


@call
def videos_download_content(client: OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=SHORT)
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).format == "WEBP"
    sheet = client.videos.download_content(video.id, variant="spritesheet").read()
    assert Image.open(io.BytesIO(sheet)).format == "JPEG"


@call
def videos_download_too_early(client: OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body=SHORT | {"num_inference_steps": 200})
    _refused("video_not_ready", lambda: client.videos.download_content(video.id))
    client.post(f"/videos/{video.id}/cancel", cast_to=object)
    assert client.videos.retrieve(video.id).status == "cancelled"


@call
def videos_remix(client: OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=SHORT)
    remix = client.videos.remix(video.id, prompt="a blue circle moving right")
    assert remix.remixed_from_video_id == video.id
    done = client.videos.poll(remix.id)
    assert (done.status, done.seed, done.num_frames) == ("completed", 7, 5)


@call
def videos_create_with_a_reference(client: OpenAI) -> None:
    _refused("image_input_not_supported", lambda: client.videos.create(prompt=PROMPT, input_reference=picture()))


@call
def videos_edit_and_extend(client: OpenAI) -> None:
    """Only the newer line has them."""
    for name in ("edit", "extend"):
        if hasattr(client.videos, name):
            arguments = {"seconds": "4"} if name == "extend" else {}
            work = functools.partial(getattr(client.videos, name), video=b"video", prompt=PROMPT, **arguments)
            _refused("video_input_not_supported", work)


def _refused(code: str, work: Callable[[], object]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        work()
    assert refused.value.code == code


def main(url: str) -> None:
    results = {}
    with warnings.catch_warnings(), OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client:
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, work in CALLS.items():
            try:
                work(client)
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps({"version": openai.__version__, "results": results}))


if __name__ == "__main__":
    main(sys.argv[1])
