"""One rank of the encoder tests: every encoder whole, split by layers and sharded by weights; saves what came out."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from workers.models.loading import Loader
from workers.parallel import encoder, fsdp
from workers.parallel.groups import init_distributed

CPU = torch.device("cpu")
RANK, NUM_RANKS = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
QWEN = {
    "text_config": {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    },
}
ENCODERS = {
    "umt5": (UMT5EncoderModel, lambda: UMT5Config(**T5)),
    "t5": (T5EncoderModel, lambda: T5Config(**T5, feed_forward_proj="gated-gelu")),
    "t5-plain": (T5EncoderModel, lambda: T5Config(**T5)),
    "qwen": (Qwen2_5_VLForConditionalGeneration, lambda: Qwen2_5_VLConfig(**QWEN)),
}


def build(folder):
    """Once, before the ranks start."""
    from tiny_wan import randomise

    for seed, (name, (cls, config)) in enumerate(ENCODERS.items()):
        module = cls(config())
        randomise(module, seed)
        module.save_pretrained(folder / name)


PARTS = {"qwen": {"used": "model", "unused": ("model.visual", "lm_head")}}
"""What of a module is called, and what of it nobody needs."""


def embed(module, ids):
    # Two prompts of different lengths, as a padded batch.
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return module(ids, mask).last_hidden_state * mask.unsqueeze(-1)


def mutate(name):
    """Break one thing on purpose: the bound must notice."""
    if name == "bias":
        right = encoder._share
        # Rank 0's heads on every rank, in the embeddings of relative positions only.
        encoder._share = lambda name, size, group: (
            slice(0, size // group.size) if "relative" in name else right(name, size, group)
        )
    elif name == "sum":
        encoder.Group.all_reduce = lambda self, x: x
    else:
        assert name == "none", name


@torch.inference_mode()
def main(folder, out, mutation):
    init_distributed("gloo", 60, 0)
    mutate(mutation)
    ids = torch.randint(2, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    mesh = fsdp.shard_mesh(NUM_RANKS, CPU)
    group = encoder.tensor_group(NUM_RANKS, NUM_RANKS, RANK)
    tensors = {}
    for name, (cls, _) in ENCODERS.items():
        place = Path(folder) / name
        loaders = {
            "whole": Loader(CPU),
            "split": Loader(CPU, tensor_group=group),
            "sharded": Loader(CPU, mesh),
        }
        for how, loader in loaders.items():
            module = loader.text_encoder(cls, place, torch.float32, **PARTS.get(name, {}))
            tensors[f"{name}/{how}"] = embed(module, ids).contiguous()
            tensors[f"{name}/{how}/bytes"] = torch.tensor(fsdp.resident_bytes(module))
    save_file(tensors, Path(out) / f"rank{RANK}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
