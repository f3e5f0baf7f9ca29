"""The images of one call: made through a mesh, encoded, told as they come. Knows no HTTP and no store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway.catalog import Model
from gateway.inputs import Kept
from gateway.jobs.runner import MODEL_PATIENCE_S
from gateway.jobs.store import Asked
from gateway.media.metadata import generation_metadata
from gateway.media.stills import FULL_QUALITY, StillFormat, resize, still
from gateway.mesh import Frames, Preview
from gateway.metrics import Metrics
from gateway.owners import owned_id
from gateway.tracing import traced
from gateway.watch import Watch
from runtime.errors import InvalidInput
from runtime.protocol import Completed, Progress, Request, Usage
from runtime.sampling import ResolvedParams, Terms


@dataclass(frozen=True, kw_only=True)
class Commission:
    """What one call wants."""

    model: Model
    params: ResolvedParams
    terms: Terms
    metrics: Metrics
    asked: Asked = field(default_factory=Asked)
    """Whose call it is."""
    n: int = 1
    """How many; their seeds count up."""
    previews: int = 0
    inputs: Kept = field(default_factory=Kept)
    kind: StillFormat = "png"
    quality: int = FULL_QUALITY
    """0 to 100, of WebP and JPEG."""
    metadata: bool = True
    """The pictures say how they were made."""


@dataclass(frozen=True)
class Partial:
    """A preview in the size and format of the picture that it is of."""

    index: int
    """0 for the first one."""
    file: bytes


@dataclass(frozen=True)
class Picture:
    """One finished image."""

    id: str
    file: bytes
    seed: int
    text_tokens: int
    timings: dict[str, float]
    """Seconds per stage."""
    usage: Usage


Told = Progress | Partial | Picture


async def order(commission: Commission) -> Sequence[Request]:
    """The requests for the mesh, one for each image.

    Raises:
        NotReady: the model is not loaded yet, or the mesh drains.
        InvalidInput: the prompt has too many tokens, or the seeds would go beyond the largest one.
    """
    params, mesh = commission.params, commission.model.mesh
    if params.seed + commission.n > 2**63:
        raise InvalidInput("seed", f"{params.seed} leaves no room for {commission.n} images; take a smaller one")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(MODEL_PATIENCE_S):
            await mesh.wait_model()
    first = await asyncio.to_thread(mesh.request, "", params, commission.terms, previews=commission.previews)
    given = commission.inputs
    first = msgspec.structs.replace(first, images=given.images, mask=given.mask, markup=given.markup)
    first = traced(first, commission.asked)
    return [
        msgspec.structs.replace(
            first, id=owned_id("image", first.key), params=msgspec.structs.replace(params, seed=seed)
        )
        for seed in range(params.seed, params.seed + commission.n)
    ]


async def make_all(commission: Commission) -> list[Picture]:
    """All images; if one fails the others are cancelled.

    Raises:
        RequestFailed: of the first that failed.
        NotReady, InvalidInput: as `order`.
    """
    wanted = await order(commission)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_make(commission, request)) for request in wanted]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _make(commission: Commission, request: Request) -> Picture:
    picture = None
    async with contextlib.aclosing(paint(commission, request)) as events:
        async for event in events:
            if isinstance(event, Picture):
                picture = event
    assert picture is not None, "completed without a picture"
    return picture


async def paint(commission: Commission, request: Request) -> AsyncGenerator[Told, None]:
    """One image: progress, previews, and the picture last. Leaving the loop early cancels the request.

    Raises:
        RequestFailed: the mesh gave up on it, or somebody cancelled it.
    """
    pixels, done, partials = None, None, 0
    with Watch(commission.metrics, commission.model.name, request.id, request.traceparent) as seen:
        async with contextlib.aclosing(commission.model.mesh.run(request)) as events:
            async for event in events:
                seen(event)
                match event:
                    case Progress():
                        yield event
                    case Preview():
                        yield Partial(partials, await asyncio.to_thread(_encode_preview, commission, event))
                        partials += 1
                    case Frames():
                        pixels = event.pixels[0]
                    case Completed():
                        done = event
    assert pixels is not None, "completed without a picture"
    assert done is not None, "the mesh ended without a word"
    yield await asyncio.to_thread(_finish, commission, request, pixels, done)


def _finish(commission: Commission, request: Request, pixels: NDArray[np.uint8], done: Completed) -> Picture:
    """The picture as a file; blocks."""
    metadata = generation_metadata(request.params, commission.model.name, done.timings)
    file = still(pixels, commission.kind, metadata if commission.metadata else None, commission.quality)
    return Picture(request.id, file, request.params.seed, _text_tokens(request), done.timings, done.usage)


def _encode_preview(commission: Commission, preview: Preview) -> bytes:
    pixels = resize(preview.pixels, commission.params.width, commission.params.height)
    return still(pixels, commission.kind, None, commission.quality)


def _text_tokens(request: Request) -> int:
    """Of the prompt, as the encoder counts them that reads most of it; 0 where the worker tokenizes."""
    return max((len(prompts.get("prompt", ())) for prompts in request.token_ids.values()), default=0)
