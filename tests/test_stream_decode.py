"""Chunked decoding equals diffusers' one-shot decoding exactly, interleaved and tiled too."""

import pytest
import torch
from tiny_wan import build_tiny_wan

from workers.models.wan import StreamDecoder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "pixel-patch-2"])
def vae(request, tmp_path_factory):
    from diffusers import AutoencoderKLWan

    folder = build_tiny_wan(tmp_path_factory.mktemp("vae") / "wan", patched_vae=request.param)
    return AutoencoderKLWan.from_pretrained(folder / "vae").eval()


def latents(seed, frames=4, height=6, width=5):
    return torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(seed))


def chunks(vae, z):
    decoder = StreamDecoder(vae, z)
    return [decoder.frame(index) for index in range(z.shape[2])]


@torch.inference_mode()
def test_chunks_equal_one_shot_bitwise(vae):
    z = latents(0)
    pieces = chunks(vae, z)
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, 2), vae.decode(z, return_dict=False)[0])


@torch.inference_mode()
def test_two_open_decodes_do_not_disturb_each_other(vae):
    first, second = latents(1), latents(2, height=4)
    a, b = StreamDecoder(vae, first), StreamDecoder(vae, second)
    pairs = [(a.frame(index), b.frame(index)) for index in range(first.shape[2])]
    assert torch.equal(torch.cat([x for x, _ in pairs], 2), vae.decode(first, return_dict=False)[0])
    assert torch.equal(torch.cat([y for _, y in pairs], 2), vae.decode(second, return_dict=False)[0])


@torch.inference_mode()
def test_a_strangers_cache_is_caught(vae):
    z = latents(3)
    right = vae.decode(z, return_dict=False)[0]
    decoder, stranger = StreamDecoder(vae, z), StreamDecoder(vae, latents(9))
    wrong = [decoder.frame(0)]
    stranger.frame(0)
    decoder._caches = stranger._caches
    wrong += [decoder.frame(index) for index in range(1, z.shape[2])]
    assert (torch.cat(wrong, 2) - right).abs().max() > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 10), (8, 8)])
def test_streamed_tiles_equal_tiled_decode(vae, height, width):
    z = latents(4, frames=3, height=height, width=width)
    vae.enable_tiling(64, 64, 48, 48)
    try:
        expected = vae.decode(z, return_dict=False)[0]
        streamed = torch.cat(chunks(vae, z), 2)
    finally:
        vae.use_tiling = False
    assert torch.equal(streamed, expected)
