"""Scripts of everything that can happen to a scheduler, played against simulated ranks and gateways.

`python tests/scripts.py COUNT` prints a digest of what was planned and told for so many random scripts.
"""

from __future__ import annotations

import hashlib
import random
import sys
from dataclasses import dataclass

from hypothesis import strategies as st
from simulation import KnownCost, Simulation, bytes_of, ids_of

from runtime.protocol import Completed, Decode, Denoise

INDEX, BURST = range(8), range(1, 9)
ARGUMENTS = {
    "submit": (INDEX, range(1, 4), (1, 4, 5, 12), (1, 5, 9, 33), ("", "one", "two"), (0, 0, 0, 1), (64, 64, 32)),
    "hurry": (INDEX, (0.01, 0.2, 2.0)),
    "resubmit": (INDEX, (None, *INDEX)),
    "report": (INDEX, BURST),
    "consume": (INDEX, BURST),
    "join": (range(1, 7),),
    "fail": (INDEX, ("internal_error", "out_of_memory")),
    "lose": ((False, True), range(4)),
    "regroup": (),
    "tell": (),
}
"""What each argument of an action may be; an action that is not here takes an index."""
CALM = {"submit": 4, "report": 16, "send": 3, "consume": 8, "resubmit": 1, "join": 1, "write": 3, "tell": 2}
ROUGH = CALM | {"hurry": 1, "cancel": 2, "fail": 2, "lose": 1, "regroup": 3, "leave": 1, "spoil": 1}
"""Action -> how often, in relation to the others."""


def names_of(weights):
    return [name for name, weight in weights.items() for _ in range(weight)]


