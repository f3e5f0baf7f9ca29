"""`framemesh doctor`: what on this host would keep a mesh from starting or from being fast, and what to do about it.

Every check is a small function from the settings to findings; it starts nothing, loads no weights and leaves things as
they were. A check that raises is a finding too.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import struct
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from launch.devices import cgroup, memory_limit, pick_devices, visible_gpus
from launch.observe import FOLDER_PREFIX, is_abandoned, read_mesh_file, run_folders
from launch.process import HOME
from launch.sizes import settle_layout
from launch.tryout import try_folder, try_port, try_services, try_transport
from launch.weights import check_model_id
from runtime.batchrules import rules_of
from runtime.config import DEMO_MODEL, Config, check_config
from runtime.errors import InvalidInput
from runtime.keys import AUTHORIZED, PUBLIC, load_keys, read_host
from runtime.models.card import card_for, read_configs
from runtime.wire import MAX_IPC_PATH, check_pair

GIB = 1 << 30
LOW_DISK, NO_DISK = 2 * GIB, GIB // 8
LOW_SHM = GIB
FEW_FILES, TOO_FEW_FILES = 4096, 256
LONGEST_SOCKET = f"{FOLDER_PREFIX}12345678/scheduler"
RESOLVE_S = 5.0
CLOCK_S = 0.1


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    status: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""
    """What to do about it; empty when there is nothing to do."""


Check = Callable[[Config], Iterable[Finding]]


def doctor(config: Config, *, as_json: bool) -> int:
    """Print what was found; the exit code: 0, or 1 when something is an error."""
    findings = list(examine(config))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_table(findings)
    return 1 if any(finding.status == "error" for finding in findings) else 0


def examine(config: Config, checks: Iterable[Check] | None = None) -> Iterator[Finding]:
    for check in CHECKS if checks is None else checks:
        try:
            yield from check(config)
        except Exception as error:
            yield Finding(
                check.__name__.removeprefix("check_"),
                "error",
                f"the check itself failed: {type(error).__name__}: {error}",
                "nothing is known about this; please report it",
            )


def check_settings(config: Config) -> Iterator[Finding]:
    """What `serve` would refuse before it looks at the machine."""
    try:
        check_config(config)
        rules_of(config)
        if _local_model(config.model_path) is None:
            check_model_id(config.model_path)
        layout = _layout(config)
    except InvalidInput as error:
        yield Finding("settings", "error", str(error), "change the setting")
    else:
        yield Finding("settings", "ok", f"model {config.model_path}, {layout}")


def check_versions(config: Config) -> Iterator[Finding]:
    """Installed distributions against what ours asks for; none of them is imported."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, wanted = _requirements()
    if platform.python_version() not in SpecifierSet(python, prereleases=True):
        found = f"Python {platform.python_version()}, wanted {python}"
        yield Finding("versions", "error", found, "make the virtual environment with another Python")
    wrong, right = [], [f"Python {platform.python_version()}"]
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _installed(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed or 'is missing'}, wanted {requirement.specifier or 'any'}")
        elif requirement.name in {"torch", "diffusers", "pyzmq", "msgspec"}:
            right.append(f"{requirement.name} {installed}")
    for text in wrong:
        yield Finding("versions", "error", text, f'pip install "{text.split()[0]}{text.partition("wanted ")[2]}"')
    yield Finding("versions", "ok", ", ".join(right))


