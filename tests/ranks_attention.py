"""One rank of an attention run: every case on every SP layout of these ranks against attention on whole tensors."""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from mutations import broken, mutations_of
from toy_joint import PLAN, Toy

from runtime.layout import Layout
from workers.attention.backends import KERNELS, as_bias
from workers.parallel import usp
from workers.parallel.cfg import branches_of, gather_branches
from workers.parallel.groups import init_distributed, make_groups, warm_up
from workers.parallel.sequence import SequenceParallel
from workers.parallel.yunchang_engine import YunchangEngine

KERNEL = KERNELS["torch_sdpa"]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(q, k, v, bias=None):
    """fp64 on whole tensors, (B, S, H, D); the oracle."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias.double()
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


class Case:
    """Whole tensors, and the part of each that a rank holds."""

    def __init__(self, q, k, v, streams, kv_streams=None, key_bias=None, bias=None):
        self.q, self.k, self.v, self.key_bias, self.bias = q, k, v, key_bias, bias
        self.streams, self.kv_streams = streams, kv_streams or streams

    def run(self, groups, engine=usp.usp_attention):
        """(this rank's output, the oracle's rows for it)."""
        sp = groups.sp
        q_sizes, q_mine = shares(self.streams, sp)
        kv_sizes, kv_mine = shares(self.kv_streams, sp)
        # Columns in rank order, as the ranks' tokens follow each other after an exchange.
        order = torch.cat([shares(self.kv_streams, sp, rank)[1] for rank in range(sp.size)])
        key_bias = None if self.key_bias is None else self.key_bias[..., kv_mine]
        bias = self.bias
        if bias is not None:
            bias = (bias if bias.shape[2] == 1 else bias[:, :, q_mine])[..., order]
        spread = usp.spread_bias(key_bias, bias, self.q.shape[2], q_sizes, kv_sizes, groups)
        q, k, v = self.q[:, q_mine], self.k[:, kv_mine], self.v[:, kv_mine]
        out = engine(q, k, v, q_sizes, kv_sizes, groups, KERNEL, spread)
        return out, self.oracle()[:, q_mine]

    def oracle(self):
        biases = [b for b in (self.key_bias, self.bias) if b is not None]
        return whole(self.q, self.k, self.v, sum(biases) if biases else None)

    def error(self, groups, engine=usp.usp_attention):
        out, right = self.run(groups, engine)
        assert out.shape == right.shape, (out.shape, right.shape)
        return (out.double() - right).abs().max().item() if out.numel() else 0.0


def shares(streams, group, rank=None):
    """(tokens per rank, indices of this rank's tokens in the whole sequence) of streams that follow each other."""
    rank = group.rank if rank is None else rank
    sizes, indices, start = [0] * group.size, [], 0
    for total in streams:
        cut = group.share(total)
        sizes = [a + b for a, b in zip(sizes, cut, strict=True)]
        first = start + sum(cut[:rank])
        indices += range(first, first + cut[rank])
        start += total
    return sizes, torch.tensor(indices, dtype=torch.long)


def cases():
    def tokens(streams, heads, dim, batch=2, dtype=torch.float32, seed=0):
        return [noise(batch, sum(streams), heads, dim, seed=seed + i, dtype=dtype) for i in range(3)]

    for streams, heads, dim in itertools.product([(64,), (67,), (3,), (1,)], [4, 5, 6], [16, 24]):
        yield f"self tokens{streams[0]} heads{heads} dim{dim}", Case(*tokens(streams, heads, dim), streams)
    joint = (7, 30)
    keep = torch.ones(2, 37, dtype=torch.bool)
    keep[0, 3:7] = keep[1, 1:7] = False
    # The whole text of one row hidden, so that shares without a visible key meet in a merge.
    hidden = keep.clone()
    hidden[1, :20] = False
    for heads in (4, 5):
        yield f"joint heads{heads}", Case(*tokens(joint, heads, 24), joint)
        mask, most = as_bias(keep, torch.float32), as_bias(hidden, torch.float32)
        yield f"joint masked heads{heads}", Case(*tokens(joint, heads, 24), joint, key_bias=mask)
        yield f"joint mostly masked heads{heads}", Case(*tokens(joint, heads, 24), joint, key_bias=most)
        yield f"key bias per head heads{heads}", Case(*tokens(joint, heads, 24), joint, key_bias=noise(2, heads, 1, 37))
        yield f"bias heads{heads}", Case(*tokens((37,), heads, 24), (37,), bias=noise(2, 1, 37, 37))
        yield f"bias per head heads{heads}", Case(*tokens((37,), heads, 24), (37,), bias=noise(1, heads, 37, 37))
        yield (
            f"bias and mask heads{heads}",
            Case(*tokens(joint, heads, 24), joint, key_bias=mask, bias=noise(1, heads, 37, 37)),
        )
        q = tokens((29,), heads, 24)[0]
        text = tokens((11,), heads, 24, seed=3)[1:]
        yield f"cross heads{heads}", Case(q, *text, (29,), (11,))
        yield f"cross bias heads{heads}", Case(q, *text, (29,), (11,), bias=noise(1, 1, 1, 11))
        yield f"cross short heads{heads}", Case(q, *(x[:, :1] for x in text), (29,), (1,))


def bf16_errors(groups):
    """Relative RMS error against fp64: (ours, SDPA's on whole tensors)."""
    q, k, v = (noise(1, 512, 4, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    case = Case(q, k, v, (512,))
    out, right = case.run(groups)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def error(x, y):
        return ((x.double() - y).square().mean() / y.square().mean()).sqrt().item()

    return error(out, right), error(plain, case.oracle())


def moved(groups, tokens, heads, dim, batch=2):
    """Bytes by kind that this rank sent for one attention, and what the exact shares say."""
    seen = {id(g): g for g in (groups.sp, groups.ring, groups.ulysses)}.values()
    for group in seen:
        group.traffic.clear()
    Case(*[noise(batch, tokens, heads, dim, seed=i) for i in range(3)], (tokens,)).run(groups)
    found = {}
    for group in seen:
        for kind, count in group.traffic.bytes.items():
            found[kind] = found.get(kind, 0) + count
    sizes, held = groups.sp.share(tokens), groups.ulysses.share(heads)
    mine, u, r = sizes[groups.sp.rank], groups.ulysses, groups.ring
    unit = batch * dim * 4
    rows = [sum(sizes[i * u.size : (i + 1) * u.size]) for i in range(r.size)]
    expected = {}
    if u.size > 1:
        out = 3 * mine * (heads - held[u.rank]) * unit
        back = (rows[r.rank] - mine) * held[u.rank] * unit
        expected["all_to_all"] = out + back
    if r.size > 1:
        sent = sum(rows[(r.rank - turn) % r.size] for turn in range(r.size - 1))
        expected["exchange"] = 2 * sent * held[u.rank] * unit
    return found, expected


def refusals(groups):
    """Shapes that do not fit are refused before anything is sent; the group works on."""
    n = groups.sp.size
    x = noise(1, 4, 4, 8)
    wrong = [(x, x, x, [5] * n, [5] * n), (x, x[:, :3], x, [4] * n, [4] * n), (x, x, x, [4], [4])]
    for args in wrong:
        try:
            usp.usp_attention(*args, groups, KERNEL)
        except ValueError:
            continue
        raise AssertionError("was not refused")
    for call in (
        lambda: groups.sp.start_all_to_all(x[0], [3] * n, [3] * n),
        lambda: groups.sp.all_gather(x, 1, [3] * n),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("was not refused")
    Case(*[noise(1, 4 * n, 4, 8, seed=i) for i in range(3)], (4 * n,)).run(groups)


def collectives(groups):
    """Reductions and a transfer that is under way while something else is computed."""
    sp = groups.sp
    assert sp.all_reduce(torch.tensor([1.0 + sp.rank])).item() == sp.size * (sp.size + 1) / 2
    mine = torch.full((1 << 18,), float(sp.rank))
    coming = sp.start_exchange(mine, mine.shape)
    mine.new_ones(256, 256).matmul(mine.new_ones(256, 256))
    assert (coming.wait() == (sp.rank - 1) % sp.size).all()
    sizes = sp.share(67)
    sp.traffic.clear()
    gathered = sp.all_gather(torch.arange(67).split(sizes)[sp.rank], 0, sizes)
    assert gathered.tolist() == list(range(67))
    padding = sp.traffic.bytes["all_gather"] // 8 // (sp.size - 1) - sizes[sp.rank]
    assert padding == max(sizes) - sizes[sp.rank]
    assert sum(max(sizes) - size for size in sizes) < sp.size
    kept = torch.arange(sp.rank + 1)
    assert sp.all_gather(kept, 0, list(range(1, sp.size + 1))).tolist() == [
        i for n in range(sp.size) for i in range(n + 1)
    ]


def guidance(groups):
    """Branches over guidance groups: more branches than groups, uneven too."""
    for count in range(groups.cfg.size, 5):
        names = [f"branch{i}" for i in range(count)]
        right = {name: noise(2, 3, seed=i) for i, name in enumerate(names)}
        mine = {name: right[name] for name in branches_of(names, groups.cfg)}
        found = gather_branches(mine, names, groups.cfg)
        assert list(found) == names
        assert all(torch.equal(found[name], right[name]) for name in names)


def yunchang_errors(groups, engine):
    """yunchang and we on the same tensors: its error, and the difference between us."""
    q, k, v = (noise(2, 48, 12, 16, seed=i) for i in range(3))
    case = Case(q, k, v, (48,))
    theirs, right = case.run(groups, engine)
    assert not engine._warned, "the native engine stood in"
    ours, _ = case.run(groups)
    return [(theirs - right).abs().max().item(), (theirs - ours).abs().max().item()]


def yunchang_declines(groups, engine):
    """What yunchang cannot take is done by the native engine, and said once."""
    engine._warned.clear()
    odd = Case(*[noise(2, 67, 12, 16, seed=i) for i in range(3)], (67,))
    masked = Case(*[noise(2, 48, 12, 16, seed=i) for i in range(3)], (48,), bias=noise(1, 1, 1, 48))
    heads = Case(*[noise(2, 48, 5, 16, seed=i) for i in range(3)], (48,))
    found = [case.error(groups, engine) for case in (odd, masked, heads, odd)]
    assert len(engine._warned) == 2 + (groups.ulysses.size > 1)
    return found


def hook_errors(groups):
    """The toy joint denoiser over the groups against itself alone, relative to the largest number of its output."""
    toy, found = Toy(), {}
    sequence = SequenceParallel(toy, PLAN, KERNEL, lambda attend: attend)
    for pictures, texts in ((30, 7), (16, 4), (2, 1)):
        picture, text = noise(2, pictures, 8), noise(2, texts, 8, seed=1)
        keep = torch.arange(texts) < torch.tensor([[1], [texts]])
        for name, mask in (("plain", None), ("masked", keep)):
            right = toy(picture, text, mask)
            with sequence.over(groups):
                out = toy(picture, text, mask)
            assert out.shape == right.shape
            found[f"{pictures}+{texts} {name}"] = ((out - right).abs().max() / right.abs().max()).item()
            assert torch.equal(toy(picture, text, mask), right), "the hooks did not let go"
    return found


def yunchang_on_cpu(num_ranks):
    """yunchang's own path for flash kernels, with the CPU's kernel in the place of the CUDA one that it names."""
    from yunchang.kernels import attention

    def flash(q, k, v, dropout_p=0.0, is_causal=False, scale=None, **rest):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)

    attention._scaled_dot_product_flash_attention = flash
    return YunchangEngine(num_ranks, "TORCH_FLASH")


def main(out):
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_distributed("gloo", 60, 0)
    layouts = [Layout(1, num_ranks // u, u) for u in range(1, num_ranks + 1) if num_ranks % u == 0]
    guided = Layout(num_ranks, 1, 1)
    made = make_groups([*layouts, guided], rank, "gloo")
    staged = make_groups(layouts, rank, "staged")
    warm_up(made, torch.device("cpu"))
    backend = made[layouts[0]].replica.process_group._get_backend(torch.device("cpu"))
    report = {
        "timeout_s": backend.options._timeout.total_seconds(),
        "errors": {},
        "staged": {},
        "bf16": {},
        "moved": {},
        "mutations": {},
        "yunchang": {},
        "declined": {},
        "hooks": {},
    }
    with torch.inference_mode():
        theirs = yunchang_on_cpu(num_ranks)
        guidance(made[guided])
        for layout in layouts:
            groups, name = made[layout], f"ring{layout.ring}-ulysses{layout.ulysses}"
            collectives(groups)
            collectives(staged[layout])
            refusals(groups)
            for title, case in cases():
                report["errors"][f"{name} {title}"] = case.error(groups)
                if "heads5" in title:
                    same = torch.equal(case.run(groups)[0], case.run(staged[layout])[0])
                    report["staged"][f"{name} {title}"] = same
            report["bf16"][name] = bf16_errors(groups)
            report["moved"][name] = [moved(groups, 64, 12, 8), moved(groups, 67, 5, 8)]
            report["yunchang"][name] = yunchang_errors(groups, theirs)
            report["declined"][name] = yunchang_declines(groups, theirs)
            theirs._warned.clear()
            report["hooks"] |= {f"{name} {title}": error for title, error in hook_errors(groups).items()}
        # Everything after this line is broken on purpose.
        even = Case(*[noise(2, 16 * num_ranks, 12, 16, seed=i) for i in range(3)], (16 * num_ranks,))
        for layout in layouts:
            for mutation in mutations_of(layout):
                with broken(mutation):
                    name = f"{mutation} ring{layout.ring}-ulysses{layout.ulysses}"
                    report["mutations"][name] = even.error(made[layout])
    Path(out, f"attention{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
