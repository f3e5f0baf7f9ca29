"""Makes the demo model's whole folder from nothing, stage by stage; every stage goes on where it was stopped.

    python -m workers.demo.train --out demo --state demo_state                       # everything
    python -m workers.demo.train --out demo --state demo_state --from workers/demo/model --stage transformer

What it keeps in the state folder: parts/ (the folder so far, in fp32), latents/, a safetensors file per trained stage
(weights, average, optimizer, step) and sheets/ (look at them). The same seed gives the same data in the same order.

Time, with the recipe's steps, on one core of a Xeon with AMX that nobody else uses:

| stage | what | steps | s/step | time |
|---|---|---|---|---|
| tokenizer | a piece for every word | - | - | seconds |
| text | UMT5 encoder: every token must name what the prompt asks for | 1,100 | 0.2 | 4 min |
| vae | Wan VAE, 8 x 8 pixels and 4 frames to one latent | 20,000 | 1.3 | 7 h |
| latents | 16,000 clips through its encoder | - | - | 11 min |
| decoder | the VAE's decoder alone, twice as wide; the latents stay valid | 6,500 | 0.35 | 40 min |
| transformer | Wan transformer and text encoder | 25,000 | 0.6 | 4 h |
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from workers.demo.data import DIRECTIONS, Scene, describe, held_out_prompts, render, training_scene
from workers.demo.denoise import WORDS, Batch, DenoiserLoss, WordsHead
from workers.demo.evaluate import Setting, contact_sheet, generate, to_bytes
from workers.demo.trainer import Losses, Schedule, Trainer, save_atomically
from workers.demo.vae import VaeLoss, start_linear, widened

Size = tuple[int, int, int]
"""Frames, height, width."""

STAGES = ("tokenizer", "text", "vae", "latents", "decoder", "transformer")
PARTS = ("tokenizer", "text_encoder", "vae", "transformer")
SHIPPED_DTYPE = torch.bfloat16
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""What all versions of transformers know; the name that transformers 5 writes is its own."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out."""

    seed: int = 0
    text: dict[str, int] = field(default_factory=lambda: {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2})
    vae: dict[str, Any] = field(default_factory=lambda: {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4]})
    widening: int = 2
    """How many times the encoder's channels the decoder has in the end; it is the narrower part."""
    transformer: dict[str, int] = field(
        default_factory=lambda: {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "ffn_dim": 512}
    )
    sizes: dict[Size, float] = field(
        default_factory=lambda: {(17, 64, 64): 0.85, (1, 64, 64): 0.05, (17, 96, 96): 0.05, (33, 64, 64): 0.05}
    )
    """How much of the training each size gets."""
    emphasis: dict[str, float] = field(
        default_factory=lambda: (
            {"circle": 0.35, "triangle": 0.6, "square": 0.8}
            | dict.fromkeys(DIRECTIONS, 0.2)
            | dict.fromkeys(("still", "growing", "shrinking"), 0.25)
        )
    )
    """How often the transformer sees what is easy; what is not named is hard (stars, turning) and counts 1.

    With these, one clip in four turns: its loss was still nearly twice that of the others.
    """
    clips: int = 16_000
    text_batch: int = 64
    pixels: int = 4 * 17 * 64 * 64
    """Frames x height x width x clips of a batch for the VAE."""
    tokens: int = 32 * 80
    """Video tokens of a batch for the transformer."""
    schedules: dict[str, Schedule] = field(
        default_factory=lambda: {
            "text": Schedule(steps=1_100, lr=2e-3, flat=0.0),
            "vae": Schedule(steps=20_000, lr=2e-3, flat=0.3),
            "decoder": Schedule(steps=6_500, lr=1e-3, flat=0.5),
            "transformer": Schedule(steps=25_000, lr=2e-3, flat=0.5),
        }
    )


