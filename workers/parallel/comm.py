"""All tensor traffic between ranks: one `Group`, its transfers, and a count of what they moved. Knows no attention.

Shapes are the same arithmetic on every rank and are computed before a transfer is entered: a mismatch inside gloo
aborts the process. `start_*` give a `Pending`, so that a kernel can run while the tensors travel.

Three backends: `nccl` for CUDA tensors, `gloo` for CPU tensors, and `staged`, which takes CUDA tensors through pinned
host memory over gloo, so that several ranks can share one GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from runtime.layout import share_sizes


@dataclass
class Traffic:
    """What this rank sent to other ranks, by kind of transfer (all_to_all, exchange, all_gather, all_reduce)."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += num_bytes

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


class Pending:
    """A transfer under way. Holds its buffers; `wait` must be called once, on every rank."""

    def __init__(self, works: Sequence[dist.Work], finish: Callable[[], torch.Tensor], *kept: torch.Tensor) -> None:
        self._works = works
        self._finish = finish
        self._kept = kept

    def wait(self) -> torch.Tensor:
        """What was received; on CUDA the current stream waits, not the host."""
        for work in self._works:
            work.wait()
        received = self._finish()
        self._kept = ()
        return received


@dataclass(frozen=True)
class Group:
    """Some ranks that exchange tensors; `rank` is this process's place among them. Alone, it moves nothing."""

    size: int
    rank: int
    process_group: dist.ProcessGroup | None = None
    staged: bool = False
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def share(self, total: int) -> list[int]:
        """`total` things over the members, the first ones one more."""
        return share_sizes(total, self.size)

    # ---- transfers -----------------------------------------------------------------------------------------------

    def all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Rows of x, cut into `send[peer]` rows for each peer -> `sum(receive)` rows, `receive[peer]` from each."""
        return self.start_all_to_all(x, send, receive).wait()

    def start_all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        if x.shape[0] != sum(send) or send[self.rank] != receive[self.rank]:
            raise ValueError(f"all-to-all of {x.shape[0]} rows: send {list(send)}, receive {list(receive)}")
        if self.size == 1:
            return Pending((), lambda: x)
        row = x.shape[1:].numel()
        shape = (sum(receive), *x.shape[1:])
        return self._start("all_to_all", x, [row * rows for rows in send], [row * rows for rows in receive], shape)

    def start_exchange(self, x: torch.Tensor, shape: Sequence[int]) -> Pending:
        """One place round the ring: x goes to the next member, a tensor of `shape` comes from the one before."""
        if self.size == 1:
            return Pending((), lambda: x)
        # Not by isend and irecv: over gloo, on busy cores, a step of a small model then took up to twice as long.
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        send = [x.numel() * (peer == following) for peer in range(self.size)]
        receive = [math.prod(shape) * (peer == before) for peer in range(self.size)]
        return self._start("exchange", x, send, receive, shape)

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """x with `sizes[rank]` along `dim` -> the whole tensor, `sum(sizes)` along `dim`, on every rank."""
        return self.start_all_gather(x, dim, sizes).wait()

    def start_all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> Pending:
        if x.shape[dim] != sizes[self.rank]:
            raise ValueError(f"all-gather along {dim}: rank {self.rank} has {x.shape[dim]}, not one of {list(sizes)}")
        if self.size == 1:
            return Pending((), lambda: x)
        # gloo gathers equal sizes only: pad to the largest share and cut afterwards.
        mine, most = x.transpose(0, dim), max(sizes)
        if mine.shape[0] < most:
            mine = torch.cat([mine, mine.new_zeros(most - mine.shape[0], *mine.shape[1:])])
        outgoing = self._outgoing(mine)
        parts = [self._incoming(mine, mine.shape) for _ in range(self.size)]
        self._count("all_gather", mine, mine.numel() * (self.size - 1))
        work = dist.all_gather(parts, outgoing, group=self.process_group, async_op=True)

        def whole() -> torch.Tensor:
            cut = [self._arrived(part, x)[:size] for part, size in zip(parts, sizes, strict=True)]
            return torch.cat(cut).transpose(0, dim)

        return Pending((work,), whole, outgoing)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x, the same shape everywhere -> its sum over the members; x itself stays as it is."""
        if self.size == 1:
            return x
        total = self._outgoing(x).clone()
        # As a ring does it: a reduce-scatter, then an all-gather.
        self._count("all_reduce", x, 2 * x.numel() * (self.size - 1) // self.size)
        dist.all_reduce(total, group=self.process_group)
        return self._arrived(total, x)

    def _start(self, kind: str, x: torch.Tensor, send: list[int], receive: list[int], shape: Sequence[int]) -> Pending:
        """So many values of x for each peer, in order; what comes from each, in order, makes a tensor of `shape`."""
        values, out = self._outgoing(x).view(-1), self._incoming(x, shape)
        self._count(kind, x, sum(send) - send[self.rank])
        work = dist.all_to_all_single(out.view(-1), values, receive, send, group=self.process_group, async_op=True)
        return Pending((work,), lambda: self._arrived(out, x), values)

    def warm_up(self, device: torch.device) -> None:
        """Bring the group's communicators to life; all members must call it, in one global order of groups."""
        if self.size == 1:
            return
        token = torch.zeros(self.size, device=device)
        ones = [1] * self.size
        self.all_reduce(token)
        self.all_gather(token[:1], 0, ones)
        self.all_to_all(token, ones, ones)
        self.start_exchange(token, token.shape).wait()
        self.traffic.clear()

    # ---- host memory on the way ----------------------------------------------------------------------------------

    def _outgoing(self, x: torch.Tensor) -> torch.Tensor:
        """What is handed to torch.distributed: x itself, or its copy in host memory, already complete."""
        if not self.staged:
            return x.contiguous()
        host = _host(x.shape, x)
        host.copy_(x, non_blocking=True)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        return host

    def _incoming(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return _host(shape, like) if self.staged else like.new_empty(tuple(shape))

    def _arrived(self, received: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return received.to(like.device, non_blocking=True) if self.staged else received

    def _count(self, kind: str, x: torch.Tensor, numel: int) -> None:
        self.traffic.add(kind, numel * x.element_size())


def _host(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Host memory, pinned if `like` is on a GPU; torch keeps freed pinned blocks until their copies are done."""
    return torch.empty(tuple(shape), dtype=like.dtype, pin_memory=like.is_cuda)


ALONE = Group(size=1, rank=0)
