"""What a step costs on one GPU: our executor against diffusers' own pipelines, eager and compiled, at real size.

Random weights in bf16, no downloads, one rank. Each round takes a few steps with every contender in turn, on the same
weights and from the same noise; a step ends when the device has done it. The share of the ceiling is the card's
floating-point operations over the time, over what one large matrix product reaches on the same machine.

Predicted, with 60 % of the 790 TFLOP/s that an H200 reaches in bf16 products of 8,192^3:

    Wan2.1-T2V-1.3B   832x480, 81 frames   32,760 tokens, two branches   5.60e+14 FLOPs   1.18 s per step
    FLUX.1-dev        1024x1024             4,608 tokens, one branch     7.44e+13 FLOPs   0.157 s per step
    Qwen-Image        1024x1024             4,160 tokens, two branches   1.39e+14 FLOPs   0.292 s per step

Wan is three quarters attention, whose kernels reach less than products do: rather 45 % there. Ours and diffusers eager
run the same products, so within 5 % of each other; Wan's folded text saves us 3 %, and Qwen-Image's two branches in one
masked forward may cost us its fastest attention kernel. Compiled blocks fuse norms, gates and rotary embeddings: 10 to
25 % fewer seconds than eager.

`--staged` measures nothing: two ranks on one GPU against one, as a check of the CUDA kernels (see bench/gpu_ranks.py).
`--device cpu --scale tiny` takes the very same way in seconds and leaves no result behind.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

from bench import gpu_ranks
from bench.gpu_models import SCALES, Model, Recipe, build, twin
from bench.report import machine, save, shown, spread
from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.traffic import JOINT_TOKENS
from workers.executor import Executor
from workers.peak import peak_bytes, reset_peak

ALONE = Layout()
PREDICTED_SHARE = 0.6
"""Of the ceiling."""
PRECISIONS = {"cpu": torch.float32, "cuda": torch.bfloat16}
PRODUCT = {"cpu": 256, "cuda": 8192}
"""Side of the matrices whose product is the ceiling."""
EAGER = "diffusers eager"
WARM = 3
"""Products before the timed ones."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=[*PRECISIONS], default="cuda")
    parser.add_argument("--scale", choices=[*SCALES], default="real")
    parser.add_argument("--only", choices=[*SCALES["real"]], nargs="+", default=[*SCALES["real"]])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each contender in a round")
    parser.add_argument("--decodes", type=int, default=2)
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile; none: leave it out")
    parser.add_argument("--staged", action="store_true", help="two ranks on one GPU against one, for correctness")
    args = parser.parse_args()
    try:
        device = pick(args.device)
    except InvalidInput as error:
        parser.error(str(error))
    where = machine() | accelerator(device)
    if args.staged:
        figures = gpu_ranks.check(args.device)
        publish("staged", where, figures, device)
        return 1 if figures["out_of_bounds"] else 0
    for figures in measure(args, device):
        publish("", where, figures, device)
    return 0


