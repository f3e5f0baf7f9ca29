"""Parts of a diffusers folder that every family loads alike. Weights are safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers


def load_scheduler(folder: Path) -> Any:
    """The pipeline's own solver class with its own config; requests work on deep copies of it."""
    index = json.loads((folder / "model_index.json").read_text())
    library, name = index["scheduler"]
    assert library == "diffusers", library
    return getattr(diffusers, name).from_pretrained(folder / "scheduler")
