"""The ledger against sums made anew each time; what is refused, and whether the advice is right."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import CARD, KnownCost, Simulation, bytes_of
from single_rank import STEPS, SingleRank
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_wan import build_tiny_wan

from launch.sizes import tuner_for
from runtime.config import Config, VaeConfig
from runtime.memory import MemoryLedger
from runtime.models.card import card_for
from runtime.protocol import Completed, Decode, Request
from runtime.request import RequestRecord, Stage
from runtime.sampling import SamplingParams

HUGE = 1 << 60


def record(ledger, request_id, frames=9, **size):
    params = CARD.check(SamplingParams(prompt="a cat", seed=1, num_frames=frames, **size))
    made = RequestRecord(Request(request_id, params), b"g", 0.0)
    ledger.measure(made)
    return made


def offers(said):
    """(frames, width, height) of each in a refusal's last part."""
    named = re.search(r"(?:^|; )([^;]*) would fit$", said)[1]
    found = [re.fullmatch(r"(\d+) frames of (\d+)x(\d+)", offer) for offer in named.split(" or ")]
    return [tuple(map(int, offer.groups())) for offer in found]


def test_a_record_is_measured_by_its_card():
    made = record(MemoryLedger(CARD), "a", 33)
    assert made.state_bytes == bytes_of("denoise", 33)
    assert made.state_bytes + made.decode_bytes == bytes_of("decode", 33)


def test_what_just_fits_is_taken_and_a_byte_less_refuses_it():
    made = record(MemoryLedger(CARD), "a")
    need = made.state_bytes + made.decode_bytes
    assert MemoryLedger(CARD, need).refusal(made) is None
    assert MemoryLedger(CARD, need).admits(made)
    assert MemoryLedger(CARD, need - 1).refusal(made) is not None
    assert not MemoryLedger(CARD, need - 1).admits(made)
    assert MemoryLedger(CARD, None).refusal(made) is None


@pytest.mark.parametrize("frames", [5, 9, 13, 77, 81, 85, 257, 1025])
@pytest.mark.parametrize("fitting", [1, 5, 41])
def test_the_advice_of_fewer_frames_fits_and_four_more_would_not(frames, fitting):
    if fitting >= frames:
        return
    ledger = MemoryLedger(CARD, bytes_of("decode", fitting))
    (advised, *size), *smaller = offers(ledger.refusal(record(ledger, "a", frames)))
    assert size == [64, 64]
    assert ledger.refusal(record(ledger, "b", advised)) is None
    assert advised + 4 >= frames or ledger.refusal(record(ledger, "c", advised + 4)) is not None
    assert smaller in ([], [(frames, 32, 32)])
    # 32x32 is the only smaller size.
    assert bool(smaller) == (ledger.refusal(record(ledger, "d", frames, height=32, width=32)) is None)


