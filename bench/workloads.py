"""Arrival traces as data: who asks for what, and when. Knows no mesh and no clock; bench/serving.py and
bench/simulate.py replay the same files.

A trace is a JSON line per request, in order of arrival, with the fields of `Arrival`. `python -m bench.workloads mix
--rate 2 --count 100 --seed 1` writes one to stdout. Those in bench/traces/ are of the mix at one request a second, 300
each, seeds 0 to 2: what serving is measured with, at a rate that suits the machine.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

BURST_FACTOR, BURST_SHARE, BURST_LENGTH = 5.0, 0.1, 20.0
"""Bursts: the rate is 5 times that of quiet times for 10 % of the time; one lasts 20 mean gaps on average."""

PROMPTS = tuple(
    f"a {colour} {thing} moving {way}"
    for colour in ("red", "green", "blue", "yellow")
    for thing in ("circle", "square")
    for way in ("left", "right", "up", "down")
)


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a trace."""

    id: str
    arrival_s: float
    """Seconds after the trace's start."""
    key: str
    """Name of the API key that it is charged to."""
    prompt: str
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    timeout_s: float | None = None
    """Seconds after its arrival at which it is given up."""
    slo_s: float | None = None
    """Latency that counts as good; unset: a multiple of its time alone on the mesh."""

    @property
    def group(self) -> str:
        """Its class in tables: what it asks for, in words."""
        return f"{self.width}x{self.height}x{self.num_frames} {self.num_inference_steps} steps"


@dataclass(frozen=True)
class Shape:
    """What one class of requests asks for, and how often."""

    weight: float
    num_frames: int
    height: int
    width: int
    steps: int
    guidance: float = 3.0
    slo_s: float | None = None


Mix = tuple[Shape, ...]
Clock = Callable[[float, int, random.Random], list[float]]
"""(requests per second, how many, randomness) -> times of arrival."""


@dataclass(frozen=True)
class Phase:
    """A stretch of time with its own rate and mix."""

    seconds: float
    per_minute: float
    weights: tuple[float, ...]


def poisson(rate: float, count: int, random_: random.Random) -> list[float]:
    """Exponential gaps."""
    now, times = 0.0, list[float]()
    for _ in range(count):
        now += random_.expovariate(rate)
        times.append(now)
    return times


def bursty(rate: float, count: int, random_: random.Random) -> list[float]:
    """A Markov-modulated Poisson process of two states with the mean `rate`."""
    quiet = rate / (1 - BURST_SHARE + BURST_SHARE * BURST_FACTOR)
    burst_s = BURST_LENGTH / rate
    stay = {True: burst_s, False: burst_s * (1 - BURST_SHARE) / BURST_SHARE}
    now, times = 0.0, list[float]()
    burst = random_.random() < BURST_SHARE
    until = random_.expovariate(1 / stay[burst])
    while len(times) < count:
        gap = random_.expovariate(quiet * BURST_FACTOR if burst else quiet)
        if now + gap < until:
            now += gap
            times.append(now)
        else:
            # Exponential gaps have no memory: the rest of this one is drawn anew at the new rate.
            now, burst = until, not burst
            until = now + random_.expovariate(1 / stay[burst])
    return times


def paced(rate: float, count: int, random_: random.Random) -> list[float]:
    """A fixed gap (W4)."""
    return [number / rate for number in range(count)]


@dataclass(frozen=True)
class Workload:
    """A mix and the way in which it arrives; the rate is chosen later."""

    about: str
    mix: Mix
    clock: Clock = poisson
    count: int = 300
    constants: str = ""
    """File of costs under bench/ that it is meant for."""
    phases: tuple[Phase, ...] = ()
    """Instead of a clock: `rate` then stretches the time until the mean rate is met."""

    def trace(self, rate: float, seed: int, count: int | None = None, keys: int = 1) -> list[Arrival]:
        """Requests at `rate` per second on average; the same arguments give the same trace."""
        random_ = random.Random(f"{self.about} {seed}")
        if self.phases:
            drawn = _through_phases(self.phases, self.mix, rate, random_)
        else:
            times = self.clock(rate, count or self.count, random_)
            weights = [shape.weight for shape in self.mix]
            drawn = list(zip(times, random_.choices(self.mix, weights, k=len(times)), strict=True))
        return [_arrival(number, time, shape, keys, random_) for number, (time, shape) in enumerate(drawn)]


def _through_phases(
    phases: tuple[Phase, ...], mix: Mix, rate: float, random_: random.Random
) -> list[tuple[float, Shape]]:
    own_rate = sum(p.seconds * p.per_minute / 60 for p in phases) / sum(p.seconds for p in phases)
    stretch = own_rate / rate
    drawn: list[tuple[float, Shape]] = []
    start = 0.0
    for phase in phases:
        now = start + random_.expovariate(phase.per_minute / 60) if phase.per_minute else start + phase.seconds
        while now < start + phase.seconds:
            drawn.append((now * stretch, random_.choices(mix, phase.weights)[0]))
            now += random_.expovariate(phase.per_minute / 60)
        start += phase.seconds
    return drawn


def _arrival(number: int, time: float, shape: Shape, keys: int, random_: random.Random) -> Arrival:
    return Arrival(
        id=f"r{number:05d}",
        arrival_s=round(time, 6),
        key=f"k{random_.randrange(keys)}",
        prompt=random_.choice(PROMPTS),
        num_frames=shape.num_frames,
        height=shape.height,
        width=shape.width,
        num_inference_steps=shape.steps,
        guidance_scale=shape.guidance,
        seed=random_.randrange(2**31),
        slo_s=shape.slo_s,
    )


