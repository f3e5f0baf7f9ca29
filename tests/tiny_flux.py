"""Tiny FLUX.1 pipelines in the real folder layout, every parameter random; tokenizers trained on one sentence."""

import json
import warnings
from pathlib import Path

import torch
from tiny_wan import randomise

CORPUS = ["a red circle moving right, a star over the sea; a big blue square, very bright!"] * 4
CLIP_TOKENS = 77
SMALL = {"defaults": {"height": 64, "width": 64}}
"""The warm-up makes pictures of the default size."""


def sharpen(denoiser: torch.nn.Module) -> None:
    """Scores four times as large: where all keys weigh about the same, a wrong share of them hardly shows."""
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
                parameter.mul_(2)


def build_tiny_flux(folder: Path, *, distilled_guidance: bool = True, heads: int = 4) -> Path:
    """Save it: like dev with a guidance input and a shifted schedule, or like schnell with neither."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    # What `randomise` leaves of the first values (biases are added to) has to be the same in every process.
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer().train_new_from_iterator(CORPUS, vocab_size=400, show_progress=False)
    tokenizer.model_max_length = CLIP_TOKENS
    tokenizer_2 = T5Tokenizer(extra_ids=0).train_new_from_iterator(CORPUS, vocab_size=120, show_progress=False)
    tokenizer_2.model_max_length = 512
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, dropout_rate=0.0)
    )
    denoiser = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=distilled_guidance,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    shifted = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
    solver = FlowMatchEulerDiscreteScheduler(**(shifted if distilled_guidance else {"shift": 1.0}))
    for seed, module in enumerate((clip, t5, denoiser, vae)):
        randomise(module, seed)
    sharpen(denoiser)
    FluxPipeline(
        scheduler=solver,
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=denoiser,
    ).save_pretrained(folder)
    (folder / "framemesh.json").write_text(json.dumps(SMALL))
    return folder


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32):
    """diffusers' own pipeline: the oracle."""
    from diffusers import FluxPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(pipeline, case: dict, output_type: str = "latent", **more):
    """What diffusers makes of one case, which holds the fields of SamplingParams."""
    words = {name: value for name, value in case.items() if name != "seed"}
    generator = torch.Generator("cpu").manual_seed(case["seed"])
    return pipeline(**words, generator=generator, output_type=output_type, **more).images
