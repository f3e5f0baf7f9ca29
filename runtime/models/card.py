"""The contract of a family's card, and the way from a model folder to its card. Knows no weights.

A card is built from the folder's JSON configs alone; gateway, CLI, scheduler and cost model all ask it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import InvalidInput
from runtime.models.flux import FluxCard
from runtime.models.qwen_image import QwenImageCard
from runtime.models.wan import WanCard
from runtime.sampling import ResolvedParams, SamplingParams

Configs = dict[str, dict[str, Any]]
"""JSON configs by component name; "model_index" is the folder's own, "framemesh" the optional defaults file."""


class Card(Protocol):
    """What can be known of a model without loading it."""

    @property
    def family(self) -> str: ...

    @property
    def pipeline_class(self) -> str: ...

    @property
    def task_type(self) -> str:
        """T2V, T2I, I2V …"""
        ...

    @property
    def decodes_in_strips(self) -> bool:
        """Whether the ranks can share a decode, each with a strip of the rows."""
        ...

    @property
    def decode_streams(self) -> str:
        """How frames leave the VAE: "per latent frame", "per temporal tile" or "in one piece"."""
        ...

    @property
    def max_input_images(self) -> int:
        """Pictures that a request may start from; 0 where the family reads text only."""
        ...

    @property
    def heads(self) -> int:
        """Attention heads of the denoiser: what Ulysses splits."""
        ...

    @property
    def unused(self) -> Mapping[str, tuple[str, ...]]:
        """Component -> its submodules that nobody calls on the way from text to pixels, which no rank holds."""
        ...

    def check(self, params: SamplingParams) -> ResolvedParams:
        """Fill in defaults and refuse what the family cannot make; raises `InvalidInput`."""
        ...

    def clean_prompt(self, text: str) -> str:
        """The text exactly as the family's pipeline hands it to the tokenizer."""
        ...

    def frames_for(self, seconds: float, fps: int) -> int:
        """The valid frame count nearest to a duration."""
        ...

    def latent_shape(self, params: ResolvedParams) -> tuple[int, ...]: ...

    def tokens(self, params: ResolvedParams) -> int:
        """Tokens of one forward, before padding."""
        ...

    def step_flops(self, params: ResolvedParams) -> float:
        """Floating-point operations of one denoising step, all guidance branches."""
        ...

    def branches(self, params: ResolvedParams, step: int) -> tuple[str, ...]:
        """Guidance branches that this step evaluates."""
        ...

    def batch_key(self, params: ResolvedParams, step: int) -> tuple[Any, ...]:
        """Requests with equal keys may share this step's forward; a deterministic one with none, whatever its key."""
        ...

    def decode_chunks(self, params: ResolvedParams) -> tuple[int, ...]:
        """Frames in each chunk that the decoder yields."""
        ...

    def state_bytes(self, params: ResolvedParams, stage: str) -> int:
        """Bytes that one request holds on a rank in a stage (encode, denoise, decode)."""
        ...


MOST_INT = 2**63 - 1

FAMILIES: dict[str, Callable[[Configs], Card]] = {
    "FluxPipeline": FluxCard.from_configs,
    "QwenImagePipeline": QwenImageCard.from_configs,
    "WanPipeline": WanCard.from_configs,
}
"""Pipeline class in `model_index.json` -> card."""


SEVERAL_EVALUATIONS = ("Heun", "KDPM2", "PNDM")
"""In the names of diffusers' solvers whose timesteps are not their steps."""