@st.composite
def scripts(draw, weights, max_size=60):
    names = draw(st.lists(st.sampled_from(names_of(weights)), min_size=max_size // 3, max_size=max_size))
    return [(name, *(draw(st.sampled_from(options)) for options in ARGUMENTS.get(name, (INDEX,)))) for name in names]


def random_script(random_, size=100):
    names = random_.choices(names_of(ROUGH), k=size)
    return [(name, *(random_.choice(options) for options in ARGUMENTS.get(name, (INDEX,)))) for name in names]


def pick(options, index):
    return sorted(options)[index % len(options)]


def do_submit(mesh, gateway, count, steps, frames, key="", priority=0, side=64, timeout_s=None):
    if mesh.gateways:
        names = [f"r{len(mesh.params) + n}" for n in range(count)]
        terms = {"key": key, "priority": priority, "timeout_s": timeout_s}
        mesh.submit(*names, gateway=pick(mesh.gateways, gateway), steps=steps, frames=frames, side=side, **terms)


def do_hurry(mesh, gateway, timeout_s):
    do_submit(mesh, gateway, 1, 12, 9, "one", timeout_s=timeout_s)


def do_resubmit(mesh, index, gateway):
    """The owner says it again, or a gateway that nobody knows: nothing. Another one: it starts again for that."""
    mesh.settle()
    if known := set(mesh.params) - set(mesh.ends):
        seen, request_id = len(mesh.news), pick(known, index)
        mesh.resubmit(request_id, mesh.owner[request_id])
        mesh.resubmit(request_id, b"any")
        assert len(mesh.news) == seen
        if gateway is not None and mesh.gateways:
            mesh.resubmit(request_id, pick(mesh.gateways, gateway), key="two")


def do_report(mesh, index, count):
    for _ in range(min(count, len(mesh.due))):
        mesh.report(*pick(mesh.due, index))


def do_fail(mesh, index, code):
    if mesh.due:
        mesh.report(*pick(mesh.due, index), (code, "boom"))


def do_write(mesh, index):
    if mesh.writing:
        mesh.write(index % len(mesh.writing))


def do_spoil(mesh, index):
    """A checkpoint cannot be written, or an item finds those that were written unusable."""
    if mesh.writing:
        mesh.write(index % len(mesh.writing), failed=True)
    resumed = [(rank, seq) for rank, seq in mesh.due if getattr(mesh.running[seq], "resume", None)]
    if resumed:
        rank, seq = pick(resumed, index)
        for request_id in ids_of(mesh.running[seq]):
            mesh.files.pop(request_id, None)
            mesh.told.pop(request_id, None)
        mesh.untold = [(name, saved) for name, saved in mesh.untold if name not in ids_of(mesh.running[seq])]
        mesh.report(rank, seq, ("checkpoint_unusable", "gone"))


def do_lose(mesh, full, durable):
    broken = [seq for seq, item in mesh.running.items() if isinstance(item, Denoise)]
    mesh.lose_group(culprit=(broken[0], "out_of_memory") if full and broken else None, durable=durable)


def do_send(mesh, index):
    if sending := [seq for seq, left in mesh.unsent.items() if left]:
        mesh.send_chunk(pick(sending, index))


def do_consume(mesh, index, count):
    for _ in range(count):
        if full := [name for name, gateway in mesh.gateways.items() if gateway.inbox]:
            mesh.consume(pick(full, index))


def do_cancel(mesh, index):
    if mesh.params:
        mesh.cancel(pick(mesh.params, index))


def do_join(mesh, credits):
    if len(mesh.gateways) < 3:
        mesh.join(b"g%d" % mesh.num_joined, credits)


def do_leave(mesh, index):
    if mesh.gateways:
        mesh.leave(pick(mesh.gateways, index))


ACTIONS = {
    "submit": do_submit,
    "hurry": do_hurry,
    "resubmit": do_resubmit,
    "report": do_report,
    "fail": do_fail,
    "send": do_send,
    "consume": do_consume,
    "cancel": do_cancel,
    "join": do_join,
    "leave": do_leave,
    "lose": do_lose,
    "write": do_write,
    "tell": Simulation.tell,
    "spoil": do_spoil,
    "regroup": Simulation.regroup,
}
"""The lines of a script; one that makes no sense now does nothing."""


@dataclass(frozen=True)
class Setting:
    """What a mesh was started with."""

    num_ranks: int
    policy: str
    growth: float
    budget: int | None
    checkpoint_every: int = 0
    decode_on_all: bool = False


SETTING = (
    (1, 2, 3),
    ("srpt", "fifo", "deadline"),
    (1.0, 0.5),
    (None, bytes_of("decode", 33), bytes_of("decode", 33) * 2, bytes_of("decode", 9)),
    (0, 1, 4),
    (False, True),
)
SETTINGS = st.builds(Setting, *(st.sampled_from(options) for options in SETTING))


def play(script, setting):
    """The whole script, then calm until nothing is left to do."""
    cost = KnownCost(growth=setting.growth)
    mesh = Simulation(
        num_ranks=setting.num_ranks,
        policy=setting.policy,
        cost=cost,
        budget=setting.budget,
        checkpoint_every=setting.checkpoint_every,
        decode_on_all=setting.decode_on_all,
    )
    mesh.join(b"first", 2)
    for name, *arguments in script:
        mesh.now += 0.01
        ACTIONS[name](mesh, *arguments)
        assert set(mesh.scheduler.requests) == set(mesh.params) - set(mesh.ends)
    mesh.regroup()
    mesh.run()
    # Nobody comes any more for those whose gateway left.
    mesh.now += 1000
    mesh.settle()
    mesh.run()
    return mesh


def check_end(mesh):
    assert set(mesh.ends) == set(mesh.params), "lost or stuck"
    assert mesh.scheduler.idle
    assert mesh.states == {}, "never released"
    assert mesh.files == {}, "the spool was not swept"
    for request_id, end in mesh.ends.items():
        if isinstance(end, Completed):
            done = sum(item.steps for item in mesh.items_of(Denoise, request_id))
            chunks = sum(item.chunks for item in mesh.items_of(Decode, request_id))
            total, frames = mesh.params[request_id].num_inference_steps, mesh.total_chunks(request_id)
            assert (done, chunks) == (total, frames) or (request_id in mesh.disturbed and done >= total)
    for name, gateway in mesh.gateways.items():
        mesh.budget = None
        mesh.regroup()
        spare = mesh.spare_credits(name)
        assert spare == gateway.limit, "credits leaked" if spare < gateway.limit else "credits from nowhere"


def digest(count):
    """Of every item and every word of so many random scripts."""
    told = hashlib.sha256()
    for seed in range(count):
        random_ = random.Random(seed)
        mesh = play(random_script(random_), Setting(*(random_.choice(options) for options in SETTING)))
        told.update(repr((mesh.items, mesh.news, mesh.ends)).encode())
    return told.hexdigest()


if __name__ == "__main__":
    print(digest(int(sys.argv[1])))
