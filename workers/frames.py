"""Decoded frames on their way to the gateway: a bounded queue and a thread that sends, so that compute never does."""

from __future__ import annotations

import queue
import threading

import torch

from runtime.errors import InvalidInput, PeerGone
from runtime.log import get_logger
from runtime.protocol import FramesChunk, ToScheduler
from runtime.wire import Channel

QUEUED_CHUNKS = 16
"""Bound of the queue. Gateways grant chunks in advance, so it fills only if somebody breaks the rules."""

log = get_logger("frames")


class FrameSender:
    """Owns one socket per gateway endpoint; they live and die in its thread."""

    def __init__(self, identity: bytes) -> None:
        self._identity = identity
        self._queue: queue.Queue[tuple[str, FramesChunk, torch.Tensor] | None] = queue.Queue(QUEUED_CHUNKS)
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)
        self._thread.start()

    def send(self, endpoint: str, header: FramesChunk, pixels: torch.Tensor) -> None:
        """Queue one chunk; waits only when the queue is full."""
        self._queue.put((endpoint, header, pixels))

    def close(self) -> None:
        """Send what is queued, then end."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        channels: dict[str, Channel[FramesChunk, ToScheduler]] = {}
        while (entry := self._queue.get()) is not None:
            endpoint, header, pixels = entry
            try:
                if endpoint not in channels:
                    channels[endpoint] = Channel.connect(endpoint, ToScheduler, self._identity)
                channels[endpoint].send(header, payload=pixels.cpu().numpy().data)
            except (PeerGone, InvalidInput) as error:
                log.warning("frames not sent", endpoint=endpoint, request=header.request_id, error=str(error))
        for channel in channels.values():
            channel.close(linger_s=2.0)
