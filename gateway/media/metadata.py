"""What is written into a file about how it was made; knows no container format and no HTTP."""

from __future__ import annotations

import importlib.metadata
import json

from runtime.sampling import ResolvedParams

A1111_SETTINGS = {
    "steps": "Steps",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "num_frames": "Frames",
    "fps": "FPS",
    "model": "Model",
    "framemesh": "Version",
}


def generation_metadata(params: ResolvedParams, model: str, timings: dict[str, float]) -> dict[str, object]:
    """Everything that it takes to make the same output again, and how long each stage took (seconds)."""
    return {
        "framemesh": version(),
        "model": model,
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "seed": params.seed,
        "steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "size": f"{params.width}x{params.height}",
        "num_frames": params.num_frames,
        "fps": params.fps,
        "deterministic": params.deterministic,
        "timings": timings,
    }


def a1111_line(metadata: dict[str, object]) -> str:
    """The text under the PNG key ``parameters`` that stable-diffusion-webui (A1111) writes and that galleries read.

    The prompt, then ``Negative prompt: …`` if there is one, then one line of ``Name: value`` pairs.
    """
    lines = [str(metadata.get("prompt", ""))]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    pairs = [f"{name}: {_quoted(metadata[key])}" for key, name in A1111_SETTINGS.items() if key in metadata]
    return "\n".join([*lines, ", ".join(pairs)])


def to_json(metadata: dict[str, object]) -> str:
    """One line of ASCII, so that no container's idea of text encoding can damage it.

    A file that is to be the same each time does not tell how long it took.
    """
    left_out = {"timings"} if metadata.get("deterministic") else set()
    return json.dumps({name: value for name, value in metadata.items() if name not in left_out})


def version() -> str:
    """The installed release, or ``unknown`` in a checkout that was never installed."""
    try:
        return importlib.metadata.version("framemesh")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if any(mark in text for mark in ",:\n") else text
