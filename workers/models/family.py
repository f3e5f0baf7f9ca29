"""The contract of a family's torch half. No method knows ranks, sockets or other requests' results.

A family wraps unmodified diffusers and transformers modules. Its card (runtime/models) says what can be known
without weights; this half loads, encodes, prepares, feeds and advances one step, and decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from runtime.config import Config
from runtime.models.card import Card
from runtime.protocol import Request, TokenizerExport
from runtime.sampling import ResolvedParams
from workers.attention.backends import Attend
from workers.models.flux import FluxFamily
from workers.models.loading import Loader
from workers.models.qwen_image import QwenImageFamily
from workers.models.wan import WanFamily
from workers.parallel.comm import ALONE, Group
from workers.parallel.sequence import SequencePlan
from workers.state import RequestState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precisions:
    """Names as in `Config`: fp32, bf16, fp16. A second text encoder that is not named is as the first."""

    dit: str
    vae: str
    text_encoder: str
    text_encoder_2: str

    @staticmethod
    def resolve(config: Config, device: torch.device) -> Precisions:
        """Unset: the denoiser bf16 on CUDA and fp32 on the CPU, the VAE fp32, encoders as the denoiser."""
        dit = config.dit_precision or ("bf16" if device.type == "cuda" else "fp32")
        encoders = config.text_encoder_precisions
        first = encoders[0] if encoders else dit
        return Precisions(dit, config.vae_precision or "fp32", first, encoders[1] if len(encoders) > 1 else first)


class Family(Protocol):
    """The torch half of a model family."""

    device: torch.device
    denoiser: torch.nn.Module
    solver: Any
    """The pipeline's diffusers scheduler; every request works on a copy of its own."""
    sequence_plan: SequencePlan

    @property
    def attention_processor(self) -> Callable[[Attend], Any]:
        """Makes the processors that `sequence_plan.attention` names."""
        ...

    def tokenizers(self) -> tuple[TokenizerExport, ...]:
        """What a gateway needs in order to tokenize for this model."""
        ...

    def encode(self, requests: Sequence[Request]) -> list[dict[str, torch.Tensor]]:
        """Per request its embeddings by guidance branch: (1, text tokens, text dim)."""
        ...

    def prepare(
        self, request: Request, embeddings: dict[str, torch.Tensor], generator: torch.Generator
    ) -> RequestState:
        """Initial noise at full shape from a CPU generator, and a solver of the request's own."""
        ...

    def inputs(self, states: Sequence[RequestState], branches: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of one forward with ``len(branches) * len(states)`` rows, branch by branch."""
        ...

    def advance(self, state: RequestState, predictions: dict[str, torch.Tensor]) -> None:
        """Combine the branches by the pipeline's own formula and take one solver step."""
        ...

    def to_grid(self, latents: torch.Tensor, params: ResolvedParams) -> torch.Tensor:
        """A request's latents as (channels, latent frames, latent height, latent width)."""
        ...

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """The reverse: latents as a request holds them."""
        ...

    def decode(self, state: RequestState, group: Group = ALONE) -> Iterator[torch.Tensor]:
        """uint8 (frames, height, width, 3) on the device, chunk by chunk as `card.decode_chunks` announces.

        Over a group its members take their chunks together, and each of them gets the whole frames.
        """
        ...


LOADERS: dict[str, Callable[[Path, Any, Config, Loader, dict[str, torch.dtype]], Family]] = {
    "flux": FluxFamily.load,
    "qwen_image": QwenImageFamily.load,
    "wan": WanFamily.load,
}
"""`card.family` -> what loads it."""


def load_family(folder: Path, card: Card, config: Config, loader: Loader) -> tuple[Family, Precisions]:
    """The family's modules with their weights on the device, or this rank's share of them."""
    precisions = Precisions.resolve(config, loader.device)
    dtypes = {name: DTYPES[precision] for name, precision in asdict(precisions).items()}
    return LOADERS[card.family](folder, card, config, loader, dtypes), precisions