@dataclass(frozen=True)
class Workshop:
    """Where a run keeps its things, and on what it computes."""

    state: Path
    out: Path
    recipe: Recipe
    device: torch.device
    fast: bool = True
    """Compile the blocks and compute in bf16 where that is safe: twice as fast with AMX or a GPU."""
    save_seconds: float = 240

    @property
    def parts(self) -> Path:
        return self.state / "parts"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast)

    def trainer(self, stage: str, module: nn.Module, on_save: Callable[[Trainer], None]) -> Trainer:
        path = self.state / f"{stage}.safetensors"
        return Trainer(module, path, self.recipe.schedules[stage], self.save_seconds, on_save)

    def sheet(self, stage: str, step: int) -> Path:
        return self.state / "sheets" / f"{stage}_{step:06d}.png"

    def random(self, stage: str, step: int) -> tuple[random.Random, torch.Generator]:
        """All chance in a step comes from here, so that a resumed run does what an uninterrupted one would."""
        key = f"{self.recipe.seed} {stage} {step}"
        return random.Random(key), torch.Generator().manual_seed(zlib.crc32(key.encode()))


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def make_tokenizer(shop: Workshop) -> None:
    """A unigram model: every word of the world is a piece, and so is every letter, so that no other word is unknown."""
    if (shop.parts / "tokenizer").exists():
        return
    rng = random.Random(shop.recipe.seed)
    sentences = [describe(training_scene(shop.recipe.seed, i), rng) for i in range(5_000)]
    words = Counter(word for text in sentences for word in re.findall(r"\w+", text))
    rarest = math.log(0.1 / words.total())
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", math.log(count / words.total())) for word, count in sorted(words.items()) if len(word) > 1]
    pieces += [(letter, rarest) for letter in ("▁", "▁a", *LETTERS)]
    model = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    model.decoder = decoders.Metaspace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(shop.parts / "tokenizer")


def load_tokenizer(shop: Workshop) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(shop.parts / "tokenizer")


# -- text encoder ------------------------------------------------------------------------------------------------------