def check_accelerators(config: Config) -> Iterator[Finding]:
    try:
        chosen = pick_devices(config.num_gpus, config.device, share=config.dist_backend == "staged")
        try_transport(config)
    except InvalidInput as error:
        yield Finding("accelerators", "error", str(error), "check nvidia-smi and CUDA_VISIBLE_DEVICES")
        return
    gpus = visible_gpus()
    for gpu in gpus:
        memory = f"{gpu.memory_free / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB free"
        yield Finding("accelerators", "ok", f"GPU {gpu}: {gpu.name}, {memory}, driver {gpu.driver}")
    if not gpus and Path("/dev/nvidia0").exists():
        found = "there is an NVIDIA device, but its driver does not answer"
        yield Finding("accelerators", "warning", found, "run nvidia-smi; the driver and its library may differ")
    elif gpus and chosen.kind == "cpu" and config.device == "auto":
        yield Finding("accelerators", "warning", chosen.reason, f"take --num-gpus {len(gpus)} or fewer")
    else:
        yield Finding("accelerators", "ok", chosen.reason if gpus else "none: the ranks run on the CPU, which is fine")


def check_cores(config: Config) -> Iterator[Finding]:
    cores, setting = _cores(), os.environ.get("OMP_NUM_THREADS")
    on_cpu = _on_cpu(config)
    if setting is not None and not (setting.isdecimal() and int(setting)):
        yield Finding("cores", "error", f"OMP_NUM_THREADS={setting} is no number of threads", "unset it")
    elif on_cpu and config.num_gpus > cores:
        found = f"{config.num_gpus} ranks on {cores:g} cores take turns"
        yield Finding("cores", "warning", found, f"take --num-gpus {max(int(cores), 1)} or fewer")
    elif on_cpu and setting is not None and int(setting) * config.num_gpus > cores:
        found = f"OMP_NUM_THREADS={setting} on {config.num_gpus} ranks: more threads than the {cores:g} cores"
        yield Finding("cores", "warning", found, "unset it: the cores are then shared out among the ranks")
    else:
        threads = setting or "unset, shared out among the ranks"
        yield Finding("cores", "ok", f"{cores:g} cores for {config.num_gpus} ranks, OMP_NUM_THREADS {threads}")


def check_memory(config: Config) -> Iterator[Finding]:
    """The weights against what this process may use; on the CPU every rank holds all of them."""
    limit, source = memory_limit()
    folder = _local_model(config.model_path)
    if folder is None:
        found = f"{limit / GIB:.1f} GiB ({source}); {config.model_path} is not on this disk, so its size is not known"
        yield Finding("memory", "ok", found)
        return
    on_cpu = _on_cpu(config)
    width = 2 if config.dit_precision in {"fp16", "bf16"} or (config.dit_precision is None and not on_cpu) else 4
    weights = _num_weights(folder) * width
    needed = weights * (config.num_gpus if on_cpu else 1)
    text = f"the weights take {needed / GIB:.2f} GiB of {limit / GIB:.2f} GiB ({source})"
    if needed > limit:
        yield Finding("memory", "error", text, "take fewer ranks, --dit-precision bf16, or a host with more memory")
    elif needed > 0.7 * limit:
        yield Finding("memory", "warning", text, "little is left for the states of requests; take fewer ranks")
    else:
        yield Finding("memory", "ok", text)
    smallest = min((gpu.memory_free for gpu in visible_gpus()), default=None)
    if not on_cpu and smallest is not None and weights > smallest:
        found = f"{weights / GIB:.2f} GiB of weights for each GPU, the fullest has {smallest / GIB:.1f} GiB free"
        yield Finding("memory", "error", found, "end what else runs on it, or take a smaller model")


def check_port(config: Config) -> Iterator[Finding]:
    try:
        try_port(config.host, config.port)
    except InvalidInput as error:
        yield Finding("port", "error", error.message, "take another --port or --host, or end who holds it: ss -ltnp")
    else:
        yield Finding("port", "ok", f"{config.host}:{config.port} is free" if config.port else "any free one")


def check_services(config: Config) -> Iterator[Finding]:
    """Files and packages that the gateway will want."""
    try:
        try_services(config)
    except InvalidInput as error:
        yield Finding("services", "error", str(error), "correct the path, or install what is missing")
        return
    jobs = "SQLite" if config.database_url is None else "PostgreSQL"
    kept = config.output_path if config.output_store is None else config.output_store
    yield Finding("services", "ok", f"jobs in {jobs}, videos in {kept}")


