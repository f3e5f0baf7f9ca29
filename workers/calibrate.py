"""Warm-up that measures: a few small items per rank, in the same order on all of them. Knows no scheduler.

It brings communicators and kernels to life before the first request, and gives the cost model its constants.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import torch

from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.models.card import Card
from runtime.protocol import Denoise, Encode, Measurement, Release, Request
from runtime.sampling import ResolvedParams, SamplingParams
from workers.executor import Executor
from workers.models.family import Family

BATCHES = (1, 4)
WARM_STEPS, TIMED_STEPS = 1, 3
PROMPT = "a calibration prompt of about ten words, to be forgotten"


def measure(executor: Executor, family: Family, card: Card, layout: Layout) -> tuple[Measurement, ...]:
    """Seconds per unit for two small shapes at two batch sizes. Every rank of the mesh has to call it."""
    everyone = tuple(range(layout.num_ranks))
    measurements: list[Measurement] = []
    for params in _shapes(card):
        for batch in BATCHES:
            requests = tuple(Request(f"calibrate-{index}", params) for index in range(batch))
            ids = tuple(request.id for request in requests)
            seconds = _timed(executor, Encode(0, everyone, requests))
            if batch == 1:
                # Of several, equal texts are encoded once: what each would take alone cannot be told.
                measurements.append(Measurement("encode", params, 1, seconds))
            executor.run(Denoise(0, everyone, layout, ids, WARM_STEPS))
            seconds = _timed(executor, Denoise(0, everyone, layout, ids, TIMED_STEPS))
            measurements.append(Measurement("denoise", params, batch, seconds / TIMED_STEPS))
            if batch == 1:
                measurements += _decode(executor, family, params, ids[0])
            executor.run(Release(0, everyone, ids))
    # The first encode pays for the encoder's own warm-up.
    return tuple(measurements[1:])


def _shapes(card: Card) -> Iterator[ResolvedParams]:
    """The default picture size with one frame, and with a few: small enough for any model to be quick.

    An image model has one frame only; its second shape is a smaller picture.
    """
    default = card.check(SamplingParams(prompt=PROMPT, seed=0, num_inference_steps=WARM_STEPS + TIMED_STEPS))
    few = min(card.frames_for(0.5, 16), default.num_frames)
    yield msgspec.structs.replace(default, num_frames=1)
    yield msgspec.structs.replace(default, num_frames=few) if few > 1 else _half(card, default)


def _half(card: Card, params: ResolvedParams) -> ResolvedParams:
    """A picture of half the height, or the same if the model cannot make that."""
    try:
        return card.check(
            SamplingParams(
                prompt=PROMPT, seed=0, num_inference_steps=params.num_inference_steps, height=params.height // 2
            )
        )
    except InvalidInput:
        return params


def _decode(executor: Executor, family: Family, params: ResolvedParams, request_id: str) -> list[Measurement]:
    """Seconds of the first chunk and mean seconds of the others; sends no frames."""
    with torch.inference_mode():
        marks = [time.monotonic()]
        for chunk in family.decode(executor.states[request_id], executor.decode_group):
            chunk.cpu()
            marks.append(time.monotonic())
    first, others = marks[1] - marks[0], len(marks) - 2
    rest = [Measurement("decode", params, 1, (marks[-1] - marks[1]) / others)] if others else []
    return [Measurement("first_decode", params, 1, first), *rest]


def _timed(executor: Executor, item: Encode | Denoise) -> float:
    started = time.monotonic()
    executor.run(item)
    return time.monotonic() - started