@pytest.mark.parametrize(("height", "width"), [(480, 832), (1024, 512), (96, 4096)])
def test_the_advice_of_a_smaller_size_fits_and_is_a_valid_one(height, width):
    """The decoder's cache does not shrink with the frames, so fewer of them may not be enough."""
    whole = record(MemoryLedger(CARD), "a", 17, height=height, width=width)
    least = record(MemoryLedger(CARD), "a", 1, height=height, width=width)
    ledger = MemoryLedger(CARD, (least.state_bytes + least.decode_bytes) // 2)
    ((frames, wide, high),) = offers(ledger.refusal(whole))
    assert frames == 17
    assert ledger.refusal(record(ledger, "b", 17, height=high, width=wide)) is None
    assert wide / high == pytest.approx(width / height, rel=0.5)
    step = max(32, height // 32), max(32, width // 32)
    assert ledger.refusal(record(ledger, "c", 17, height=high + step[0], width=wide + step[1])) is not None


def test_both_offers_are_made_and_fit():
    """Where the cache is most of it, a few frames at full size are as large as all of them at a smaller one."""
    card = replace(card_for(_configs()), vae_base_dim=96, vae_patch=1)
    ledger = MemoryLedger(card)
    fitting = record(ledger, "a", 9, height=480, width=832)
    ledger.budget = fitting.state_bytes + fitting.decode_bytes
    said = ledger.refusal(record(ledger, "b", 81, height=480, width=832))
    assert offers(said) == [(9, 832, 480), (81, 800, 448)]
    assert said.endswith("; 9 frames of 832x480 or 81 frames of 800x448 would fit")
    for frames, width, height in offers(said):
        assert ledger.refusal(record(ledger, "c", frames, height=height, width=width)) is None


@pytest.mark.parametrize(("frames", "height", "width"), [(81, 480, 832), (17, 64, 64), (1, 256, 256)])
def test_what_is_offered_after_it_ran_out_of_memory_needs_half(frames, height, width):
    ledger = MemoryLedger(CARD)
    whole = record(ledger, "a", frames, height=height, width=width)
    said = ledger.advice(whole, "decode")
    assert said.endswith(" need half as much; --vae-tiling decodes tile by tile")
    made = offers(said.replace(" need half as much; --vae-tiling decodes tile by tile", " would fit"))
    assert made
    for fewer, wide, high in made:
        assert (fewer < frames) != ((high, wide) < (height, width))
        less = record(ledger, "b", fewer, height=high, width=wide)
        assert 2 * (less.state_bytes + less.decode_bytes) <= whole.state_bytes + whole.decode_bytes


def test_a_model_that_never_fits_says_so():
    ledger = MemoryLedger(CARD, 1)
    assert ledger.refusal(record(ledger, "a", 17)).endswith("no size of this model would fit")


def test_an_open_decode_counts_against_newcomers():
    """Two decodes on one rank were allowed while there was room; a newcomer's state must not push them over."""
    ledger = MemoryLedger(CARD)
    a, b, c = (record(ledger, name) for name in "abc")
    ledger.budget = 2 * a.state_bytes + 2 * a.decode_bytes + c.state_bytes - 1
    for each in (a, b):
        assert ledger.admits(each)
        ledger.enter(each)
        assert ledger.may_open_decode(each, 0)
        each.decode_rank = 0
        ledger.open_decode(each, 0)
    assert not ledger.admits(c)
    ledger.close_decode(a)
    assert ledger.admits(c)


def test_room_for_the_largest_decode_is_kept_free():
    ledger = MemoryLedger(CARD)
    large, small = record(ledger, "large", height=256, width=256), record(ledger, "small")
    ledger.enter(large)
    ledger.budget = large.state_bytes + large.decode_bytes + small.state_bytes
    assert ledger.admits(small)
    ledger.budget -= 1
    assert not ledger.admits(small)


def test_without_a_budget_one_decode_is_open_per_rank():
    ledger = MemoryLedger(CARD)
    a, b = record(ledger, "a"), record(ledger, "b")
    for each in (a, b):
        ledger.enter(each)
    a.decode_rank = 1
    ledger.open_decode(a, 1)
    assert not ledger.may_open_decode(b, 1)
    assert ledger.may_open_decode(b, 0)
    ledger.leave(a)
    assert ledger.may_open_decode(b, 1)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["enter", "open", "close", "leave"]), st.integers(0, 9), st.integers(0, 2)), max_size=80
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ACTIONS, st.sampled_from([bytes_of("decode", 33), 2 * bytes_of("decode", 33), HUGE]))
def test_the_ledger_is_the_sum_of_what_is_held_and_never_over_the_budget(actions, budget):
    ledger = MemoryLedger(CARD, budget)
    held: list[RequestRecord] = []
    for number, (action, index, rank) in enumerate(actions):
        chosen = held[index % len(held)] if held else None
        if action == "enter":
            newcomer = record(ledger, f"r{number}", [1, 9, 33][rank])
            if ledger.admits(newcomer):
                ledger.enter(newcomer)
                held.append(newcomer)
        elif chosen is None:
            continue
        elif action == "open" and chosen.decode_rank is None and ledger.may_open_decode(chosen, rank):
            chosen.decode_rank, chosen.stage = rank, Stage.DECODE
            ledger.open_decode(chosen, rank)
        elif action == "close" and chosen.stage is Stage.DECODE:
            chosen.stage = Stage.DELIVER
            ledger.close_decode(chosen)
        elif action == "leave":
            ledger.leave(chosen)
            held = [each for each in held if each is not chosen]
        for on in range(3):
            expected = sum(
                each.state_bytes + each.decode_bytes * (each.stage is Stage.DECODE and each.decode_rank == on)
                for each in held
            )
            assert ledger.held(on) == expected <= budget
        largest = max((each.decode_bytes for each in held), default=0)
        assert sum(each.state_bytes for each in held) + largest <= budget, "no decode could go on"


# ---- in the scheduler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("growth", [1.0, 0.1])
def test_nothing_waits_for_itself_when_it_is_tight(num_ranks, growth):
    """Room for one request of the largest kind and not a byte more."""
    mesh = Simulation(num_ranks=num_ranks, budget=bytes_of("decode", 33), cost=KnownCost(growth=growth))
    mesh.join(credits=2)
    for number in range(12):
        mesh.submit(f"r{number}", frames=[1, 9, 33][number % 3], steps=6, key=f"key {number % 2}")
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert len(mesh.ends) == 12


