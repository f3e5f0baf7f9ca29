"""Faults put in on purpose: the bound of a parity test must notice each of them a hundredfold."""

from contextlib import contextmanager
from unittest import mock

from workers import executor
from workers.parallel import ring, ulysses
from workers.state import RequestState


def mutations_of(layout):
    """The faults that a layout can show; what runs on one rank has at least its timestep."""
    found = ["heads", "tokens"] if layout.ulysses > 1 else []
    found += ["merge", "rotation"] if layout.ring > 1 else []
    found += ["branches"] if layout.cfg > 1 else []
    return found or ["timestep"]


@contextmanager
def broken(name):
    """ "none" breaks nothing."""
    if name == "none":
        yield
        return
    owner, attribute, wrong = FAULTS[name]()
    with mock.patch.object(owner, attribute, wrong):
        yield


def _heads():
    """Heads come back in the wrong order."""
    right = ulysses.gather_heads
    return ulysses, "gather_heads", lambda *args: right(*args).roll(1, dims=2)


def _tokens():
    """Another rank's tokens first; keys and values change places too, or attention would not care."""
    right = ulysses.gather_tokens

    def wrong(tensors, sizes, group):
        return tuple(x.roll(max(sizes), dims=1) for x in reversed(right(tensors, sizes, group)))

    return ulysses, "gather_tokens", wrong


def _merge():
    """Parts averaged, as if every share of the keys had the same log-sum-exp."""
    return ring, "merge", lambda merged, part: part if merged is None else ((merged[0] + part[0]) / 2, part[1])


class _Stale:
    """A transfer whose result is overlooked."""

    def __init__(self, coming, old):
        self.coming, self.old = coming, old

    def wait(self):
        fresh = self.coming.wait()
        return self.old if self.old.shape == fresh.shape else fresh.flip(0)


def _rotation():
    """Keys and values of the turn before, where the shapes allow it."""
    right = ring.ring_attention

    class Stuck:
        def __init__(self, group):
            self.group, self.size, self.rank = group, group.size, group.rank

        def start_exchange(self, kv, shape):
            return _Stale(self.group.start_exchange(kv, shape), kv)

    return ring, "ring_attention", lambda q, k, v, sizes, group, *rest: right(q, k, v, sizes, Stuck(group), *rest)


def _branches():
    """The guidance branches change places."""
    right = executor.gather_branches

    def swapped(mine, branches, group):
        found = right(mine, branches, group)
        return dict(zip(found, reversed(found.values()), strict=True))

    return executor, "gather_branches", swapped


def _timestep():
    """Every request is told the timestep of the step before."""
    return RequestState, "timestep", property(lambda state: state.solver.timesteps[max(state.step - 1, 0)])


FAULTS = {
    "heads": _heads,
    "tokens": _tokens,
    "merge": _merge,
    "rotation": _rotation,
    "branches": _branches,
    "timestep": _timestep,
}
