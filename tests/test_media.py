"""Frames to files and back: what is written plays while it grows, and nothing is lost but what H.264 loses."""

from __future__ import annotations

import io
import json
import os
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from gateway.media.metadata import a1111_line, generation_metadata, version
from gateway.media.mp4 import FragmentWriter, read_frames, remux_faststart
from gateway.media.stills import GAP, contact_sheet, jpeg, png
from runtime.sampling import ResolvedParams

WIDTH, HEIGHT, FPS = 96, 64, 8
RED = (200, 40, 40)
COLOURS = [RED, (40, 180, 60), (30, 60, 210), (230, 220, 40), (128, 128, 128)]
METADATA: dict[str, object] = {"prompt": 'a "moof" in 雪, mdat\n\x00 end', "seed": 7, "guidance_scale": 4.5}


def moving(num_frames: int) -> np.ndarray:
    """A red ground over which a wide stripe moves, 4 pixels and one colour a frame."""
    frames = np.full((num_frames, HEIGHT, WIDTH, 3), RED, np.uint8)
    for number, frame in enumerate(frames):
        frame[:, 4 * number % 64 :][:, :32] = COLOURS[number % len(COLOURS)]
    return frames


def write(path: Path, frames: np.ndarray, chunk: int = 4) -> Path:
    with FragmentWriter(path, WIDTH, HEIGHT, FPS, METADATA) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])
    return path


def top_level_boxes(path: Path) -> list[str]:
    data, start, kinds = path.read_bytes(), 0, []
    while start < len(data):
        kinds.append(data[start + 4 : start + 8].decode())
        start += int.from_bytes(data[start : start + 4], "big")
    return kinds


def middle_of_stripes(frames: np.ndarray) -> np.ndarray:
    """The flat colour of each frame's stripe, away from its edges."""
    middles = [frame[8:-8, 4 * number % 64 :][:, 12:20].mean((0, 1)) for number, frame in enumerate(frames)]
    return np.array(middles)


def starts_afresh(packet: bytes) -> bool:
    """Whether an IDR picture (NAL unit type 5) is among the length-prefixed NAL units."""
    start, kinds = 0, []
    while start < len(packet):
        kinds.append(packet[start + 4] & 31)
        start += 4 + int.from_bytes(packet[start : start + 4], "big")
    return 5 in kinds


def test_every_write_leaves_all_frames_so_far_on_disk(tmp_path):
    frames, path, written = moving(23), tmp_path / "growing.mp4", 0
    with FragmentWriter(path, WIDTH, HEIGHT, FPS, METADATA) as writer:
        assert read_frames(path).shape == (0, HEIGHT, WIDTH, 3)
        for count in (1, 4, 0, 4, 1, 13):
            writer.write(frames[written : written + count])
            written += count
            decoded = read_frames(path)
            assert len(decoded) == written
            np.testing.assert_allclose(middle_of_stripes(decoded), middle_of_stripes(frames[:written]), atol=6)
    assert len(read_frames(path)) == 23


def test_fragments_follow_each_other_in_time_and_only_keyframes_say_so(tmp_path):
    path = write(tmp_path / "fragments.mp4", moving(20), chunk=3)
    with av.open(path) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [float(packet.pts * packet.time_base * FPS) for packet in packets] == list(range(20))
    assert [float(packet.duration * packet.time_base * FPS) for packet in packets] == [1] * 20
    assert [packet.is_keyframe for packet in packets] == [starts_afresh(bytes(packet)) for packet in packets]
    assert 2 <= sum(packet.is_keyframe for packet in packets) < 20
    assert top_level_boxes(path) == ["ftyp", "moov", *["moof", "mdat"] * 7]


def test_growing_file_has_its_metadata_before_the_first_frame(tmp_path):
    path = tmp_path / "growing.mp4"
    with FragmentWriter(path, WIDTH, HEIGHT, FPS, METADATA), av.open(path) as container:
        assert json.loads(container.metadata["comment"]) == METADATA


