"""The flags, keys and variables of SGLang Diffusion that framemesh knows but cannot serve yet. Parses nothing.

Someone who brings a command line, config file or environment from there is told which part has no counterpart here:
nothing is dropped silently, and a value that asks for nothing ("off") is accepted without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import InvalidInput


@dataclass(frozen=True)
class Later:
    """A flag or key whose feature is missing."""

    off: tuple[object, ...]
    """Values that ask for nothing."""
    reason: str
    """Why any other value is refused: one sentence for a user."""
    takes_value: bool
    """Whether the flag is followed by a value; one without is a boolean in all its spellings."""


def _switch(reason: str, *more_off: object) -> Later:
    return Later((None, False, *more_off), reason, takes_value=False)


def _value(reason: str, *more_off: object) -> Later:
    return Later((None, *more_off), reason, takes_value=True)


_OFFLOAD = "offloading to the CPU is not available yet; every component stays on its device"
_LAYERWISE = "layerwise offload is not available yet; the denoiser stays on its device"
_LORA = "LoRA adapters are not available yet"
_CACHE_DIT = "Cache-DiT is not available yet"
_QUANTIZED = "quantized weights are not available yet; take the weights of the model folder"
_PROFILER = "the profiler is not available yet"
_DIFFUSERS = "the diffusers backend is not available yet; `framemesh models` lists the native families"
_KERNEL = "this attention kernel is not available yet; take torch_sdpa"
_APPROXIMATE = "approximate attention is not available yet; take torch_sdpa"

LATER: dict[str, Later] = {
    "performance_mode": _value("performance modes are not available yet", "auto", "manual"),
    "enable_torch_compile": _switch("torch.compile is not available yet"),
    "warmup": _switch("warm-up runs are not available yet"),
    "warmup_resolutions": _value("warm-up runs are not available yet", []),
    "dit_layerwise_offload": _switch(_LAYERWISE),
    "dit_offload_prefetch_size": _value(_LAYERWISE),
    "dit_cpu_offload": _switch(_OFFLOAD),
    "text_encoder_cpu_offload": _switch(_OFFLOAD),
    "image_encoder_cpu_offload": _switch(_OFFLOAD),
    "vae_cpu_offload": _switch(_OFFLOAD),
    # Says how offloaded weights are held; with nothing offloaded either answer describes what happens.
    "pin_cpu_memory": _switch("pinned memory belongs to offloading, which is not available yet", True),
    "lora_path": _value(_LORA),
    "lora_nickname": _value(_LORA, "default"),
    "vae_path": _value("a VAE from elsewhere is not available yet; the model folder's own is used"),
    "pipeline_class_name": _value("choosing the pipeline class is not available yet; the model folder names it"),
    "trust_remote_code": _switch("code from a model folder is never run"),
    "diffusers_attention_backend": _value(_DIFFUSERS),
    "diffusers_kwargs": _value(_DIFFUSERS, {}),
    "mask_strategy_file_path": _value("sliding tile attention is not available yet, so it needs no strategy file"),
    "cache_dit_config": _value(_CACHE_DIT),
    "enable_svdquant": _switch(_QUANTIZED),
    "transformer_weights_path": _value(_QUANTIZED),
    "quantization_precision": _value(_QUANTIZED),
    "quantization_rank": _value(_QUANTIZED),
    "profile": _switch(_PROFILER),
    "profile_all_stages": _switch(_PROFILER),
    "num_profiled_timesteps": _value(_PROFILER),
    "perf_dump_path": _value("performance dumps are not available yet"),
}

LATER_VALUES: dict[str, dict[str, str]] = {
    "backend": {"diffusers": _DIFFUSERS},
    "attention_backend": {
        **dict.fromkeys(("fa", "fa3", "fa4", "aiter", "xformers"), _KERNEL),
        **dict.fromkeys(("sage_attn", "sage_attn_3", "sla_attn", "sage_sla_attn"), _APPROXIMATE),
        **dict.fromkeys(("sliding_tile_attn", "video_sparse_attn", "sparse_video_gen_2_attn"), _APPROXIMATE),
        "vmoba_attn": _APPROXIMATE,
    },
}
"""Values of settings that exist here, whose feature is missing: setting -> value -> reason."""

ALIASES: dict[str, str] = {"sp_size": "sp_degree", "precision": "dit_precision"}
"""Second names of settings -> the names used here."""

ENVIRONMENT_SWITCHES: dict[str, str] = {"CACHE_DIT_ENABLED": _CACHE_DIT}
"""Variables, without their prefix, that switch a missing feature on when they are true."""

PREFIX = "FRAMEMESH_"
"""Of the environment variables that are settings here."""

OTHER_PREFIX = "SGLANG_"


def check_later(name: str, value: object, spelling: str) -> bool:
    """Whether `LATER` owns this setting; its value then asks for nothing, and there is nothing left to do.

    Args:
        name: underscore name, aliases resolved.
        value: as parsed from a file, or the result of `plain` on a word of the command line.
        spelling: how the user wrote it, for the message.

    Raises:
        InvalidInput: the value asks for what is missing.
    """
    if name in LATER:
        if value not in LATER[name].off:
            raise InvalidInput(spelling, LATER[name].reason, code="not_available")
        return True
    if isinstance(value, str) and value in LATER_VALUES.get(name, {}):
        raise InvalidInput(spelling, f"{value}: {LATER_VALUES[name][value]}", code="not_available")
    return False


def plain(word: str) -> object:
    """A word of the command line or the environment as the value that a config file would hold."""
    words: dict[str, object] = {"true": True, "false": False, "null": None, "none": None, "": None}
    lower = word.lower()
    if lower in words:
        return words[lower]
    return int(word) if word.isdecimal() else word


def check_environment(environ: Mapping[str, str]) -> list[str]:
    """One warning that names the reference product's variables that are set and have no effect here, or none.

    Raises:
        InvalidInput: a variable switches on what is missing.
    """
    for prefix in (PREFIX, OTHER_PREFIX):
        for switch, reason in ENVIRONMENT_SWITCHES.items():
            if environ.get(prefix + switch, "").lower() in {"1", "true", "yes", "on"}:
                raise InvalidInput(prefix + switch, f"{reason}; unset it", code="not_available")
    idle = sorted(name for name, value in environ.items() if name.startswith(OTHER_PREFIX) and value)
    return [f"warning: set, but without effect here: {', '.join(idle)}"] if idle else []
