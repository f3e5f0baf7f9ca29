"""A generation as small as the model can make, to see whether the whole path works. Charged to nobody, kept nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass

from gateway.catalog import Model
from gateway.families import PROBE_ACCOUNT
from gateway.media.stills import jpeg
from gateway.mesh import Frames
from runtime.errors import InvalidInput, NotReady, RequestFailed
from runtime.log import get_logger
from runtime.models.card import Card
from runtime.sampling import ResolvedParams, SamplingParams, Terms

PROBE_S = 20.0
SIDE = 64
"""Pixels: the smallest side that is tried, and the step to the next one."""
ROWS_PER_RANK = 32
"""Pixels that each of several ranks should have of a picture that they share."""
PROMPT = "a red circle"

log = get_logger("probe")


@dataclass(frozen=True)
class Outcome:
    """How a probe ended."""

    failure: str
    """Why there was no picture; empty if there was one."""
    seconds: float


class Probe:
    """At most one probe of a model runs, whoever asks; all that ask meanwhile hear how that one ended."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[Outcome]] = {}

    async def run(self, model: Model) -> Outcome:
        """A caller that leaves does not end it."""
        task = self._running.get(model.name)
        if task is None:
            task = self._running[model.name] = asyncio.create_task(_probe(model), name=f"probe of {model.name}")
            task.add_done_callback(lambda _: self._running.pop(model.name))
        return await asyncio.shield(task)

    async def close(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _probe(model: Model) -> Outcome:
    began, failure = time.monotonic(), ""
    try:
        async with asyncio.timeout(PROBE_S):
            await _generate(model)
    except TimeoutError:
        failure = f"no picture after {PROBE_S:.0f} s"
    except (NotReady, RequestFailed) as error:
        failure = str(error)
    except Exception:
        log.exception("a probe broke", model=model.name)
        failure = "the gateway failed; its log says more"
    return Outcome(failure, round(time.monotonic() - began, 3))


async def _generate(model: Model) -> None:
    """One step, one frame, every stage."""
    loaded = model.mesh.model
    params = smallest(model.card, loaded.layout.num_ranks if loaded is not None else 1)
    name = f"probe-{secrets.token_hex(8)}"
    request = await asyncio.to_thread(model.mesh.request, name, params, Terms(key=PROBE_ACCOUNT))
    async with contextlib.aclosing(model.mesh.run(request)) as events:
        async for event in events:
            if isinstance(event, Frames):
                await asyncio.to_thread(jpeg, event.pixels[0])


def smallest(card: Card, num_ranks: int) -> ResolvedParams:
    """One step of a picture that is as small as the family allows and the ranks can share."""
    default = card.check(SamplingParams(prompt=PROMPT, seed=0, num_frames=1, num_inference_steps=1))
    least = max(SIDE, -(-ROWS_PER_RANK * num_ranks // SIDE) * SIDE)
    for side in range(least, min(default.width, default.height), SIDE):
        with contextlib.suppress(InvalidInput):
            return card.check(
                SamplingParams(prompt=PROMPT, seed=0, num_frames=1, num_inference_steps=1, height=side, width=side)
            )
    return default
