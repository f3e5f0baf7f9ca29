"""Runs one work item over a batch of RequestStates: encode, denoise, decode. Knows no scheduler and no sockets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch

from runtime.errors import FramemeshError
from runtime.layout import Layout, layout_for
from runtime.models.card import Card
from runtime.protocol import Checkpoint, Decode, Denoise, Encode, FramesChunk, Release, WorkItem
from runtime.traffic import JOINT_TOKENS
from workers.device import settle
from workers.models.family import Family
from workers.parallel.cfg import branches_of, gather_branches
from workers.parallel.comm import ALONE, Group
from workers.parallel.groups import Groups
from workers.parallel.sequence import SequenceParallel
from workers.previews import Previews
from workers.spool import Spool
from workers.state import RequestState

SendFrames = Callable[[str, FramesChunk, torch.Tensor], None]
"""(gateway endpoint, header, uint8 pixels)."""


class Executor:
    """The states of the requests on this rank, and the modules that work on them."""

    def __init__(
        self,
        family: Family,
        card: Card,
        sequence: SequenceParallel,
        groups: Mapping[Layout, Groups],
        send_frames: SendFrames,
    ) -> None:
        self.states: dict[str, RequestState] = {}
        self.spool: Spool | None = None
        """Where checkpoints go; set once the model is warm."""
        self.previews: Previews | None = None
        """Likewise what shows unfinished requests."""
        self.in_collectives = False
        """After an error: other ranks may wait for this one, in a collective of the item that has not ended."""
        self.sharded = False
        """Encoders work together with other ranks, in every forward: weights are gathered, or layers shared."""
        self.decode_group: Group = ALONE
        """With whom this rank decodes when an item names several ranks."""
        self.joint_tokens = JOINT_TOKENS
        """Guidance branches share a forward up to this many tokens in all."""
        self._family = family
        self._card = card
        self._sequence = sequence
        self._groups = groups
        self._send_frames = send_frames

    def run(self, item: WorkItem) -> None:
        """Carry out one item; may raise anything that a model can raise.

        After an error the states that the item names may be half done; no other state was touched.
        """
        self.in_collectives = False
        with torch.inference_mode():
            match item:
                case Encode():
                    self._encode(item)
                case Denoise():
                    self._denoise(item)
                case Decode():
                    self._decode(item)
                case Checkpoint():
                    assert self.spool is not None
                    for request_id in item.request_ids:
                        self.spool.save(self.states[request_id])
                case Release():
                    for request_id in item.request_ids:
                        self.states.pop(request_id, None)
                    if self.spool is not None and not item.keep_saved:
                        self.spool.release(item.request_ids)

    def _encode(self, item: Encode) -> None:
        since = time.monotonic()
        with self._collectives(self.sharded):
            embeddings = self._family.encode(item.requests)
            settle(self._family.device)
        states: dict[str, RequestState] = {}
        for request, embedding in zip(item.requests, embeddings, strict=True):
            generator = torch.Generator("cpu").manual_seed(request.params.seed)
            state = self._family.prepare(request, embedding, generator)
            state.generator = generator
            if request.id in item.resume:
                assert self.spool is not None
                self.spool.resume(state, item.resume[request.id])
            state.spend("encode", since)
            states[request.id] = state
        # All or none: a checkpoint that does not fit leaves nothing half begun behind.
        self.states |= states

    def _denoise(self, item: Denoise) -> None:
        since = time.monotonic()
        states = [self.states[request_id] for request_id in item.request_ids]
        for left in range(item.steps, 0, -1):
            with self._showing(item) if left == 1 else nullcontext():
                self.step(states, item.layout, last=left == 1)
        # Collectives too have only been queued: whoever does not come is noticed here.
        with self._collectives(len(item.ranks) > 1):
            settle(self._family.device)
        for state in states:
            state.spend("denoise", since)

    @contextmanager
    def _showing(self, item: Denoise) -> Iterator[None]:
        """What the step inside foresees goes to whom the item names, sent by the first of its ranks."""
        if self.previews is None or self._groups[item.layout].replica.rank > 0:
            yield
            return
        shown = [(self.states[to.request_id], to) for to in item.previews]
        for state, _ in shown:
            state.foresight = self.previews.foresight
        yield
        for state, to in shown:
            if state.foreseen is not None:
                self.previews.show(state, to)
            state.foresight = state.foreseen = None

    def step(self, states: list[RequestState], layout: Layout, *, last: bool = True) -> None:
        """One denoising step of a batch: inputs -> forward -> guidance and solver, each request on its own schedule.

        Args:
            states: of requests that share a batch key.
            layout: of the item's ranks.
            last: no step of the same item follows.
        """
        branches = self._card.branches(states[0].params, states[0].step)
        # A step may need fewer branches than the item's layout has groups for them.
        groups = self._groups[layout_for(layout, len(branches), self._card)]
        mine: dict[str, torch.Tensor] = {}
        with self._sequence.over(groups):
            for together in self._forwards(states, branches_of(branches, groups.cfg), groups):
                inputs = self._family.inputs(states, together)
                with self._collectives(True, last=False):
                    output = self._family.denoiser(**inputs)[0]
                mine |= dict(zip(together, output.split(len(states)), strict=True))
        with self._collectives(groups.cfg.size > 1, last=last):
            predictions = gather_branches(mine, branches, groups.cfg)
        for row, state in enumerate(states):
            self._family.advance(state, {branch: rows[row : row + 1] for branch, rows in predictions.items()})

    @contextmanager
    def _collectives(self, takes_part: bool, *, last: bool = True) -> Iterator[None]:
        """What runs inside may wait for other ranks, and they for this one.

        The mark stays until the item's last collective: whoever fails alone between two leaves the others in the next.
        """
        self.in_collectives |= takes_part
        yield
        self.in_collectives &= not last

    def _forwards(self, states: list[RequestState], branches: tuple[str, ...], groups: Groups) -> list[tuple[str, ...]]:
        """Which branches share a forward; decided from sizes alone, so that every rank and every run agree.

        With guidance groups each branch runs alone, as it does without them above the limit: equal to the bit.
        """
        tokens = self._card.tokens(states[0].params) * len(states) * len(branches)
        together = groups.cfg.size == 1 and tokens <= self.joint_tokens
        return [branches] if together else [(branch,) for branch in branches]

    def _decode(self, item: Decode) -> None:
        state = self.states[item.request_id]
        group = self.decode_group if len(item.ranks) > 1 else ALONE
        decoder = self._open_decoder(state, item.first_chunk, group)
        end = item.first_chunk + item.chunks
        for chunk in range(item.first_chunk, end):
            since = time.monotonic()
            with self._collectives(group.size > 1, last=chunk == end - 1):
                frames = next(decoder)
                settle(self._family.device)
            state.spend("decode", since)
            count, height, width, _ = frames.shape
            header = FramesChunk(
                item.request_id,
                item.attempt,
                state.frames_sent,
                count,
                state.params.num_frames,
                height,
                width,
                state.timings,
            )
            state.frames_sent += count
            if state.frames_sent == state.params.num_frames:
                # The VAE's cache is most of what a request holds, and nobody needs it any more.
                state.decoder = None
            if group.rank == 0:
                self._send_frames(item.endpoint, header, frames)
                if self.previews is not None:
                    self.previews.learn(state, chunk, frames)

    def _open_decoder(self, state: RequestState, first_chunk: int, group: Group) -> Iterator[torch.Tensor]:
        """A decoder that comes to `first_chunk` next: a new one for 0, else the one that is open."""
        if first_chunk == 0:
            # Before the new one: the old one's cache is most of what a request holds.
            state.decoder = None
            state.frames_sent = 0
            state.decoder = self._family.decode(state, group)
        due = sum(self._card.decode_chunks(state.params)[:first_chunk])
        if state.decoder is None or state.frames_sent != due:
            raise FramemeshError(
                f"the decode of {state.request.id} cannot go on at frame {due}: "
                + ("none is open" if state.decoder is None else f"it is at frame {state.frames_sent}")
            )
        return state.decoder
