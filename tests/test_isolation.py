"""A request comes out the same alone, in a batch that others join and leave, and next to a cancelled one."""

import pytest
import torch
from ranks import run_ranks
from ranks_batch import WANTED
from safetensors.torch import load_file
from tiny_wan import DEMO


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_company_changes_nothing(tmp_path, num_ranks):
    run_ranks(num_ranks, "ranks_batch.py", str(DEMO), str(tmp_path))
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(num_ranks)]
    for tensors in ranks:
        for name in WANTED:
            alone, batch = (tensors[f"{place}/{name}/latents"] for place in ("alone", "batch"))
            assert (alone - batch).abs().max() <= 1e-4, f"{name} came out different in company"
            frames = [tensors[f"{place}/{name}/frames"].int() for place in ("alone", "batch")]
            assert (frames[0] - frames[1]).abs().max() <= 1
        # The same batch composition is the same to the bit, whatever ran before.
        assert torch.equal(tensors["alone/long/latents"], tensors["again/long/latents"])
        assert torch.equal(tensors["alone/long/frames"], tensors["again/long/frames"])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ranks[0][name]), f"ranks differ in {name}"
    different = (ranks[0]["alone/long/latents"] - ranks[0]["alone/late/latents"]).abs().max()
    assert different > 1e-2, "the comparison would not notice a mix-up"
