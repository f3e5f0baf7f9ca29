"""Collects what a GPU machine without network lacks: wheels of this environment's own versions, without torch.

`make gpu-wheels` here, then `make gpu` there: that installs them beside the machine's torch, runs the tests that need a
GPU, and bench/gpu.py. The gateway stays at home, so its media and database packages do too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = (
    "accelerate",
    "diffusers",
    "ftfy",
    "huggingface-hub",
    "msgspec",
    "nvidia-ml-py",
    "packaging",
    "pillow",
    "psutil",
    "pytest",
    "pytest-timeout",
    "pyzmq",
    "safetensors",
    "structlog",
    "tokenizers",
    "transformers",
)
"""What runtime/, workers/, bench/gpu.py and tests/test_gpu.py import."""
LEFT_OUT = {"torch", "numpy", "hf-xet"}
"""The first two are there already, and large; the third downloads, which nobody does there."""
GLIBC = range(5, 40)
"""Wheels are named by the oldest glibc 2.x that they run on, and pip takes the names literally."""
MOST_BYTES = 48 << 20
"""Small enough to be copied with the repository in one go."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_wheels", description=__doc__)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="the GPU machine's")
    parser.add_argument("--folder", type=Path, default=Path(".wheels"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir()
    pins = args.folder / "requirements.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in sorted(closure(ROOTS).items())))
    subprocess.run([*download(args.python), "--dest", args.folder, "--requirement", pins], check=True)
    wheels = [*args.folder.glob("*.whl")]
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {total / (1 << 20):.1f} MiB of at most {MOST_BYTES >> 20}")
    return 0 if total < MOST_BYTES else 1


def closure(roots: Iterable[str]) -> dict[str, str]:
    """Every package that these need here, and its installed version."""
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name in LEFT_OUT:
            continue
        known = distribution(name)
        found[name] = known.version
        needs = (Requirement(line) for line in known.requires or ())
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def download(python: str) -> list[str]:
    """pip, for another machine than this one."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += [f"--platform=manylinux{year}_x86_64" for year in ("1", "2010", "2014")]
    target = [f"--python-version={python}", "--implementation=cp", *platforms]
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *target]


if __name__ == "__main__":
    sys.exit(main())