class TextLoss(nn.Module):
    """Every token of a prompt must name all that the prompt asks for."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.words_head = WordsHead(encoder.config.d_model)


def train_text(shop: Workshop) -> None:
    """Before the transformer, which trains the encoder further: it then starts with words that mean something."""
    tokenizer, recipe = load_tokenizer(shop), shop.recipe
    config = UMT5Config(
        vocab_size=len(tokenizer),
        num_heads=recipe.text["d_model"] // recipe.text["d_kv"],
        dropout_rate=0.0,
        **recipe.text,
    )
    model = TextLoss(_load_or(UMT5EncoderModel, shop.parts / "text_encoder", lambda: UMT5EncoderModel(config)))
    model.to(shop.device)

    def loss(step: int) -> Losses:
        rng, _ = shop.random("text", step)
        scenes = [training_scene(recipe.seed, rng.randrange(recipe.clips)) for _ in range(recipe.text_batch)]
        prompts = [describe(scene, rng) for scene in scenes]
        ids, mask = tokenized(tokenizer, prompts, shop.device)
        hidden = model.encoder(ids, mask).last_hidden_state
        return {"total": model.words_head.loss(hidden, scenes, mask)}

    _seeded(shop)
    shop.trainer("text", model, lambda trainer: _save_part(shop, "text_encoder", model.encoder, trainer)).run(loss)


def tokenized(tokenizer: Any, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (len(prompts), WORDS) each."""
    tokens = tokenizer(prompts, padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


# -- VAE ---------------------------------------------------------------------------------------------------------------


def train_vae(shop: Workshop) -> None:
    _train_autoencoder(shop, "vae", encoder=True)


def train_decoder(shop: Workshop) -> None:
    """After the latents, wider: the encoder stays, so that they, and a transformer trained on them, stay valid."""
    _train_autoencoder(shop, "decoder", encoder=False)


def _new_vae(recipe: Recipe) -> Any:
    blocks = {"num_res_blocks": 1, "temperal_downsample": [True, True]}
    pixels = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    scales = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
    vae = AutoencoderKLWan(**recipe.vae, **blocks, **pixels, **scales)
    start_linear(vae)
    return vae


def _train_autoencoder(shop: Workshop, stage: str, encoder: bool) -> None:
    recipe, (frames, height, width) = shop.recipe, _main_size(shop)
    _seeded(shop)
    vae = _load_or(AutoencoderKLWan, shop.parts / "vae", lambda: _new_vae(recipe))
    if vae.config.decoder_base_dim is None:
        vae = vae if encoder else widened(vae, recipe.widening)
    elif encoder:
        raise ValueError(f"{shop.parts / 'vae'} has the wide decoder already; remove it to train the VAE further")
    model = VaeLoss(vae, encoder=encoder, compiled=shop.fast).to(shop.device)

    def loss(step: int) -> Losses:
        rng, generator = shop.random(stage, step)
        size = _pick_size(recipe, rng)
        count = max(1, recipe.pixels // (size[0] * size[1] * size[2]))
        scenes = [training_scene(recipe.seed, rng.randrange(recipe.clips)) for _ in range(count)]
        with shop.autocast():
            return model(render(scenes, *size).to(shop.device), generator)

    def on_save(trainer: Trainer) -> None:
        _save_part(shop, "vae", vae, trainer)
        scenes = [scene for _, scene in held_out_prompts(6)]
        video = render(scenes, frames, height, width)
        with trainer.average(), torch.no_grad():
            again = vae.decode(vae.encode(video.to(shop.device)).latent_dist.mode()).sample
        contact_sheet([*to_bytes(video), *to_bytes(again.cpu())], shop.sheet(stage, trainer.step))

    shop.trainer(stage, model, on_save).run(loss)
    if encoder:
        _measure(shop)


def _measure(shop: Workshop, clips: int = 256) -> None:
    """Each latent channel's mean and deviation, which the pipeline normalises by, into the VAE's config."""
    vae = _load(AutoencoderKLWan, shop.parts / "vae").to(shop.device)
    count = min(clips, shop.recipe.clips)
    latents = torch.cat(
        [_encode(vae, shop, _main_size(shop), range(i, min(i + 16, count))) for i in range(0, count, 16)]
    )
    vae.register_to_config(
        latents_mean=[round(float(v), 5) for v in latents.mean(dim=(0, 2, 3, 4))],
        latents_std=[round(float(v), 5) for v in latents.std(dim=(0, 2, 3, 4))],
    )
    _write_part(shop, "vae", vae)


# -- latents -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Clips of one size; the scene of each is known from its number."""

    size: Size
    numbers: range

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.size))}_{self.numbers.start:06d}.safetensors"

    @staticmethod
    def of(path: Path, count: int) -> Shard:
        size, first = path.stem.split("_")
        frames, height, width = (int(part) for part in size.split("x"))
        return Shard((frames, height, width), range(int(first), int(first) + count))


def planned_shards(recipe: Recipe) -> list[Shard]:
    """All clips in shards of up to 64; each next one is of the size that is furthest behind its share."""
    made = dict.fromkeys(recipe.sizes, 0)
    shards = []
    for first in range(0, recipe.clips, 64):
        size = min(made, key=lambda size: made[size] / recipe.sizes[size])
        made[size] += 1
        shards.append(Shard(size, range(first, min(first + 64, recipe.clips))))
    return shards


def make_latents(shop: Workshop) -> None:
    """Raises:
    ValueError: there are shards of another encoder.
    """
    vae = _load(AutoencoderKLWan, shop.parts / "vae").to(shop.device).eval()
    folder, encoder = shop.state / "latents", _fingerprint(vae)
    missing = [shard for shard in planned_shards(shop.recipe) if not (folder / shard.name).exists()]
    for path in folder.glob("*.safetensors"):
        if _header(path).get("encoder") != encoder:
            raise ValueError(f"{path} was made with another VAE encoder; remove {folder} to make it again")
    for done, shard in enumerate(missing):
        numbers = shard.numbers
        parts = [_encode(vae, shop, shard.size, numbers[i : i + 16]) for i in range(0, len(numbers), 16)]
        normalised = (torch.cat(parts) - _channels(vae.config.latents_mean)) / _channels(vae.config.latents_std)
        save_atomically({"latents": normalised}, folder / shard.name, {"encoder": encoder})
        print(f"latents {done + 1}/{len(missing)} shards", flush=True)