def read_configs(folder: Path) -> Configs:
    """The JSON configs of a diffusers folder.

    Raises:
        InvalidInput: the folder is missing, is no diffusers pipeline, or holds weights that only pickle can read.
    """
    if not folder.is_dir():
        raise InvalidInput("model_path", f"{folder} is no folder; give a diffusers folder or a Hugging Face model id")
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise InvalidInput(
            "model_path", f"{folder} has no model_index.json, so it is no diffusers pipeline; point at its top folder"
        )
    configs: Configs = {"model_index": _read_json(index_file)}
    for component, source in configs["model_index"].items():
        if component.startswith("_") or not isinstance(source, list) or source[:1] in ([], [None]):
            continue
        if len(source) != 2 or not all(isinstance(word, str) for word in source):
            raise InvalidInput("model_path", f"{index_file}: {component} is {source}, not [library, class]")
        names = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
        found = [folder / component / name for name in names if (folder / component / name).is_file()]
        if not found:
            raise InvalidInput(
                "model_path",
                f"{folder} lists the component {component} but has no {component}/config.json; "
                "the download is incomplete",
            )
        configs[component] = _read_json(found[0])
        _check_weights(folder, component, source)
    defaults = folder / "framemesh.json"
    if defaults.is_file():
        configs["framemesh"] = _read_json(defaults)
    return configs


def card_for(configs: Configs) -> Card:
    """The card of the family that `model_index.json` names.

    Raises:
        InvalidInput: no native family has this pipeline class (lists those that there are), or a config is incomplete.
    """
    name = configs["model_index"].get("_class_name")
    # A pipeline with code of its own has a list here.
    if not isinstance(name, str) or name not in FAMILIES:
        raise InvalidInput("model_path", f"no native family runs {name}; there are: {', '.join(sorted(FAMILIES))}")
    _check_solver(configs)
    try:
        return FAMILIES[name](configs)
    except KeyError as error:
        raise InvalidInput("model_path", f"the folder's configs lack {error}, which a {name} has") from error


def _check_solver(configs: Configs) -> None:
    """A step here is one evaluation of the denoiser; solvers of higher order take several."""
    _, solver = configs["model_index"].get("scheduler", (None, ""))
    if any(word in solver for word in SEVERAL_EVALUATIONS):
        instead = "take FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler in model_index.json"
        raise InvalidInput("model_path", f"its {solver} evaluates the model several times a step; {instead}")


def most_branches(card: Card) -> int:
    """Most guidance branches that a request which the family takes can have."""
    guided = (
        usual_request(),
        SamplingParams(prompt="a", guidance_scale=4.0),
        SamplingParams(prompt="a", negative_prompt="b", true_cfg_scale=4.0),
    )
    return max(len(card.branches(params, 0)) for params in _taken(card, guided))


def usual_request() -> SamplingParams:
    """What layouts are chosen for: every default of the model, the scale of its guidance included.

    Image families guide by it only where there is a negative prompt, be it a blank one.
    """
    return SamplingParams(prompt="a measurement", negative_prompt=" ")


def _taken(card: Card, requests: Iterable[SamplingParams]) -> Iterator[ResolvedParams]:
    for params in requests:
        with suppress(InvalidInput):
            yield card.check(params)


def _bounded(digits: str) -> int:
    """transformers writes 10^30 for "no limit"; what travels to the gateways has 64 bits."""
    return max(min(int(digits), MOST_INT), -MOST_INT)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_bounded)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput("model_path", f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput("model_path", f"{path} holds no JSON object")
    return content


def _check_weights(folder: Path, component: str, source: list[str]) -> None:
    """A component with weights must have them all, as safetensors."""
    if "Scheduler" in source[1] or "Tokenizer" in source[1] or "Processor" in source[1]:
        return
    place = folder / component
    safetensors = sorted(place.glob("*.safetensors"))
    if not safetensors:
        pickles = sorted(p.name for p in place.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise InvalidInput(
                "model_path",
                f"{place} has its weights only as a pickle ({pickles[0]}), which can run code when it is "
                "loaded; convert it to safetensors",
            )
        raise InvalidInput("model_path", f"{place} has no *.safetensors weights; the download is incomplete")
    for index in place.glob("*.safetensors.index.json"):
        shards = set(_read_json(index).get("weight_map", {}).values())
        missing = sorted(shards - {p.name for p in safetensors})
        if missing:
            raise InvalidInput("model_path", f"{place} lacks {missing[0]} ({len(missing)} of {len(shards)} shards)")
