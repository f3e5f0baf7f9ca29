"""A tiny Wan T2V pipeline in the real folder layout, every parameter random (gates, norms and biases too)."""

import json
import shutil
from pathlib import Path

import torch

DEMO = Path(__file__).parents[1] / "workers" / "demo" / "model"


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Noise on every parameter, so that a wrong shard shows as 0.1 and not as nothing behind a zero gate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
            else:
                parameter.copy_(parameter + 0.3 * noise)


def build_tiny_wan(folder: Path, *, patched_vae: bool = False, heads: int = 4) -> Path:
    """Save it; the tokenizer is the demo model's. `patched_vae` gives the VAE a pixel patch of 2."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    vocabulary = json.loads((DEMO / "text_encoder" / "config.json").read_text())["vocab_size"]
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    denoiser = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=128,
        num_layers=3,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2] if not patched_vae else [1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True] if not patched_vae else [True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 1.0],
        **({"patch_size": 2, "in_channels": 12, "out_channels": 12} if patched_vae else {}),
    )
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for seed, module in enumerate((encoder, denoiser, vae)):
        randomise(module, seed)
    encoder.save_pretrained(folder / "text_encoder")
    denoiser.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    solver.save_pretrained(folder / "scheduler")
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    shutil.copy(DEMO / "model_index.json", folder / "model_index.json")
    return folder


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32):
    """diffusers' own pipeline: the oracle."""
    import warnings

    from diffusers import WanPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = WanPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(pipeline, case: dict, output_type: str = "latent", **more):
    """What diffusers makes of one case: {prompt, seed, height, width, num_frames, steps, guidance}."""
    return pipeline(
        case["prompt"],
        negative_prompt=case.get("negative_prompt", ""),
        height=case["height"],
        width=case["width"],
        num_frames=case["num_frames"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        generator=torch.Generator("cpu").manual_seed(case["seed"]),
        output_type=output_type,
        **more,
    ).frames
