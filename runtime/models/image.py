"""What the cards of text-to-image families share: one still per request, packed latents, checks. Knows no one model.

Packed latents: 2 x 2 latent pixels of every channel are one token.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, ClassVar

from runtime.bounds import MAX_PROMPT_CHARS
from runtime.errors import UNSUPPORTED_PARAMETER, InvalidInput
from runtime.sampling import ResolvedParams, SamplingParams

PACK = 2
"""Latent pixels along each side of a token."""
MOST_GUIDANCE = 100.0
STILL = {"num_frames": 1, "fps": 1}
"""What a video model lets one choose and a picture does not have."""


@dataclass(frozen=True, kw_only=True)
class ImageCard:
    """A model that denoises the packed latents of one picture jointly with its text."""

    heads: int
    head_dim: int
    layers: int
    """Transformer blocks of every kind."""
    token_channels: int
    """Channels of a packed token."""
    spatial: int
    """Pixels along each side of a latent pixel."""
    text_dim: int
    defaults: dict[str, float]

    family: str
    pipeline_class: str
    text_tokens: int
    """Of a usual prompt, as the denoiser sees it."""
    most_text_tokens: int
    """Of the longest one: what is held may be as much."""
    task_type: str = "T2I"
    decode_streams: str = "in one piece"
    decodes_in_strips: bool = True
    max_input_images: int = 0
    unused: ClassVar[dict[str, tuple[str, ...]]] = {"vae": ("encoder", "quant_conv")}

    def check(self, params: SamplingParams) -> ResolvedParams:
        if not params.prompt.strip():
            raise InvalidInput("prompt", "is empty; say what to generate", code="missing_required_parameter")
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(params, name) or "")) > MAX_PROMPT_CHARS:
                raise InvalidInput(name, f"has {length} characters, at most {MAX_PROMPT_CHARS} are taken")
        for name, only in STILL.items():
            if getattr(params, name) not in {None, only}:
                raise InvalidInput(
                    name, f"{self.pipeline_class} makes single pictures; leave it out", code=UNSUPPORTED_PARAMETER
                )
        seed = secrets.randbelow(2**31) if params.seed is None else params.seed
        if not 0 <= seed < 2**63:
            raise InvalidInput("seed", f"{seed} is out of range; take 0 to 2^63 - 1")
        return ResolvedParams(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt or "",
            num_inference_steps=self._steps(params.num_inference_steps),
            guidance_scale=self.guidance(params),
            seed=seed,
            height=self._size("height", params.height),
            width=self._size("width", params.width),
            **STILL,
            true_cfg_scale=self._true_cfg(params),
            deterministic=bool(params.deterministic),
        )

    def guidance(self, params: SamplingParams) -> float:
        """Of a model without a guidance input; a value that would do nothing is refused."""
        if params.guidance_scale is not None and params.guidance_scale > 1:
            raise InvalidInput(
                "guidance_scale",
                f"this {self.pipeline_class} takes no guidance; for classifier-free guidance give true_cfg_scale "
                "and a negative_prompt",
                code=UNSUPPORTED_PARAMETER,
            )
        return 1.0

    def clean_prompt(self, text: str) -> str:
        return text

    def frames_for(self, seconds: float, fps: int) -> int:
        return 1

    def latent_shape(self, params: ResolvedParams) -> tuple[int, ...]:
        """Packed: (1, tokens, channels of a token)."""
        rows, columns = self.grid(params)
        return (1, rows * columns, self.token_channels)

    def grid(self, params: ResolvedParams) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return params.height // (self.spatial * PACK), params.width // (self.spatial * PACK)

    def tokens(self, params: ResolvedParams) -> int:
        return self.latent_shape(params)[1] + self.text_tokens

    def step_flops(self, params: ResolvedParams) -> float:
        """2 per multiply-add: per block and token 12 d^2 (projections and a 4 d feed-forward), and the scores."""
        s, d = self.tokens(params), self.heads * self.head_dim
        return 2.0 * self.layers * (12 * s * d * d + 2 * s * s * d) * len(self.branches(params, 0))

    def branches(self, params: ResolvedParams, step: int) -> tuple[str, ...]:
        return ("cond", "uncond") if params.true_cfg_scale > 1.0 else ("cond",)

    def batch_key(self, params: ResolvedParams, step: int) -> tuple[Any, ...]:
        """Rows of a forward share their positions, so the grid has to be the same, not only its token count."""
        return (self.grid(params), self.branches(params, step), params.deterministic)

    def decode_chunks(self, params: ResolvedParams) -> tuple[int, ...]:
        return (1,)

    def state_bytes(self, params: ResolvedParams, stage: str) -> int:
        """fp32 latents and a solver step's worth of copies, and the embeddings of every branch."""
        _, tokens, channels = self.latent_shape(params)
        embeddings = len(self.branches(params, 0)) * self.most_text_tokens * self.text_dim
        decoded = 3 * params.height * params.width if stage == "decode" else 0
        return 4 * (4 * tokens * channels + embeddings + decoded)

    def _true_cfg(self, params: SamplingParams) -> float:
        """As the pipelines: on with a scale above 1 and a negative prompt, be it an empty one."""
        scale, negative = params.true_cfg_scale, params.negative_prompt
        if scale is None:
            scale = self.defaults["true_cfg_scale"] if negative is not None else 1.0
        if not 0 <= scale <= MOST_GUIDANCE:
            raise InvalidInput("true_cfg_scale", f"{scale} is out of range; take 0 to 100 (1 or less: off)")
        if scale > 1 and negative is None:
            raise InvalidInput("true_cfg_scale", 'needs a negative_prompt to steer away from; " " will do')
        if scale <= 1 and negative is not None and negative.strip():
            raise InvalidInput("negative_prompt", "has no effect here unless true_cfg_scale is above 1")
        return scale

    def _steps(self, value: int | None) -> int:
        chosen = int(self._default("num_inference_steps", value))
        if not 1 <= chosen <= 1000:
            raise InvalidInput("num_inference_steps", f"{chosen} is out of range; take 1 to 1000")
        return chosen

    def _size(self, name: str, value: int | None) -> int:
        chosen, multiple = int(self._default(name, value)), self.spatial * PACK
        if chosen > 8192:
            raise InvalidInput(name, f"{chosen} is too large; take at most 8192")
        if chosen < multiple:
            raise InvalidInput(name, f"{chosen} is too small; take at least {multiple}")
        if chosen % multiple:
            low = chosen // multiple * multiple
            raise InvalidInput(
                name, f"{chosen} is not a multiple of {multiple}; the nearest are {low} and {low + multiple}"
            )
        return chosen

    def _default(self, name: str, value: float | None) -> float:
        return self.defaults[name] if value is None else value
