"""Pictures of requests that are not finished, and the colours that latents stand for. Knows no sockets.

The colour of a latent pixel is taken to be linear in its channels. The map is fitted to what this VAE decodes: at
warm-up to smooth random latents, which are never forgotten: twenty videos of one colour say nothing of the others.
Later to finished requests, the latest most. It belongs to the VAE and to no request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from runtime.log import get_logger
from runtime.models.card import Card
from runtime.protocol import FramesChunk, PreviewTo, Request
from runtime.sampling import ResolvedParams
from workers.device import to_host
from workers.foresight import foresight_of
from workers.frames import FrameSender
from workers.models.family import Family
from workers.state import RequestState

KEPT = 0.95
"""What a request leaves of the weight of all requests before it: together they never weigh more than twenty."""
FIRST = 3.0
"""What the sample of the warm-up weighs, for ever."""
RIDGE = 1e-3
"""Holds down channels that never varied; latents have a variance of about 1."""
SMOOTH = 4
"""Latent pixels from one random value to the next in the latents of the warm-up."""
GREY = 128

log = get_logger("previews")


class LatentColours:
    """The least-squares map from the channels of a latent pixel to RGB, by running normal equations: bounded."""

    def __init__(self) -> None:
        self.samples = 0
        self._first: NDArray[np.float64] | None = None
        """Normal equations, (n, n + 3), of the first sample; `_latest` has those of all others."""
        self._latest: NDArray[np.float64] | float = 0.0
        self._weights: NDArray[Any] | None = None

    def learn(self, latents: NDArray[np.float32], frame: NDArray[np.uint8]) -> None:
        """(channels, h, w) decode to (height, width, 3) RGB; what is not finite teaches nothing."""
        if not np.isfinite(latents).all():
            return
        inputs, colours = _with_bias(latents), _shrunk(frame, *latents.shape[1:]).reshape(-1, 3)
        equations = inputs.T @ np.hstack([inputs, colours]) / len(inputs)
        if self._first is None:
            self._first = FIRST * equations
        else:
            self._latest = KEPT * self._latest + equations
        gram, moments = np.hsplit(self._first + self._latest, [len(equations)])
        self._weights = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), moments)
        self.samples += 1

    def picture(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(channels, h, w) -> (h, w, 3) RGB; grey while nothing was learnt."""
        shape = (*latents.shape[1:], 3)
        if self._weights is None:
            return np.full(shape, GREY, np.uint8)
        colours = _with_bias(np.nan_to_num(latents)) @ self._weights
        return colours.clip(0, 255).round().astype(np.uint8).reshape(shape)


class Previews:
    """What a rank shows of its requests before they have frames. A solver that nobody can read gives none."""

    def __init__(self, family: Family, card: Card, sender: FrameSender) -> None:
        self.foresight = foresight_of(family.solver)
        self.colours = LatentColours()
        self._family = family
        self._card = card
        self._sender = sender
        if self.foresight is None:
            name = type(family.solver).__name__
            log.warning("no previews with this solver: nobody has written down where it is heading", solver=name)

    def warm_up(self, params: ResolvedParams) -> None:
        """Decode a still clip from smooth random latents and learn its last colours; every rank does it alone.

        A VAE that looks back decodes the same latents to other colours in its first frames, so a few should go before.
        """
        with torch.inference_mode():
            like = torch.zeros(self._card.latent_shape(params), device=self._family.device)
            grid = _smooth_noise(self._family.to_grid(like, params))
            state = RequestState(Request("preview-colours", params), self._family.from_grid(grid), None, {})
            *_, frames = self._family.decode(state)
        self.colours.learn(grid[:, -1].cpu().numpy(), frames[-1].cpu().numpy())

    def show(self, state: RequestState, to: PreviewTo) -> None:
        """Send a picture of where the request is heading. Waits for nothing; it is left out where frames wait."""
        assert state.foreseen is not None
        latents = _middle(self._family.to_grid(state.foreseen, state.params))
        copied, (height, width) = to_host(latents), latents.shape[1:]
        header = FramesChunk(to.request_id, to.attempt, 0, 1, 1, height, width, kind="preview", step=state.step)
        self._sender.offer(to.endpoint, header, lambda: self.colours.picture(copied.wait()))

    def learn(self, state: RequestState, chunk: int, frames: torch.Tensor) -> None:
        """Take the middle latent frame and what its chunk was decoded to, (n, height, width, 3), as a sample."""
        grid = self._family.to_grid(state.latents, state.params)
        one_each = len(self._card.decode_chunks(state.params)) == grid.shape[1]
        if one_each and chunk == grid.shape[1] // 2:
            latents, frame = to_host(_middle(grid)), to_host(frames[len(frames) // 2])
            self._sender.later(lambda: self.colours.learn(latents.wait(), frame.wait()))


def _middle(grid: torch.Tensor) -> torch.Tensor:
    """(C, T, h, w) -> (C, h, w), fp32 and nobody else's."""
    return grid[:, grid.shape[1] // 2].float().clone()


def _smooth_noise(like: torch.Tensor) -> torch.Tensor:
    """(C, T, h, w) with a variance of 1: changes slowly from pixel to pixel, and not in time; the same every time."""
    channels, _, height, width = like.shape
    coarse = (1, channels, -(-height // SMOOTH) + 1, -(-width // SMOOTH) + 1)
    noise = torch.randn(coarse, generator=torch.Generator("cpu").manual_seed(0))
    fine = F.interpolate(noise, size=(height, width), mode="bicubic")
    return (fine / fine.std()).transpose(0, 1).expand_as(like).to(like)


def _with_bias(latents: NDArray[np.float32]) -> NDArray[np.float64]:
    """(channels, h, w) -> (h * w, channels + 1)."""
    rows = latents.reshape(len(latents), -1).T.astype(np.float64)
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def _shrunk(frame: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.float64]:
    """(height, width, 3) -> (rows, columns, 3), each the mean of the pixels that it stands for."""
    image = Image.fromarray(np.ascontiguousarray(frame)).resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64)
