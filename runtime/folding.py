"""Whether the ranks of sequence parallelism share the text encoders' layers ("parallel folding"), and by how many.

Pure: sizes from the folder's configs, seconds from a machine's constants. workers/parallel/encoder.py does it.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import msgspec

from runtime.errors import InvalidInput
from runtime.machine import Machine
from runtime.models.card import Configs

PROMPT_TOKENS = {"t5": 512, "umt5": 64, "qwen2_5_vl": 128}
"""Of a usual prompt, for which "auto" decides; FLUX pads T5's."""


class EncoderShape(msgspec.Struct, frozen=True):
    """A transformer encoder in integers."""

    name: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    """Of a usual prompt."""

    @property
    def divides(self) -> int:
        """Degrees that split it are the divisors of this."""
        return gcd(*self.split_sizes.values())

    @property
    def split_sizes(self) -> dict[str, int]:
        """What is split, by name."""
        return {"heads": self.heads, "key and value heads": self.kv_heads, "hidden units": self.ffn}

    @property
    def weights(self) -> int:
        """Values in the layers that are split."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn)

    def seconds(self, tp: int, machine: Machine) -> float:
        """Of one prompt: weights read or multiplied, and two all-reduces of the activations per layer."""
        share = self.weights / tp
        compute = max(2.0 * share * self.tokens / machine.flops, share * machine.element / machine.memory_bandwidth)
        moved = 2 * self.tokens * self.width * machine.element * (tp - 1) / tp
        reduces = 2 * self.layers * (machine.link_latency + moved / machine.link_bandwidth) if tp > 1 else 0.0
        return max(compute, self.layers * machine.launch) + reduces


def encoder_shapes(configs: Configs) -> list[EncoderShape]:
    """The text encoders that can be split: T5 and UMT5, Qwen2.5-VL's language model. CLIP is too small for it."""
    found = []
    for name in sorted(part for part in configs if part.startswith("text_encoder")):
        config = configs[name]
        # Older folders of Qwen2.5-VL have the language model's numbers at the top.
        kind, language = config.get("model_type"), config.get("text_config") or config
        if kind in {"t5", "umt5"}:
            found.append(_t5(name, config))
        elif kind == "qwen2_5_vl":
            found.append(_qwen(name, language))
    return found


def resolve_tp(wanted: int | None, configs: Configs, sp: int, machine: Machine) -> tuple[int, str]:
    """The degree, and in a sentence why; `wanted` None lets the cost model decide.

    Raises:
        InvalidInput: the degree does not divide the SP degree, or an encoder's heads; names the degrees that do.
    """
    shapes = encoder_shapes(configs)
    valid = [tp for tp in range(1, sp + 1) if sp % tp == 0 and all(shape.divides % tp == 0 for shape in shapes)]
    if wanted is not None:
        if wanted > 1 and not shapes:
            raise InvalidInput("tp_size", "no text encoder of this model can be split; take 1")
        if wanted not in valid:
            sizes = {f"sp({sp})": sp}
            for shape in shapes:
                sizes |= {f"the {size} {what} of {shape.name}": size for what, size in shape.split_sizes.items()}
            undivided = ", ".join(name for name, size in sizes.items() if wanted < 1 or size % wanted)
            raise InvalidInput("tp_size", f"{wanted} does not divide {undivided}; take one of {valid}")
        return wanted, f"tp_size {wanted}, settled at the start"
    if not shapes:
        return 1, "no text encoder that can be split"
    times = {tp: sum(shape.seconds(tp, machine) for shape in shapes) for tp in valid}
    best = min(times, key=lambda tp: (times[tp], tp))
    predicted = ", ".join(f"{tp}: {1e3 * seconds:.2f} ms" for tp, seconds in times.items())
    return best, f"tp_size {best} by prediction for a prompt on {machine.name} ({predicted})"


def _t5(name: str, config: dict[str, Any]) -> EncoderShape:
    return EncoderShape(
        name,
        layers=config["num_layers"],
        width=config["d_model"],
        ffn=config["d_ff"],
        heads=config["num_heads"],
        kv_heads=config["num_heads"],
        head_dim=config["d_kv"],
        tokens=PROMPT_TOKENS[config["model_type"]],
    )


def _qwen(name: str, config: dict[str, Any]) -> EncoderShape:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return EncoderShape(
        name,
        layers=config["num_hidden_layers"],
        width=width,
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=width // heads,
        tokens=PROMPT_TOKENS["qwen2_5_vl"],
    )