def check_tmpdir(config: Config) -> Iterator[Finding]:
    """The sockets of the mesh live there."""
    wanted, folder = os.environ.get("TMPDIR"), Path(tempfile.gettempdir())
    if wanted and Path(wanted) != folder:
        found = f"TMPDIR={wanted} cannot be written; {folder} is used in its place"
        yield Finding("tmpdir", "warning", found, "create the folder, or unset TMPDIR")
    length = len(os.fsencode(folder / LONGEST_SOCKET))
    if length > MAX_IPC_PATH:
        found = f"{folder} is too long: its sockets' paths have {length} bytes, the system allows {MAX_IPC_PATH}"
        yield Finding("tmpdir", "error", found, "export TMPDIR=/tmp")
        return
    with tempfile.TemporaryDirectory(prefix="fm-doctor-") as place, socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(f"{place}/s")
        except OSError as error:
            found = f"{folder} takes no sockets: {error.strerror}"
            yield Finding("tmpdir", "error", found, "export TMPDIR to a folder on a local disk")
            return
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        found = f"{folder} is mounted noexec: kernels compiled there cannot be loaded"
        yield Finding("tmpdir", "warning", found, "export TMPDIR to a folder without noexec")
    else:
        yield Finding("tmpdir", "ok", f"{folder} takes sockets; the longest path has {length} bytes")


def check_shared_memory(config: Config) -> Iterator[Finding]:
    """NCCL and torch's data loaders put their buffers there; containers have 64 MiB by default."""
    try:
        state = os.statvfs("/dev/shm")
    except OSError as error:
        found = f"/dev/shm is not there: {error.strerror}"
        yield Finding("shared memory", "warning", found, "mount a tmpfs on /dev/shm")
        return
    free = state.f_bavail * state.f_frsize
    text = f"{free / GIB:.2f} GiB of /dev/shm free"
    if free < LOW_SHM and config.num_gpus > 1 and not _on_cpu(config):
        yield Finding("shared memory", "warning", text, "docker run --shm-size=8g (or --ipc=host): NCCL needs it")
    else:
        yield Finding("shared memory", "ok", text)


def check_open_files(config: Config) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} open files allowed (hard limit {hard})"
    if soft < FEW_FILES:
        status: Literal["warning", "error"] = "error" if soft < TOO_FEW_FILES else "warning"
        yield Finding("open files", status, text, "ulimit -n 65536: every client that streams holds one")
    else:
        yield Finding("open files", "ok", text)


def check_disk(config: Config) -> Iterator[Finding]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    costs = Path(config.cost_cache) if config.cost_cache is not None else cache / "framemesh" / "cost"
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    places = {"output_path": Path(config.output_path), "spool_dir": config.spool, "cost_cache": costs, "HF_HOME": hub}
    if _local_model(config.model_path) is not None:
        del places["HF_HOME"]
    for name, folder in places.items():
        yield _disk(name, folder, config)


def _disk(name: str, folder: Path, config: Config) -> Finding:
    try:
        try_folder(folder)
    except InvalidInput as error:
        return Finding("disk", "error", f"{name}: {error.message}", f"name another {name}, or chown the folder")
    free = shutil.disk_usage(_existing(folder)).free
    text = f"{name}: {free / GIB:.1f} GiB free at {folder}"
    if free < NO_DISK:
        return Finding("disk", "error", text, "make room, or name another folder")
    if free < LOW_DISK:
        return Finding("disk", "warning", text, "make room: it fills up soon")
    if name == "spool_dir" and config.checkpoint_every_steps and free < config.checkpoint_max_bytes:
        text += f", checkpoints may take {config.checkpoint_max_bytes / GIB:.1f} GiB"
        return Finding("disk", "warning", text, "lower --checkpoint-max-bytes or make room")
    return Finding("disk", "ok", text)


