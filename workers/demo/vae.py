"""The demo model's VAE while it trains: whole clips in one pass, what their error costs, and a wider decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F

from workers.demo.trainer import Losses

OUTLINE = 4
"""How much more an error weighs near an outline than elsewhere."""
JITTER = 0.1
"""How unequal the shares of copied channels are."""


class VaeLoss(nn.Module):
    """L1, five times as heavy near outlines, with L2 and a little KL; without its gradient if the encoder is frozen.

    The decoder alone goes for the figure that it is judged by: a clip's mean squared error in dB, which does not forget
    the clips that are nearly right (PSNR loss, as in Chen et al., arXiv 2105.06086).
    """

    def __init__(self, vae: Any, *, encoder: bool, compiled: bool) -> None:
        super().__init__()
        self.vae, self._learns = vae, encoder
        vae.encoder.requires_grad_(encoder)
        vae.quant_conv.requires_grad_(encoder)
        if compiled:
            _put_channels_last(vae)
        # A graph for each size: one for all sizes is slow.
        self._decode = torch.compile(decode_clip, dynamic=False) if compiled else decode_clip
        self._encode = torch.compile(moments, dynamic=False) if compiled else moments

    def forward(self, video: torch.Tensor, generator: torch.Generator) -> Losses:
        with torch.set_grad_enabled(self._learns):
            spread = DiagonalGaussianDistribution(self._encode(self.vae, video).float())
        noise = torch.randn(spread.mean.shape, generator=generator).to(video.device)
        error = self._decode(self.vae, spread.mean + spread.std * noise).float() - video
        weight = (1 + OUTLINE * near_outlines(video)).expand_as(error)
        losses = {
            "l1": (error.abs() * weight).sum() / weight.sum(),
            "l2": (error.square() * weight).sum() / weight.sum(),
            "kl": 0.5 * (spread.mean.square() + spread.var - 1 - spread.logvar).mean(),
            "db": -10 * (error.square().mean(dim=(1, 2, 3, 4)) / 4 + 1e-5).log10().mean(),
        }
        if self._learns:
            return {"total": losses["l1"] + losses["l2"] + 1e-4 * losses["kl"]} | losses
        return {"total": losses["l1"] - 0.01 * losses["db"]} | losses


def near_outlines(video: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, H, W): 1 within two pixels of a place where the colour changes, else 0."""
    window = (1, 3, 3)
    change = (F.max_pool3d(video, window, 1, (0, 1, 1)) + F.max_pool3d(-video, window, 1, (0, 1, 1))).amax(1, True)
    return F.max_pool3d((change > 0.2).float(), window, 1, (0, 1, 1))


# -- in one pass -------------------------------------------------------------------------------------------------------
# The VAE's own loop goes through a clip by latent frames, with a cache for each convolution. Causal convolutions over
# the whole clip give the same, and training with them is twice as fast.


def moments(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> mean and log-variance, (B, 2 x channels, latent frames, rows, columns)."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size))
    for layer in encoder.down_blocks:
        x = _shrink(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(F.silu(encoder.norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x)


def decode_clip(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(B, channels, latent frames, rows, columns) -> (B, 3, T, H, W), not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        for layer in block.upsamplers or ():
            x = _grow(layer, x)
    return unpatchify(decoder.conv_out(F.silu(decoder.norm_out(x))), vae.config.patch_size)


def _grow(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Every frame but the first becomes two."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat((x[:, :, :1], torch.stack((later[:, 0], later[:, 1]), 3).flatten(2, 3)), 2)
    return _by_frame(layer.resample, x)


def _shrink(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The first frame stays, and every two that follow become one, with a look at the one before them."""
    x = _by_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], layer.time_conv(x)), 2)
    return x


def _by_frame(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def _put_channels_last(vae: Any) -> None:
    """What AMX likes from 32 channels on."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


# -- first weights -----------------------------------------------------------------------------------------------------


def start_linear(vae: Any) -> None:
    """Small residual branches and little noise: a network that starts nearly linear learns to copy much sooner."""
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if name.endswith("conv2.weight"):
                weight.mul_(0.05)
        vae.quant_conv.bias[vae.config.z_dim :] = -3.0


def widened(vae: Any, times: int, seed: int = 0) -> Any:
    """The same VAE with so many times the channels in its decoder, which gives what the narrow one gives.

    Every channel is there `times` times, and what reads it reads each copy in part, in unequal parts so that copies
    learn to differ (Net2Net: Chen et al., arXiv 1511.05641). An RMS norm does not notice.
    """
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config["decoder_base_dim"] = times * (config["decoder_base_dim"] or config["base_dim"])
    wide = AutoencoderKLWan(**config)
    generator = torch.Generator().manual_seed(seed)

    def widen(name: str, weight: torch.Tensor) -> torch.Tensor:
        layer = name.split(".")[-2]
        if name.endswith("weight") and layer != "conv_in":
            shares = 1 + JITTER * (2 * torch.rand(times, weight.shape[1], generator=generator) - 1)
            shares = (shares / shares.sum(0)).view(times, 1, -1, *[1] * (weight.ndim - 2))
            weight = torch.cat([weight * share for share in shares], 1)
        if layer == "to_qkv":
            # A product of queries and keys sums over all copies and is divided by the root of the channels.
            weight = torch.cat((weight[: len(weight) // 3] / math.sqrt(times), weight[len(weight) // 3 :]))
        if layer != "conv_out":
            parts = weight.chunk({"to_qkv": 3, "time_conv": 2}.get(layer, 1))
            weight = torch.cat([part for part in parts for _ in range(times)])
        return weight

    narrow = vae.state_dict()
    inside = {name for name in narrow if name.startswith("decoder.")}
    wide.load_state_dict({name: widen(name, w) if name in inside else w for name, w in narrow.items()})
    return wide