def test_a_fragment_torn_anywhere_hides_only_itself(tmp_path):
    path = write(tmp_path / "whole.mp4", moving(4))
    whole = path.read_bytes()
    write(path, moving(8))
    longer, torn = path.read_bytes(), tmp_path / "torn.mp4"
    assert longer.startswith(whole)
    for end in range(len(whole), len(longer), 7):
        torn.write_bytes(longer[:end])
        assert len(read_frames(torn)) == 4


def test_writer_takes_views_and_closes_twice(tmp_path):
    mirrored = moving(3)[:, :, ::-1]
    writer = FragmentWriter(tmp_path / "view.mp4", WIDTH, HEIGHT, FPS, {})
    writer.write(mirrored)
    writer.close()
    writer.close()
    np.testing.assert_allclose(read_frames(tmp_path / "view.mp4")[0, :, 4:60], mirrored[0, :, 4:60], atol=6)


@pytest.mark.parametrize(("width", "height"), [(65, 64), (64, 65)])
def test_odd_sizes_are_refused_and_leave_no_file(tmp_path, width, height):
    with pytest.raises(ValueError, match=f"{width}x{height}"):
        FragmentWriter(tmp_path / "odd.mp4", width, height, FPS, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames", [np.zeros((1, HEIGHT, WIDTH + 2, 3), np.uint8), np.zeros((1, HEIGHT, WIDTH, 3), np.float32)]
)
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    path = tmp_path / "clip.mp4"
    with FragmentWriter(path, WIDTH, HEIGHT, FPS, {}) as writer, pytest.raises(ValueError, match="expected uint8"):
        writer.write(frames)
    assert len(read_frames(path)) == 0


def test_faststart_moves_the_index_and_nothing_else(tmp_path):
    source, target = write(tmp_path / "source.mp4", moving(17)), tmp_path / "target.mp4"
    remux_faststart(source, target)
    kinds = top_level_boxes(target)
    assert "moof" not in kinds
    assert kinds.index("moov") < kinds.index("mdat")
    with av.open(target) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (17, FPS)
        assert stream.duration * stream.time_base * FPS == 17
        assert json.loads(container.metadata["comment"]) == METADATA
    np.testing.assert_array_equal(read_frames(target), read_frames(source))
    assert sorted(os.listdir(tmp_path)) == ["source.mp4", "target.mp4"]


def test_faststart_in_place(tmp_path):
    path = write(tmp_path / "clip.mp4", moving(5))
    remux_faststart(path, path)
    assert "moof" not in top_level_boxes(path)
    assert len(read_frames(path)) == 5


def test_a_faststart_that_fails_late_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError("no space left")

    source = write(tmp_path / "source.mp4", moving(2))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        remux_faststart(source, tmp_path / "target.mp4")
    assert os.listdir(tmp_path) == ["source.mp4"]


def test_a_failed_faststart_keeps_the_old_target(tmp_path):
    source, target = tmp_path / "broken.mp4", tmp_path / "target.mp4"
    source.write_bytes(b"no video")
    target.write_bytes(b"old")
    with pytest.raises(av.error.InvalidDataError):
        remux_faststart(source, target)
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["broken.mp4", "target.mp4"]


@pytest.mark.parametrize("finished", [False, True])
def test_colours_survive_and_are_tagged_bt709(tmp_path, finished):
    frames = np.repeat(np.array(COLOURS, np.uint8)[:, None, None], HEIGHT, 1).repeat(WIDTH, 2)
    path = write(tmp_path / "flat.mp4", frames)
    if finished:
        remux_faststart(path, path)
    decoded = read_frames(path)
    np.testing.assert_allclose(decoded, frames, atol=6)
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
    assert tags == (1, 1, 1, 1)


def test_reading_a_range(tmp_path):
    path = write(tmp_path / "clip.mp4", moving(12))
    every = read_frames(path)
    np.testing.assert_array_equal(read_frames(path, 9), every[9:])
    np.testing.assert_array_equal(read_frames(path, 3, 4), every[3:7])
    np.testing.assert_array_equal(read_frames(path, 11, 5), every[11:])
    assert len(read_frames(path, 12)) == 0