def check_clock(config: Config) -> Iterator[Finding]:
    """Deadlines go by the monotonic clock, timestamps and certificates by the wall's."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(CLOCK_S)
    drift = (time.time() - wall) - (time.monotonic() - steady)
    year = datetime.fromtimestamp(wall, UTC).year
    if not 2025 <= year < 2100:
        yield Finding("clock", "error", f"the year is {year}", "set the clock: timedatectl set-ntp true")
    elif abs(drift) > 0.05:
        found = f"the wall clock moved by {drift:+.2f} s against the steady one within {CLOCK_S} s"
        yield Finding("clock", "warning", found, "something steps the clock; let NTP slew it")
    else:
        yield Finding("clock", "ok", f"{datetime.fromtimestamp(wall, UTC):%Y-%m-%d %H:%M} UTC, steady")


def check_keys(config: Config) -> Iterator[Finding]:
    if config.curve_dir is None:
        yield Finding("keys", "ok", "none: sockets stay on this host")
        return
    try:
        keys = load_keys(config.curve_dir)
        assert keys is not None
        check_pair(keys)
    except InvalidInput as error:
        yield Finding("keys", "error", error.message, "see framemesh keygen")
        return
    hosts = [keys.own]
    for path in sorted((keys.folder / AUTHORIZED).glob(f"*{PUBLIC}")):
        try:
            hosts.append(read_host(path))
        except InvalidInput as error:
            yield Finding("keys", "warning", error.message, "until then this host is not let in")
    for address in sorted({word for host in hosts for word in host.addresses}):
        names = {host.key: host.name for host in hosts if address in host.addresses}
        if len(names) > 1:
            found = f"{address} is an address of several keys: {', '.join(sorted(names.values()))}"
            yield Finding("keys", "error", found, f"remove the old ones from {keys.folder / AUTHORIZED}")
    others = [host.name for host in hosts[1:] if host.key != keys.own.key]
    if others:
        yield Finding("keys", "ok", f"{keys.own.name}; may connect: {', '.join(others)}")
    else:
        found = f"{keys.own.name} is alone: nobody is in {keys.folder / AUTHORIZED}"
        yield Finding("keys", "warning", found, "copy the .pub files of the other hosts there")


def check_network(config: Config) -> Iterator[Finding]:
    """torchrun and gloo look their own host name up; one that does not lead back here is the classic hang."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2.0):
            yield Finding("network", "ok", "loopback answers")
    except OSError as error:
        yield Finding("network", "error", f"loopback does not answer: {error}", "ip link set lo up")
    name = socket.gethostname()
    addresses, fault = _resolve(name)
    local = {each.address for card in psutil.net_if_addrs().values() for each in card}
    hosts_line = f'echo "127.0.0.1 {name}" >> /etc/hosts'
    if fault:
        yield Finding("network", "error", f"the host name {name} {fault}: torchrun and gloo would hang", hosts_line)
    elif not any(address in local or address.startswith("127.") for address in addresses):
        found = f"the host name {name} is {', '.join(addresses)}, which is not this host: torchrun and gloo would hang"
        yield Finding("network", "error", found, hosts_line)
    else:
        yield Finding("network", "ok", f"the host name {name} is {', '.join(addresses)}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        card = os.environ.get(variable, "").lstrip("^=")
        if card and not any(each.startswith(card.split(",")[0]) for each in psutil.net_if_addrs()):
            found = f"{variable}={card} is no interface here ({', '.join(psutil.net_if_addrs())})"
            yield Finding("network", "error", found, f"unset {variable}")


def check_other_meshes(config: Config) -> Iterator[Finding]:
    alive, dead = run_folders()
    served = dict(_served_folders())
    abandoned = {process: folder for process, folder in served.items() if is_abandoned(folder)}
    # Meshes that were started with another TMPDIR are known by their processes alone.
    elsewhere = {folder for process, folder in served.items() if process not in abandoned}
    for folder in sorted({*alive, *elsewhere}):
        about = read_mesh_file(folder)
        what = f"{about.model} (pid {about.pid}) {about.url}" if about is not None else str(folder)
        found = f"a mesh runs here: {what}".strip()
        yield Finding("other meshes", "warning", found, "it shares cores, GPUs and memory; Ctrl-C it, or leave it")
    for folder in dead:
        found = f"{folder} was left by a launcher that was killed"
        yield Finding("other meshes", "warning", found, "the next start removes it")
    for process, folder in abandoned.items():
        found = f"pid {process.pid} still serves {folder}, whose launcher is dead"
        yield Finding("other meshes", "error", found, f"kill -9 {process.pid}")
    if not (alive or dead or served):
        yield Finding("other meshes", "ok", "none, and nothing was left behind")


CHECKS: tuple[Check, ...] = (
    check_settings,
    check_versions,
    check_accelerators,
    check_cores,
    check_memory,
    check_port,
    check_services,
    check_tmpdir,
    check_shared_memory,
    check_open_files,
    check_disk,
    check_clock,
    check_keys,
    check_network,
    check_other_meshes,
)


def _print_table(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        advice = f"  ->  {finding.advice}" if finding.advice else ""
        print(f"{finding.status:<7}  {finding.check:<{width}}  {finding.found}{advice}")


def _requirements() -> tuple[str, list[str]]:
    """(wanted Python, wanted distributions) of ours: as installed, else as pyproject.toml beside the packages says."""
    try:
        about = metadata("framemesh")
        return about["Requires-Python"], about.get_all("Requires-Dist") or []
    except PackageNotFoundError:
        project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]


def _layout(config: Config) -> str:
    """As it was asked for, or what a start would choose where the model is on this disk."""
    folder = _local_model(config.model_path)
    if not config.layout_is_open:
        return str(config.layout)
    if folder is None:
        return f"a layout of {config.num_gpus} ranks that is chosen once the model is on this disk"
    settled, why = settle_layout(config, folder, card_for(read_configs(folder)))
    return "; ".join([str(settled.layout), *why])


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _on_cpu(config: Config) -> bool:
    return config.device == "cpu" or (config.device == "auto" and len(visible_gpus()) < config.num_gpus)


def _cores() -> float:
    """Those that this process may use, a container's quota included."""
    shares = [setting.split() for setting in cgroup("cpu.max")]
    quotas = [int(share[0]) / int(share[1]) for share in shares if len(share) == 2 and share[0].isdecimal()]
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def _local_model(model_path: str) -> Path | None:
    folder = Path(str(files("workers.demo") / "model")) if model_path == DEMO_MODEL else Path(model_path).expanduser()
    return folder if folder.is_dir() else None


def _num_weights(folder: Path) -> int:
    """Numbers in all safetensors files of a diffusers folder; reads their headers alone."""
    return sum(_num_values(path) for path in folder.glob("*/*.safetensors") if ".fp16." not in path.name)


def _num_values(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = msgspec.json.decode(file.read(length))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _resolve(name: str) -> tuple[list[str], str]:
    """(addresses, what went wrong); a name server that does not answer must not hold the others up."""
    answer: list[tuple[list[str], str]] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            answer.append((list(dict.fromkeys(str(each[4][0]) for each in found)), ""))
        except OSError as error:
            answer.append(([], f"does not resolve ({error.strerror})"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_S)
    return answer[0] if answer else ([], f"was not resolved within {RESOLVE_S:g} s")


def _served_folders() -> Iterator[tuple[psutil.Process, Path]]:
    """This user's processes whose --config lies in a run folder, with the folder."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            mine = process.uids().real == os.getuid()
        except psutil.Error:
            continue
        if mine and "--config" in words[:-1]:
            folder = Path(words[words.index("--config") + 1]).parent
            if folder.name.startswith(FOLDER_PREFIX):
                yield process, folder
