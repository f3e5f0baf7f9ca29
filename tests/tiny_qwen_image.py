"""A tiny Qwen-Image pipeline in the real folder layout, every parameter random; the tokenizer knows the template."""

import json
import warnings
from pathlib import Path

import torch
from tiny_flux import CORPUS, SMALL, sharpen
from tiny_wan import randomise

from runtime.models.qwen_image import TEMPLATE


def build_tiny_qwen_image(folder: Path, *, heads: int = 4) -> Path:
    """Save it. Trained on the template, the tokenizer gives it the 34 tokens that the pipeline drops."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    # What `randomise` leaves of the first values (biases are added to) has to be the same in every process.
    torch.manual_seed(0)
    corpus = [TEMPLATE.format(text) for text in CORPUS]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size=600, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    language = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            },
        )
    )
    denoiser = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 1.0],
    )
    solver = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=4,
        max_image_seq_len=64,
        shift_terminal=0.02,
    )
    for seed, module in enumerate((language, denoiser, vae)):
        randomise(module, seed)
    sharpen(denoiser)
    QwenImagePipeline(
        scheduler=solver, vae=vae, text_encoder=language, tokenizer=tokenizer, transformer=denoiser
    ).save_pretrained(folder)
    (folder / "framemesh.json").write_text(json.dumps(SMALL))
    return folder


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32):
    """diffusers' own pipeline: the oracle."""
    from diffusers import QwenImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(pipeline, case: dict, output_type: str = "latent", **more):
    """What diffusers makes of one case, which holds the fields of SamplingParams."""
    words = {name: value for name, value in case.items() if name != "seed"}
    generator = torch.Generator("cpu").manual_seed(case["seed"])
    return pipeline(**words, generator=generator, output_type=output_type, **more).images