def pick(name: str) -> torch.device:
    """Raises `InvalidInput` where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device", "there is no CUDA device; --device cpu --scale tiny shows that the script works")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def accelerator(device: torch.device) -> dict[str, Any]:
    """The GPU's name and memory, and the versions that its speed depends on."""
    if device.type == "cpu":
        return {"accelerator": None}
    import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    properties = torch.cuda.get_device_properties(device)
    return {
        "accelerator": properties.name,
        "memory": properties.total_memory,
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def publish(variant: str, where: dict[str, Any], figures: dict[str, Any], device: torch.device) -> None:
    """A result of a GPU is kept; what the CPU says of it is no result."""
    if device.type == "cuda":
        save("gpu", where, figures, variant=variant)
    else:
        print(shown("gpu", where, figures))


Marks = list[float]
Run = Callable[[], tuple[Marks, torch.Tensor]]
"""Takes some steps from the same noise: when each of them had ended on the device, and the latents after all."""


# ---- a model -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """All figures so far after each model: whoever is interrupted has those of the others."""
    ceiling = product_rate(device)
    models: dict[str, Any] = {}
    for name in args.only:
        models[name] = measure_model(SCALES[args.scale][name], args, device, ceiling["median"])
        yield {"ceiling_flops": ceiling, "steps_per_round": args.steps, "models": models}
        # The next one needs the room.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def product_rate(device: torch.device, repeats: int = 10) -> dict[str, float]:
    """Floating-point operations per second of one large product of random matrices."""
    side, dtype = PRODUCT[device.type], PRECISIONS[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    marks = []
    for _ in range(WARM + repeats):
        a.matmul(b)
        marks.append(mark(device))
    return spread([2 * side**3 / seconds for seconds in gaps(marks)[WARM - 1 :]])


def measure_model(recipe: Recipe, args: argparse.Namespace, device: torch.device, ceiling: float) -> dict[str, Any]:
    model = build(recipe, device, PRECISIONS[device.type])
    params = recipe.params(args.steps + 1)
    flops = recipe.card.step_flops(params)
    return {
        "tokens": recipe.card.tokens(params),
        "step_flops": flops,
        "predicted_seconds_per_step": flops / (PREDICTED_SHARE * ceiling),
        "contenders": race(contenders(model, args.steps + 1, args.compiler, device), args.rounds, flops, ceiling),
        "decode": measure_decode(model, args.decodes, device),
    }


def contenders(model: Model, steps: int, compiler: str, device: torch.device) -> dict[str, Run]:
    """Everybody on the same weights, from the same noise; for ours also the other way to run guidance branches."""
    executor, compiled = model.executor(), twin(model)
    found: dict[str, Run] = {
        "framemesh": lambda: ours(model, executor, steps, device),
        EAGER: piped(model, twin(model), steps, device),
    }
    if compiler != "none":
        compiled.compile_repeated_blocks(fullgraph=True, backend=compiler)
        found["diffusers compiled"] = piped(model, compiled, steps, device)
    card, params = model.recipe.card, model.recipe.params(steps)
    branches = len(card.branches(params, 0))
    if branches > 1 and branches * card.tokens(params) <= JOINT_TOKENS:
        found["framemesh, a forward per branch"] = lambda: apart(model, executor, steps, device)
    return found


def race(runs: dict[str, Run], rounds: int, flops: float, ceiling: float) -> dict[str, Any]:
    """Each in turn, as often as asked; the first round compiles and warms up, and so does each run's first step."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks, latents = dict.fromkeys(runs, 0), {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            reset_peak()
            marks, latents[name] = run()
            if turn:
                seconds[name] += gaps(marks)
                peaks[name] = max(peaks[name], peak_bytes())
    return {
        name: {
            "seconds_per_step": spread(seconds[name]),
            "share_of_ceiling": spread([flops / took / ceiling for took in seconds[name]]),
            "against_eager": spread([a / b for a, b in zip(seconds[name], seconds[EAGER], strict=True)]),
            "peak_bytes": peaks[name],
            "difference_to_eager": distance(latents[name], latents[EAGER]),
        }
        for name in runs
    }


def ours(model: Model, executor: Executor, steps: int, device: torch.device) -> tuple[Marks, torch.Tensor]:
    state, marks = model.state(steps), []
    with torch.inference_mode():
        for _ in range(steps):
            executor.step([state], ALONE)
            marks.append(mark(device))
    return marks, state.latents


def apart(model: Model, executor: Executor, steps: int, device: torch.device) -> tuple[Marks, torch.Tensor]:
    """Ours, but guidance branches never share a forward: where their texts differ in length, sharing needs a mask."""
    joint, executor.joint_tokens = executor.joint_tokens, 0
    try:
        return ours(model, executor, steps, device)
    finally:
        executor.joint_tokens = joint


def piped(model: Model, denoiser: torch.nn.Module, steps: int, device: torch.device) -> Run:
    """diffusers' own pipeline, called as its users call it."""
    pipeline, words = model.stock(denoiser), model.words(steps)

    def run() -> tuple[Marks, torch.Tensor]:
        marks: Marks = []

        def stepped(*_: Any) -> dict[str, Any]:
            marks.append(mark(device))
            return {}

        (latents,) = pipeline(**words, callback_on_step_end=stepped, return_dict=False)
        return marks, latents

    return run


def measure_decode(model: Model, decodes: int, device: torch.device) -> dict[str, Any]:
    """Seconds until the first chunk of frames and until all, ours and by one call of the VAE, in turn."""
    state, vae = model.state(1), model.family.vae
    found: dict[str, list[float]] = {"first_chunk_seconds": [], "whole_seconds": [], "diffusers_whole_seconds": []}
    with torch.inference_mode():
        for turn in range(decodes + 1):
            marks = [mark(device), *(mark(device) for _ in model.family.decode(state))]
            begun = mark(device)
            vae.decode(model.vae_latents(state), return_dict=False)
            values = marks[1] - marks[0], marks[-1] - marks[0], mark(device) - begun
            for name, value in zip(found, values, strict=True):
                if turn:
                    found[name].append(value)
    return {name: spread(values) for name, values in found.items()} | {"peak_bytes": peak_bytes()}


# ---- arithmetic --------------------------------------------------------------------------------------------------


def mark(device: torch.device) -> float:
    """Now, with nothing left to do on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gaps(marks: Marks) -> list[float]:
    """Seconds between the marks; those before the first one are not known."""
    return [after - before for before, after in pairwise(marks)]


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Root of the mean square of the difference, over that of y."""
    return (((x - y).double().square().mean() / y.double().square().mean()) ** 0.5).item()


if __name__ == "__main__":
    sys.exit(main())
