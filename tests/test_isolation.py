"""A request comes out the same alone, in a batch that others join and leave, and next to a cancelled one: by items
that the test writes, and as the scheduler of a real mesh plans it."""

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from ranks_batch import WANTED
from safetensors.torch import load_file
from tiny_wan import DEMO

from framemesh import Completed, Frames, Progress, SamplingParams
from gateway.mesh import Mesh
from runtime.trace import read_trace

PATIENCE_S = 60.0
PROMPT = "a red circle moving right"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_company_changes_nothing(tmp_path, num_ranks):
    run_ranks(num_ranks, "ranks_batch.py", str(DEMO), str(tmp_path))
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(num_ranks)]
    for tensors in ranks:
        for name in WANTED:
            alone, batch = (tensors[f"{place}/{name}/latents"] for place in ("alone", "batch"))
            assert (alone - batch).abs().max() <= 1e-4, f"{name} came out different in company"
            frames = [tensors[f"{place}/{name}/frames"].int() for place in ("alone", "batch")]
            assert (frames[0] - frames[1]).abs().max() <= 1
        # The same batch composition is the same to the bit, whatever ran before.
        assert torch.equal(tensors["alone/long/latents"], tensors["again/long/latents"])
        assert torch.equal(tensors["alone/long/frames"], tensors["again/long/frames"])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ranks[0][name]), f"ranks differ in {name}"
    different = (ranks[0]["alone/long/latents"] - ranks[0]["alone/late/latents"]).abs().max()
    assert different > 1e-2, "the comparison would not notice a mix-up"


# ---- as the scheduler plans it -----------------------------------------------------------------------------------


def sampling(seed, steps, **changed):
    """Requests of these may share forwards whatever their seeds and steps are."""
    small = {"prompt": PROMPT, "guidance_scale": 3.0, "height": 64, "width": 64, "num_frames": 5}
    return SamplingParams(**(small | {"seed": seed, "num_inference_steps": steps} | changed))


class Visitor:
    """A gateway of the test's own at the session's mesh: it knows the ids, and what was submitted with what."""

    def __init__(self, generator, connection):
        self.generator = generator
        self.connection = connection
        self.frames = {}
        self.steps = {}
        self.tasks = {}

    def start(self, **wanted):
        """Submit what is given, id by id, in one message."""
        for request_id, params in wanted.items():
            request = self.connection.request(request_id, self.generator.check(params))
            self.tasks[request_id] = asyncio.create_task(self._run(request))

    async def _run(self, request):
        chunks = []
        async for event in self.connection.run(request):
            match event:
                case Progress(stage="denoise"):
                    self.steps[request.id] = event.step
                case Frames():
                    chunks.append(event.pixels.copy())
                case Completed():
                    self.frames[request.id] = np.concatenate(chunks)

    async def at_step(self, request_id, step):
        while self.steps.get(request_id, -1) < step:
            assert not self.tasks[request_id].done(), f"{request_id} ended before step {step}"
            await asyncio.sleep(0.002)

    async def made(self, *request_ids):
        await asyncio.gather(*(self.tasks[request_id] for request_id in request_ids))
        return [self.frames[request_id] for request_id in request_ids]

    async def cancel(self, request_id):
        self.tasks[request_id].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.tasks[request_id]


def visit(generator, sockets, script):
    """Play a script with a visitor, and return what it returns."""

    async def play():
        connection = Mesh(generator.scheduler_endpoint, f"ipc://{sockets}/frames", batching_delay_s=0.02)
        try:
            await connection.start()
            await connection.wait_ready(PATIENCE_S)
            await connection.wait_model()
            async with asyncio.timeout(PATIENCE_S):
                return await script(Visitor(generator, connection))
        finally:
            await connection.close()

    return asyncio.run(play())


def forwards(generator, *request_ids):
    """{id: step that it began at} of every denoise item that one of these was in, in order."""
    lines = read_trace(Path(generator.config.trace_path))
    denoised = [line.requests for line in lines if line.kind == "Denoise" and line.rank == 0]
    return [requests for requests in denoised if requests.keys() & set(request_ids)]