def test_with_a_budget_decodes_share_a_rank():
    mesh = Simulation(num_ranks=1, budget=HUGE, cost=KnownCost(growth=0.1))
    mesh.join()
    mesh.submit("a", "b", steps=1, frames=33)
    mesh.submit("c", steps=1, frames=257, key="other")
    most = 0
    while mesh.due:
        most = max(most, sum(mesh.open(request_id) for request_id in mesh.states))
        mesh.next_report()
    assert most >= 2
    assert mesh.items_of(Decode)


def test_what_was_queued_before_the_budget_was_known_is_checked_when_it_is():
    mesh = Simulation(ready=False, budget=bytes_of("decode", 9))
    mesh.join()
    mesh.submit("large", frames=257)
    mesh.submit("small", frames=9)
    mesh.regroup()
    mesh.run()
    assert mesh.ends["large"].code == "out_of_memory"
    assert isinstance(mesh.ends["small"], Completed)


def test_the_real_size_of_wan_at_480p_is_gigabytes():
    """The budget is about what a machine has: 81 frames of 832x480 with the 1.3B model's VAE."""
    card = replace(card_for(_configs()), vae_base_dim=96, vae_patch=1)
    params = CARD.check(SamplingParams(prompt="a cat", height=480, width=832, num_frames=81))
    assert 1 << 30 < card.state_bytes(params, "decode") < 16 << 30


@pytest.mark.parametrize("build", [build_tiny_wan, build_tiny_flux, build_tiny_qwen_image])
def test_sizes_by_the_files_are_those_of_the_weights_that_a_rank_holds(build, tmp_path):
    rank = SingleRank(build(tmp_path / "model"), tmp_path / "spool")
    tuner = tuner_for(Config(device="cpu", dit_precision="fp32"), tmp_path / "model", rank.card)
    modules = {name: part for name, part in vars(rank.family).items() if isinstance(part, torch.nn.Module)}
    held = {name: sum(p.numel() * 4 for p in module.parameters()) for name, module in modules.items()}
    assert (held.pop("denoiser"), held.pop("vae")) == (tuner.weights.denoiser, tuner.weights.vae)
    assert sum(held.values()) == tuner.weights.encoders
    whole = tuner_for(Config(device="cpu", vae_config=VaeConfig(load_encoder=True)), tmp_path / "model", rank.card)
    assert whole.weights.vae > tuner.weights.vae


@pytest.mark.parametrize(
    ("build", "asked"),
    [
        (build_tiny_wan, {}),
        (partial(build_tiny_wan, patched_vae=True), {}),
        (build_tiny_flux, {"num_frames": None, "guidance_scale": None}),
        (
            build_tiny_qwen_image,
            {"num_frames": None, "guidance_scale": None, "true_cfg_scale": 4.0, "negative_prompt": "ugly " * 600},
        ),
    ],
    ids=["wan", "patched wan", "flux", "qwen-image"],
)
def test_what_is_booked_covers_what_a_request_really_holds(build, asked, tmp_path):
    """Every tensor that is reachable from a state, with the longest prompt, after each step and each chunk."""
    rank = SingleRank(build(tmp_path / "model"), tmp_path / "spool")
    wanted = {"prompt": "circle " * 600, "height": 64, "width": 96, "num_frames": 17}
    request = rank.request("a", **{**wanted, **asked})
    state, booked = rank.encode(request), partial(rank.card.state_bytes, request.params)
    denoising, decoding = [held_bytes(state)], []
    for _ in range(STEPS):
        rank.denoise(1, "a")
        denoising.append(held_bytes(state))
    state.decoder = rank.family.decode(state)
    for _ in rank.card.decode_chunks(request.params):
        next(state.decoder)
        decoding.append(held_bytes(state))
    assert max(denoising) <= booked("denoise") <= 2 * max(denoising)
    assert max(decoding) <= booked("decode") <= 3 * max(decoding)


def held_bytes(state):
    """Of the storages behind a state's tensors: its attributes, its solver's, and what its open decode has at hand."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(state, set())}.values())


def _tensors(thing, seen):
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    if inspect.isgenerator(thing):
        thing = {name: value for name, value in thing.gi_frame.f_locals.items() if name != "self"}
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else None
    for part in vars(thing).values() if parts is None and hasattr(thing, "__dict__") else parts or ():
        yield from _tensors(part, seen)


def _configs():
    from fake_mesh import demo_model

    return demo_model().configs
