"""Where measured costs are kept between starts: one file per model, machine, layout and whatever else changes them."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import msgspec

from runtime.config import Config
from runtime.cost import Constants
from runtime.log import get_logger
from runtime.models.card import Configs

COSTLY = (
    "device",
    "dist_backend",
    "sp_engine",
    "attention_backend",
    "dit_precision",
    "text_encoder_precisions",
    "tp_size",
    "use_fsdp_inference",
    "vae_precision",
    "vae_tiling",
    "vae_config",
    "vae_sp",
    "replicas",
)
"""Settings that change how long an item takes, beside the layout; meshes side by side share cores and links."""

log = get_logger("cost")


def cost_path(config: Config, configs: Configs) -> Path:
    """The file for this model on this machine in this layout, with all else that changes what an item costs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(config.cost_cache) if config.cost_cache is not None else Path(cache) / "framemesh" / "cost"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    machine = (platform.node(), platform.machine(), os.cpu_count(), threads)
    # Unset and switched off are the same.
    settings = {name: getattr(config, name) or None for name in COSTLY}
    identity = msgspec.json.encode([configs, machine, config.layout, settings], order="sorted")
    return folder / f"{hashlib.sha256(identity).hexdigest()[:16]}.json"


def load_constants(path: Path) -> Constants:
    """What was learnt before, or the first guess; a file that cannot be used is said and ignored."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Constants)
    except FileNotFoundError:
        return Constants.first_guess()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("measured costs cannot be read; starting anew", path=str(path), error=str(error))
        return Constants.first_guess()


def save_constants(constants: Constants, path: Path) -> None:
    """Replace the file in one move; a folder that cannot be written is said and costs nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(constants)))
        os.replace(file.name, path)
    except OSError as error:
        log.warning("measured costs cannot be kept", path=str(path), error=str(error))
