"""Which accelerators this host has, how much memory is free, and which of them the ranks get. No torch."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from runtime.errors import InvalidInput

PACKAGES = (
    "framemesh",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "pyzmq",
    "flash-attn",
    "sageattention",
    "yunchang",
)
"""Distributions whose versions `framemesh env` lists."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML sees it; memory in bytes."""

    entry: str
    """How CUDA_VISIBLE_DEVICES names it: the caller's own word for it, else its UUID."""
    uuid: str
    index: int | None
    """NVML's index; None for a MIG slice."""
    name: str
    memory_free: int
    memory_total: int
    capability: str
    driver: str

    def __str__(self) -> str:
        return self.entry if self.index is None else str(self.index)


@dataclass(frozen=True)
class Devices:
    """What the ranks of this host run on, and why."""

    kind: Literal["cuda", "cpu"]
    visible: tuple[str, ...]
    """CUDA_VISIBLE_DEVICES of the workers, one entry per rank; empty on the CPU."""
    reason: str


def pick_devices(num_ranks: int, wanted: Literal["auto", "cuda", "cpu"], *, share: bool = False) -> Devices:
    """One GPU per rank, those with the most free memory; else the CPU, unless CUDA was asked for.

    With `share`, ranks may be more than GPUs: they take turns on those that there are.

    Raises:
        InvalidInput: CUDA was asked for and there are fewer GPUs than ranks.
    """
    if wanted == "cpu":
        return Devices("cpu", (), "device is cpu")
    gpus = visible_gpus()
    if share and gpus:
        num_ranks = min(num_ranks, len(gpus))
    if len(gpus) < num_ranks:
        found = _found(gpus, num_ranks)
        if wanted == "cuda" and not gpus:
            raise InvalidInput("device", f"cuda is wanted, but {found}; take cpu, or auto")
        if wanted == "cuda":
            raise InvalidInput("num_gpus", f"{found}; take fewer ranks, or device cpu")
        return Devices("cpu", (), f"{found}, so the ranks run on the CPU")
    freest = sorted(gpus, key=lambda gpu: gpu.memory_free, reverse=True)[:num_ranks]
    chosen = [gpu for gpu in gpus if gpu in freest]
    return Devices("cuda", tuple(gpu.entry for gpu in chosen), _choice(chosen, gpus))


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        gpus = [_read_gpu(pynvml.nvmlDeviceGetHandleByIndex(i), i) for i in range(pynvml.nvmlDeviceGetCount())]
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        return gpus if setting is None else _named(setting, gpus)
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def linked(gpus: Sequence[Gpu]) -> bool:
    """Whether each of them has a working NVLink; one that nobody can ask has none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return all(_has_link(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)) for gpu in gpus)
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def memory_limit() -> tuple[int, str]:
    """(bytes that all processes of ours may use, who says so)."""
    import psutil

    limits = [(int(setting), "limit of the cgroup") for setting in cgroup("memory.max") if setting.isdecimal()]
    return min([(psutil.virtual_memory().total, "all of the host"), *limits])


def cgroup(name: str) -> Iterator[str]:
    """A setting of this process's cgroup (version 2) and of those that it lies in."""
    with contextlib.suppress(OSError):
        place = Path(Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/"))
        for group in (place, *place.parents):
            with contextlib.suppress(OSError):
                yield (Path("/sys/fs/cgroup") / group / name).read_text().strip()


def describe_machine() -> list[tuple[str, str]]:
    """(name, value) rows for `framemesh env`; imports none of the packages whose versions it tells."""
    import psutil

    memory = psutil.virtual_memory()
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(package, _version(package)) for package in PACKAGES]
    rows += [
        ("CPU cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("memory", f"{_gib(memory.available)} free of {_gib(memory.total)}"),
    ]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        rows.append(("CUDA_VISIBLE_DEVICES", os.environ["CUDA_VISIBLE_DEVICES"]))
    gpus = visible_gpus()
    return rows + [(f"GPU {gpu}", _describe(gpu)) for gpu in gpus] if gpus else [*rows, ("GPU", "none")]


def _named(setting: str, gpus: list[Gpu]) -> list[Gpu]:
    """The GPUs that the entries of CUDA_VISIBLE_DEVICES name; as in CUDA, an unknown entry ends the list."""
    named: list[Gpu] = []
    for entry in (word.strip() for word in setting.split(",")):
        gpu = _find(entry, gpus)
        if gpu is None or gpu.uuid in {other.uuid for other in named}:
            break
        named.append(replace(gpu, entry=entry))
    return named


def _find(entry: str, gpus: list[Gpu]) -> Gpu | None:
    import pynvml

    if entry.isdecimal():
        # NVML counts by PCI bus; on a host of unlike GPUs CUDA does so only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-"):
        try:
            return _read_gpu(pynvml.nvmlDeviceGetHandleByUUID(entry), None)
        except pynvml.NVMLError:
            return None
    # CUDA takes a UUID's first characters, as long as they name one GPU.
    matches = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _read_gpu(handle: object, index: int | None) -> Gpu:
    import pynvml

    uuid = pynvml.nvmlDeviceGetUUID(handle)
    free, total = _memory(handle)
    board = handle if index is not None else pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(board)
    return Gpu(
        entry=uuid,
        uuid=uuid,
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        memory_free=free,
        memory_total=total,
        capability=f"{major}.{minor}",
        driver=pynvml.nvmlSystemGetDriverVersion(),
    )


def _has_link(handle: object) -> bool:
    import pynvml

    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED:
                return True
        except pynvml.NVMLError:
            # It has fewer links than there may be, or none.
            return False
    return False


def _memory(handle: object) -> tuple[int, int]:
    """Free and total bytes; where the GPU has no memory of its own, the host's."""
    import psutil
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        host = psutil.virtual_memory()
        return host.available, host.total
    return memory.free, memory.total


def _found(gpus: list[Gpu], num_ranks: int) -> str:
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = "this host" if setting is None else f'this host with CUDA_VISIBLE_DEVICES="{setting}"'
    if not gpus:
        return f"no GPU is visible on {where}"
    return f"num_gpus({num_ranks}) > {len(gpus)} GPU{'s' * (len(gpus) > 1)} visible on {where}"


def _choice(chosen: list[Gpu], gpus: list[Gpu]) -> str:
    names = ", ".join(f"{gpu} ({gpu.name}, {_gib(gpu.memory_free)} free)" for gpu in chosen)
    why = "all there are" if len(chosen) == len(gpus) else f"of {len(gpus)} those with the most free memory"
    return f"GPU {names}: {why}"


def _describe(gpu: Gpu) -> str:
    memory = f"{_gib(gpu.memory_free)} free of {_gib(gpu.memory_total)}"
    return f"{gpu.name}, {memory}, compute capability {gpu.capability}, driver {gpu.driver}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