def shared_at_other_steps(generator, one, other):
    return [requests for requests in forwards(generator, one) if other in requests and requests[one] != requests[other]]


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_requests_that_the_scheduler_batches_come_out_as_alone(mesh, sockets):
    """Others join at other steps, one of them is cancelled, another shape runs in between."""
    wanted = {"long": sampling(1, 160), "short": sampling(2, 12, guidance_scale=5.0), "late": sampling(3, 16)}

    async def script(visitor):
        alone = {}
        for name, params in wanted.items():
            visitor.start(**{f"alone-{name}": params})
            (alone[name],) = await visitor.made(f"alone-{name}")
        visitor.start(long=wanted["long"])
        await visitor.at_step("long", 1)
        visitor.start(short=wanted["short"], gone=sampling(4, 1000))
        await visitor.at_step("gone", 1)
        await visitor.cancel("gone")
        # Together: whichever goes first, the long one has not run on by itself when the late one comes.
        visitor.start(other=sampling(5, 6, height=48, width=80), late=wanted["late"])
        await visitor.made("other")
        return alone, dict(zip(wanted, await visitor.made(*wanted), strict=True))

    alone, company = visit(mesh, sockets, script)
    for one, other in (("long", "short"), ("long", "late"), ("long", "gone")):
        assert shared_at_other_steps(mesh, one, other), f"{one} and {other} never shared a forward"
    assert all(len(requests) == 1 for requests in forwards(mesh, "other", *(f"alone-{name}" for name in wanted)))
    in_turn = ["other" if "other" in requests else "long" for requests in forwards(mesh, "long", "other")]
    assert in_turn[0] == in_turn[-1] == "long", "the other shape did not run in between"
    assert "other" in in_turn
    for name in wanted:
        assert difference(alone[name], company[name]) <= 1, f"{name} came out different in company"
    assert difference(alone["short"], alone["late"]) > 20, "the comparison would not notice a mix-up"


def test_the_same_batch_twice_is_the_same_to_the_bit(mesh, sockets):
    async def script(visitor):
        made = []
        for turn in ("first", "second"):
            ids = f"{turn}-a", f"{turn}-b"
            visitor.start(**{ids[0]: sampling(6, 20), ids[1]: sampling(7, 20, prompt="a star")})
            made.append(await visitor.made(*ids))
            visitor.start(**{f"{turn}-between": sampling(8, 3, height=48)})
            await visitor.made(f"{turn}-between")
        return made

    first, second = visit(mesh, sockets, script)
    for turn in ("first", "second"):
        batches = forwards(mesh, f"{turn}-a", f"{turn}-b")
        assert all(list(requests) == [f"{turn}-a", f"{turn}-b"] for requests in batches), batches
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)
    assert difference(*first) > 20


def test_a_deterministic_request_is_the_same_to_the_bit_under_load(mesh, sockets):
    """Requests that could share its forwards share those of each other; company of several sizes changes no byte."""

    async def script(visitor):
        made = []
        for turn, crowd in enumerate((0, 2, 5)):
            others = {f"{turn}-other{number}": sampling(20 + number, 100) for number in range(crowd)}
            visitor.start(**others)
            if others:
                await visitor.at_step(f"{turn}-other0", 1)
            visitor.start(**{f"{turn}-own": sampling(9, 10, deterministic=True)})
            made += await visitor.made(f"{turn}-own")
            assert not any(visitor.tasks[other].done() for other in others), "it had no company"
            await visitor.made(*others)
        return made

    made = visit(mesh, sockets, script)
    for turn in range(3):
        assert all(len(requests) == 1 for requests in forwards(mesh, f"{turn}-own"))
    assert any(len(requests) > 2 for requests in forwards(mesh, "2-other0")), "nobody shared a forward"
    assert all(np.array_equal(frames, made[0]) for frames in made)
