"""The SDK over a real mesh: scheduler, torchrun ranks, sockets. Right frames, in order, undisturbed by others."""

import threading

import numpy as np
import pytest
from tiny_wan import DEMO, load_pipeline, reference

from framemesh import Completed, Frames, InvalidInput, Progress, SamplingParams

PROMPT = "a red circle moving right"


def test_frames_equal_diffusers(mesh):
    result = mesh.generate(PROMPT, seed=11, num_inference_steps=8)
    case = {"prompt": PROMPT, "seed": 11, "height": 64, "width": 64, "num_frames": 17, "steps": 8, "guidance": 3.0}
    pictures = reference(load_pipeline(DEMO), case, "pil")[0]
    expected = np.stack([np.asarray(picture) for picture in pictures])
    assert result.frames.shape == (17, 64, 64, 3)
    assert np.abs(result.frames.astype(int) - expected.astype(int)).max() <= 1
    assert result.metadata["seed"] == 11
    assert set(result.metadata["timings"]) == {"encode", "denoise", "decode"}


def test_what_it_took_is_what_the_ranks_measured(mesh):
    result = mesh.generate(PROMPT, seed=2, num_inference_steps=8)
    usage, timings = result.usage, result.metadata["timings"]
    # Both ranks encode and denoise, one decodes; an item is longer than the compute that rank 0 clocked in it.
    least = 2 * (timings["encode"] + timings["denoise"]) + timings["decode"]
    assert 0.9 * least < usage.rank_seconds < 2 * least + 1.0
    assert (usage.attempts, usage.queue_s >= 0) == (1, True)
    assert 50e6 < usage.peak_memory_bytes < 50e9


def test_frames_arrive_in_order_while_decoding_goes_on(mesh):
    events = list(mesh.stream(SamplingParams(prompt=PROMPT, seed=1, num_inference_steps=6, num_frames=33)))
    frames = [event for event in events if isinstance(event, Frames)]
    assert [event.first for event in frames] == [0, *range(1, 33, 4)]
    assert [event.last for event in frames] == [False] * 8 + [True]
    assert isinstance(events[-1], Completed)
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert sorted(set(stages), key=stages.index) == ["queued", "encode", "denoise", "decode", "deliver"]
    steps = [event.step for event in events if isinstance(event, Progress) and event.stage == "denoise"]
    assert steps == sorted(steps)
    decode_ends = max(i for i, e in enumerate(events) if isinstance(e, Progress) and e.stage == "decode")
    assert events.index(frames[0]) < decode_ends, "no frame arrived before decoding ended"


def test_same_seed_same_bytes_and_another_seed_others(mesh):
    first, second, other = (mesh.generate(PROMPT, seed=seed, num_inference_steps=4).frames for seed in (5, 5, 6))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_requests_that_run_together_do_not_change_each_other(mesh):
    wanted = [
        SamplingParams(prompt=PROMPT, seed=1, num_inference_steps=6),
        SamplingParams(prompt="a blue square", seed=2, num_inference_steps=9, num_frames=9, guidance_scale=1.0),
        SamplingParams(prompt="a star", seed=3, num_inference_steps=5, height=48, width=80, num_frames=9),
    ]
    alone = [mesh.generate(params).frames for params in wanted]
    together: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i, params=params: together.update({i: mesh.generate(params).frames}))
        for i, params in enumerate(wanted)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, frames in enumerate(alone):
        assert np.array_equal(together[i], frames), f"request {i} came out different in company"


def test_leaving_early_cancels_and_disturbs_nobody(mesh):
    expected = mesh.generate(PROMPT, seed=8, num_inference_steps=4).frames
    stream = mesh.stream(SamplingParams(prompt=PROMPT, seed=7, num_inference_steps=1000))
    for event in stream:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step > 0:
            break
    stream.close()
    # With 900 steps still to go it could not be done in time if the first one were still running.
    assert np.array_equal(mesh.generate(PROMPT, seed=8, num_inference_steps=4).frames, expected)


@pytest.mark.parametrize(
    ("sampling", "field", "hint"),
    [
        ({"num_frames": 18}, "num_frames", "17 and 21"),
        ({"height": 65}, "height", "64 and 80"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 1000"),
        ({"fps": -1}, "fps", "1 to 240"),
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": "red circle " * 400}, "prompt", "512"),
        ({"negative_prompt": "red circle " * 400}, "negative_prompt", "512"),
    ],
)
def test_bad_input_names_the_field_and_the_remedy(mesh, sampling, field, hint):
    with pytest.raises(InvalidInput, match=hint) as caught:
        mesh.generate(SamplingParams(**{"prompt": PROMPT, **sampling}))
    assert caught.value.field == field