def _encode(vae: Any, shop: Workshop, size: Size, numbers: range) -> torch.Tensor:
    video = render([training_scene(shop.recipe.seed, number) for number in numbers], *size)
    with torch.no_grad():
        return vae.encode(video.to(shop.device)).latent_dist.mode().cpu()


def _channels(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def _fingerprint(vae: Any) -> int:
    crc = 0
    for module in (vae.encoder, vae.quant_conv):
        for weight in module.state_dict().values():
            crc = zlib.crc32(weight.float().cpu().numpy().tobytes(), crc)
    return crc


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])


# -- transformer -------------------------------------------------------------------------------------------------------


class Latents:
    """All shards in memory (20 kB for a clip of 17 x 64 x 64)."""

    def __init__(self, folder: Path) -> None:
        self._shards: dict[Size, list[tuple[Shard, torch.Tensor]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            latents = load_file(path)["latents"]
            shard = Shard.of(path, len(latents))
            self._shards.setdefault(shard.size, []).append((shard, latents))

    def batch(self, shop: Workshop, step: int) -> Batch:
        """Clips of one size, as many as make up the recipe's number of tokens."""
        rng, generator = shop.random("transformer", step)
        shards = self._shards[_pick_size(shop.recipe, rng)]
        frames, height, width = shards[0][1].shape[2:]
        count = max(1, shop.recipe.tokens // (frames * height * width // 4))
        easy = shop.recipe.emphasis
        latents: list[torch.Tensor] = []
        scenes: list[Scene] = []
        while len(scenes) < count:
            shard, stored = rng.choice(shards)
            number = rng.randrange(len(stored))
            scene = training_scene(shop.recipe.seed, shard.numbers[number])
            if rng.random() < easy.get(scene.shape, 1.0) * easy.get(scene.motion, 1.0):
                latents.append(stored[number])
                scenes.append(scene)
        return Batch(torch.stack(latents).to(shop.device), scenes, rng, generator)


def train_transformer(shop: Workshop) -> None:
    """With the text encoder. Writes the whole folder and a sheet of samples whenever it saves."""
    recipe, vae_config = shop.recipe, AutoencoderKLWan.load_config(shop.parts / "vae")
    _seeded(shop)
    encoder = _load(UMT5EncoderModel, shop.parts / "text_encoder")
    transformer = _load_or(
        WanTransformer3DModel,
        shop.parts / "transformer",
        lambda: WanTransformer3DModel(
            **recipe.transformer,
            in_channels=vae_config["z_dim"],
            out_channels=vae_config["z_dim"],
            text_dim=encoder.config.d_model,
        ),
    )
    model = DenoiserLoss(load_tokenizer(shop), encoder, transformer, compiled=shop.fast).to(shop.device)
    latents = Latents(shop.state / "latents")

    def loss(step: int) -> Losses:
        with shop.autocast():
            return model(latents.batch(shop, step))

    def on_save(trainer: Trainer) -> None:
        _save_part(shop, "text_encoder", encoder, trainer)
        _save_part(shop, "transformer", transformer, trainer)
        publish(shop)
        asked = [prompt for prompt, _ in held_out_prompts(6)]
        pipeline = WanPipeline.from_pretrained(shop.out, dtype=torch.float32).to(shop.device)
        pipeline.set_progress_bar_config(disable=True)
        videos = generate(pipeline, asked, Setting(_main_size(shop), steps=10))
        contact_sheet(list(videos), shop.sheet("transformer", trainer.step))

    shop.trainer("transformer", model, on_save).run(loss)


# -- the folder --------------------------------------------------------------------------------------------------------


def publish(shop: Workshop) -> None:
    """The parts as one `WanPipeline` folder in bf16."""
    pipeline = WanPipeline(
        tokenizer=load_tokenizer(shop),
        text_encoder=_load(UMT5EncoderModel, shop.parts / "text_encoder").to(SHIPPED_DTYPE),
        transformer=_load(WanTransformer3DModel, shop.parts / "transformer").to(SHIPPED_DTYPE),
        vae=_load(AutoencoderKLWan, shop.parts / "vae").to(SHIPPED_DTYPE),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )
    pipeline.save_pretrained(shop.out)
    _edit(shop.out / "model_index.json", lambda index: index | {"tokenizer": ["transformers", TOKENIZER_CLASS]})
    _edit(
        shop.out / "tokenizer" / "tokenizer_config.json", lambda config: config | {"tokenizer_class": TOKENIZER_CLASS}
    )
    for path in shop.out.rglob("*.json"):
        _edit(path, lambda config: {key: value for key, value in config.items() if key != "_name_or_path"})
    for path in shop.out.rglob("*.safetensors"):
        path.chmod(0o644)
    frames, height, width = _main_size(shop)
    defaults: dict[str, float] = {"height": height, "width": width, "num_frames": frames}
    defaults |= {"num_inference_steps": 20, "guidance_scale": 3.0, "fps": 8}
    (shop.out / "framemesh.json").write_text(json.dumps({"defaults": defaults}) + "\n")


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n")


def _load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32)


def _load_or(kind: Any, folder: Path, make: Callable[[], Any]) -> Any:
    return _load(kind, folder) if folder.exists() else make()


def _save_part(shop: Workshop, name: str, module: Any, trainer: Trainer) -> None:
    with trainer.average():
        _write_part(shop, name, module)


def _write_part(shop: Workshop, name: str, module: Any) -> None:
    folder = shop.parts / name
    fresh = folder.with_name(f"{name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    module.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def _main_size(shop: Workshop) -> Size:
    sizes = shop.recipe.sizes
    return max(sizes, key=lambda size: sizes[size])


def _pick_size(recipe: Recipe, rng: random.Random) -> Size:
    return rng.choices(list(recipe.sizes), list(recipe.sizes.values()))[0]


def _seeded(shop: Workshop) -> None:
    torch.manual_seed(shop.recipe.seed)


MAKE: dict[str, Callable[[Workshop], None]] = {
    "tokenizer": make_tokenizer,
    "text": train_text,
    "vae": train_vae,
    "latents": make_latents,
    "decoder": train_decoder,
    "transformer": train_transformer,
}


def start_from(folder: Path, shop: Workshop) -> None:
    """Take over the parts that the state does not have yet."""
    for part in PARTS:
        if not (shop.parts / part).exists():
            shutil.copytree(folder / part, shop.parts / part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the WanPipeline folder to make")
    parser.add_argument("--state", type=Path, required=True, help="where a run keeps what it needs to go on")
    parser.add_argument("--from", dest="source", type=Path, help="start with the weights of this WanPipeline folder")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be said several times")
    parser.add_argument("--steps", type=int, help="of the trained stages, instead of the recipe's")
    parser.add_argument("--flat", type=float, help="part of the steps before the learning rate falls")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--clips", type=int, help="how many latents to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--plain", action="store_true", help="fp32 and no compiler: exact, and half as fast")
    args = parser.parse_args()
    changes = {name: getattr(args, name) for name in ("steps", "lr", "flat") if getattr(args, name) is not None}
    recipe = Recipe(seed=args.seed)
    recipe = replace(recipe, schedules={name: replace(s, **changes) for name, s in recipe.schedules.items()})
    if args.clips:
        recipe = replace(recipe, clips=args.clips)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    shop = Workshop(args.state, args.out, recipe, torch.device(device), fast=not args.plain)
    if args.source:
        start_from(args.source, shop)
    try:
        for stage in args.stage or STAGES:
            MAKE[stage](shop)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if all((shop.parts / part).exists() for part in PARTS):
        publish(shop)


if __name__ == "__main__":
    main()