# ---- the workloads of the papers, as far as one fixed layout can express them -----------------------------------

SHORT, LONG = Shape(0.8, 1, 64, 64, 4), Shape(0.2, 17, 64, 64, 50)
DEMO, W1_COSTS, W2_COSTS = (
    "results/constants_demo_2ranks.json",
    "constants/w1_image_synthetic.json",
    "constants/w2_video_synthetic.json",
)
W1_SLO = {256: 1.5, 512: 2.0, 1024: 3.0, 2048: 5.0}
W1_SKEW = {256: 0.167, 512: 0.175, 1024: 0.211, 2048: 0.447}
W1_STEPS = 20
SIZES = ((256, 448), (480, 832), (704, 1280))
"""(height, width) of "256p", "480p", "720p" where both must divide by 32."""


def _w1(weights: dict[int, float], scale: float = 1.0) -> Mix:
    return tuple(Shape(w, 1, size, size, W1_STEPS, 1.0, W1_SLO[size] * scale) for size, w in weights.items())


def _w2(videos: float) -> Mix:
    images = [Shape((1 - videos) / 3, 1, height, width, 50, 5.0) for height, width in SIZES]
    return (*images, *(Shape(videos / 3, 81, height, width, 50, 5.0) for height, width in SIZES))


W3_MIX = (Shape(1, 49, 480, 832, 50, 5.0), Shape(1, 81, 480, 832, 50, 5.0), Shape(1, 81, 704, 1280, 50, 5.0))
S, M, L, NONE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)
FRONT = (0.85, 0.10, 0.05)
W3 = {
    "short": (
        Phase(60, 0.8, (0.5, 0.35, 0.15)),
        Phase(300, 1.5, (0.55, 0.35, 0.1)),
        Phase(180, 2.5, (0.7, 0.25, 0.05)),
        Phase(60, 0, NONE),
    ),
    "foreground": (
        Phase(180, 0.5, (0, 0.4, 0.6)),
        Phase(180, 3, FRONT),
        Phase(540, 0.8, (0.3, 0.3, 0.4)),
        Phase(180, 3, FRONT),
        Phase(720, 0.5, (0.4, 0.3, 0.3)),
    ),
    "inflight": (Phase(300, 0.6, L), Phase(300, 0, NONE), Phase(180, 4, S), Phase(720, 0, NONE)),
    "trident": (
        Phase(600, 0.8, (0.5, 0.35, 0.15)),
        Phase(900, 1.4, (0.35, 0.4, 0.25)),
        Phase(900, 2.4, (0.5, 0.3, 0.2)),
        Phase(600, 1.2, (0.2, 0.35, 0.45)),
        Phase(600, 0.6, (0.55, 0.35, 0.1)),
    ),
}

UNIFORM = dict.fromkeys(W1_SLO, 0.25)
WORKLOADS: dict[str, Workload] = {
    "mix": Workload("short and long: 80 % stills of 4 steps, 20 % videos of 50", (SHORT, LONG), constants=DEMO),
    "mix-bursty": Workload("short and long, in bursts", (SHORT, LONG), bursty, constants=DEMO),
    "w1-uniform": Workload("TetriServe, uniform sizes", _w1(UNIFORM), constants=W1_COSTS),
    "w1-skewed": Workload("TetriServe, mostly large", _w1(W1_SKEW), constants=W1_COSTS),
    **{
        f"w2-{share}{suffix}": Workload(
            f"GenServe, {share} % videos{suffix}", _w2(share / 100), clock, count=100, constants=W2_COSTS
        )
        for share in (20, 50, 80)
        for suffix, clock in {"": poisson, "-bursty": bursty}.items()
    },
    **{
        f"w3-{name}": Workload(f"GF-DiT, {name}", W3_MIX, constants=W2_COSTS, phases=phases)
        for name, phases in W3.items()
    },
    **{
        f"w6-{size}": Workload(f"one size of TetriServe, {size}", _w1({size: 1.0}, 1.5), constants=W1_COSTS)
        for size in W1_SLO
    },
}


# ---- files ------------------------------------------------------------------------------------------------------


TRACES = tuple(Path(__file__).parent / "traces" / f"mix_{seed}.jsonl" for seed in range(3))


def at_rate(trace: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests in the same order, all gaps stretched alike, so that `rate` arrive per second on average."""
    own = len(trace) / trace[-1].arrival_s
    return [msgspec.structs.replace(arrival, arrival_s=arrival.arrival_s * own / rate) for arrival in trace]


def write_trace(trace: Sequence[Arrival], path: Path) -> None:
    path.write_bytes(encode_trace(trace))


def encode_trace(trace: Sequence[Arrival]) -> bytes:
    return b"".join(msgspec.json.encode(arrival) + b"\n" for arrival in trace)


def read_trace(path: Path) -> list[Arrival]:
    return [msgspec.json.decode(line, type=Arrival) for line in path.read_bytes().splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.workloads", description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--rate", type=float, required=True, help="requests per second, mean")
    parser.add_argument("--count", type=int, help="requests; unset: the workload's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keys", type=int, default=1, help="API keys that they are spread over")
    args = parser.parse_args()
    trace = WORKLOADS[args.workload].trace(args.rate, args.seed, args.count, args.keys)
    sys.stdout.buffer.write(encode_trace(trace))


if __name__ == "__main__":
    main()
