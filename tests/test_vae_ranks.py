"""A decode over several ranks by strips of rows equals the decode on one, for every kind of VAE."""

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_wan import build_tiny_wan

from workers.parallel.comm import Group
from workers.parallel.vae import exchange_halo, strip_rows

BOUND = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folders of one pipeline of each family, as one word."""
    place = tmp_path_factory.mktemp("tiny")
    builders = {"wan": build_tiny_wan, "flux": build_tiny_flux, "qwen": build_tiny_qwen_image}
    return ",".join(str(build(place / name)) for name, build in builders.items())


def run(tmp_path, num_ranks, folder, mutation="none"):
    run_ranks(num_ranks, "ranks_vae.py", str(folder), str(tmp_path), mutation)
    return [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(num_ranks)]


def differences(tensors):
    """(VAE, rows) -> largest difference of the strips from the whole decode, relative to the pixels' spread."""
    cases = [name.removesuffix("/whole") for name in tensors if name.endswith("/whole")]
    return {
        case: (
            (tensors[f"{case}/strips"] - tensors[f"{case}/whole"]).abs().max() / tensors[f"{case}/whole"].std()
        ).item()
        for case in cases
    }


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_strips_equal_the_whole_frame(tmp_path, tiny, num_ranks):
    ranks = run(tmp_path, num_ranks, tiny)
    for tensors in ranks:
        found = differences(tensors)
        print(found)
        assert {case.split("/")[0] for case in found} == {"wan", "wan22", "qwen", "kl"}
        assert max(found.values()) <= BOUND, found
    # What the one rank that sends frames gets through the executor, against every rank's own decode.
    names = [f"{family}/{shape}" for family in ("wan", "flux", "qwen_image") for shape in ("tall", "flat", "other")]
    for name in names:
        together = ranks[0][f"executed/{name}/together"]
        for tensors in ranks:
            alone = tensors[f"executed/{name}/alone"]
            assert together.shape == alone.shape
            assert (together.int() - alone.int()).abs().max() <= 1
            assert (together != alone).float().mean() < 1e-3, "more than a rounding here and there"


@pytest.mark.parametrize(("mutation", "victims"), [("halo", {"wan", "wan22", "qwen", "kl"}), ("moments", {"kl"})])
def test_a_wrong_exchange_is_caught(tmp_path, tiny, mutation, victims):
    found = differences(run(tmp_path, 2, tiny, mutation)[0])
    for case, difference in found.items():
        assert (difference > 100 * BOUND) == (case.split("/")[0] in victims), f"{case}: {difference:.1e}"


def test_rows_of_the_strips():
    group = Group(4, 0)
    assert strip_rows(11, group) == [3, 3, 3, 2]
    assert strip_rows(4, group) == [1, 1, 1, 1]
    assert strip_rows(3, group) == [3], "fewer rows than ranks: in one piece"


def test_a_strip_shorter_than_the_reach_is_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="shorter than the 2 rows"):
        exchange_halo(torch.zeros(1, 1, 1, 3), 2, Group(2, 0))