def test_generation_metadata_and_its_a1111_line():
    params = ResolvedParams(
        prompt="a fox", negative_prompt="blur", num_inference_steps=30, guidance_scale=5.0, seed=42, height=480,
        width=832, num_frames=81, fps=16,
    )  # fmt: skip
    metadata = generation_metadata(params, "org/model: one", {"denoise": 1.5})
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["timings"] == {"denoise": 1.5}
    assert a1111_line(metadata) == (
        "a fox\nNegative prompt: blur\nSteps: 30, CFG scale: 5.0, Seed: 42, Size: 832x480, Frames: 81, FPS: 16, "
        f'Model: "org/model: one", Version: {version()}'
    )
    assert a1111_line({"prompt": "a", "negative_prompt": "", "seed": 1}) == "a\nSeed: 1"


@pytest.mark.parametrize("prompt", ["plain", "naïve", "雪, 🦊"])
def test_png_is_lossless_and_its_text_round_trips(prompt):
    frame, metadata = moving(1)[0], METADATA | {"prompt": prompt}
    image = Image.open(io.BytesIO(png(frame, metadata)))
    np.testing.assert_array_equal(np.asarray(image), frame)
    assert image.text["parameters"] == a1111_line(metadata)
    assert json.loads(image.text["framemesh"]) == metadata


def test_png_without_metadata_has_no_text():
    image = Image.open(io.BytesIO(png(moving(1)[0])))
    image.load()
    assert image.text == {}


def test_jpeg_decodes_and_quality_counts():
    frame = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert len(jpeg(frame, 30)) < len(jpeg(frame)) < len(jpeg(frame, 95))
    flat = np.full((HEIGHT, WIDTH, 3), RED, np.uint8)
    np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(jpeg(flat)))), flat, atol=6)


def tile(sheet: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    return sheet[GAP + row * (height + GAP) :, GAP + column * (width + GAP) :][:height, :width]


def test_contact_sheet_shows_first_and_last_and_spreads_the_rest():
    frames = np.arange(81, dtype=np.uint8)[:, None, None, None].repeat(120, 1).repeat(200, 2).repeat(3, 3)
    sheet = contact_sheet(frames)
    assert sheet.shape == (4 * (120 + GAP) + GAP, 5 * (200 + GAP) + GAP, 3)
    shown = [int(tile(sheet, row, column, 120, 200)[-1, -1, 0]) for row in range(4) for column in range(5)]
    assert (shown[0], shown[-1]) == (0, 80)
    assert {after - before for before, after in pairwise(shown)} == {4, 5}


def test_contact_sheet_enlarges_small_frames_sharply_and_numbers_them():
    frames = np.random.default_rng(0).integers(0, 128, (5, 64, 80, 3), dtype=np.uint8)
    sheet = contact_sheet(frames, columns=3)
    assert sheet.shape == (2 * (128 + GAP) + GAP, 3 * (160 + GAP) + GAP, 3)
    last = tile(sheet, 1, 1, 128, 160)
    np.testing.assert_array_equal(last[64:], frames[4].repeat(2, 0).repeat(2, 1)[64:])
    assert last[:24, :24].max() > 250
    assert last[24:].max() == 127
    assert len(np.unique(tile(sheet, 1, 2, 128, 160).reshape(-1, 3), axis=0)) == 1


def test_contact_sheet_of_few_frames_has_no_empty_columns():
    assert contact_sheet(moving(2), columns=5, min_tile=1).shape == (HEIGHT + 2 * GAP, 2 * (WIDTH + GAP) + GAP, 3)
    assert contact_sheet(moving(1), min_tile=1).shape == (HEIGHT + 2 * GAP, WIDTH + 2 * GAP, 3)


@pytest.mark.parametrize("options", [{"max_tiles": 0}, {"columns": 0}])
def test_contact_sheet_refuses_the_impossible(options):
    with pytest.raises(ValueError):
        contact_sheet(moving(3), **options)
    with pytest.raises(ValueError):
        contact_sheet(moving(0))
