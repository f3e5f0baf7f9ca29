"""Pixels on their way to the gateway: a bounded queue and a thread that sends, so that compute never does."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import InvalidInput, PeerGone
from runtime.log import get_logger
from runtime.protocol import FramesChunk, ToScheduler
from runtime.wire import Channel
from workers.device import to_host

QUEUED_CHUNKS = 16
"""Bound of the queue. Gateways grant chunks in advance, so frames fill it only if somebody breaks the rules."""
ROOM_FOR_FRAMES = 12
"""Entries that what may be lost leaves to frames."""

log = get_logger("frames")


class FrameSender:
    """Owns one socket per gateway endpoint; they live and die in its thread."""

    def __init__(self, identity: bytes) -> None:
        self._identity = identity
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUED_CHUNKS)
        self._channels: dict[str, Channel[FramesChunk, ToScheduler]] = {}
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)
        self._thread.start()

    def send(self, endpoint: str, header: FramesChunk, pixels: torch.Tensor) -> None:
        """Queue one chunk; waits only when the queue is full."""
        # Copied from here, so that it comes before what this thread queues on the device next.
        self._queue.put(functools.partial(self._deliver, endpoint, header, to_host(pixels).wait))

    def offer(self, endpoint: str, header: FramesChunk, draw: Callable[[], NDArray[np.uint8]]) -> None:
        """Queue a picture that the thread has to make first; it is lost if others wait already."""
        self.later(functools.partial(self._deliver, endpoint, header, draw))

    def later(self, work: Callable[[], None]) -> None:
        """Have the thread do something of no importance; it is left undone if others wait already."""
        if self._queue.qsize() < QUEUED_CHUNKS - ROOM_FOR_FRAMES:
            self._queue.put(work)

    def close(self) -> None:
        """Send what is queued, then end."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:
                # What fails here is lost; frames that miss are missed at the gateway, not here.
                log.exception("lost on the way to a gateway")
        for channel in self._channels.values():
            channel.close(linger_s=2.0)

    def _deliver(self, endpoint: str, header: FramesChunk, draw: Callable[[], NDArray[np.uint8]]) -> None:
        try:
            if endpoint not in self._channels:
                self._channels[endpoint] = Channel.connect(endpoint, ToScheduler, self._identity)
            self._channels[endpoint].send(header, payload=draw().data)
        except (PeerGone, InvalidInput) as error:
            log.warning("not sent", kind=header.kind, endpoint=endpoint, request=header.request_id, error=str(error))
