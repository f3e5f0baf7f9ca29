"""Which devices the ranks get, on hosts that a faked NVML describes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from launch.devices import describe_machine, memory_limit, pick_devices, visible_gpus
from launch.sizes import this_machine
from runtime.config import Config
from runtime.errors import InvalidInput

GIB = 2**30
FREE = (10, 70, 30, 75)
UUIDS = ("GPU-aa00", "GPU-aa11", "GPU-bb22", "GPU-cc33")
MIG = "MIG-dd44"


@dataclass(frozen=True)
class Handle:
    uuid: str
    free: int | None


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


class FakeNvml(ModuleType):
    """As much of pynvml as is asked; counts that every init is shut down."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NotSupported
    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1

    def __init__(self, free: tuple[int | None, ...], driver: bool = True, links: Sequence[int] = ()):
        super().__init__("pynvml")
        self.handles = [Handle(uuid, memory) for uuid, memory in zip(UUIDS, free, strict=False)]
        self.driver = driver
        self.links = links
        self.open = 0

    def nvmlInit(self):
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.handles)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.handles[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid == MIG:
            return Handle(MIG, 20)
        found = [handle for handle in self.handles if handle.uuid == uuid]
        if not found:
            raise NVMLError("Not Found")
        return found[0]

    def nvmlDeviceGetNvLinkState(self, handle, link):
        """Of every GPU as many links as `links` says, all but the last of them dark."""
        count = dict(zip(UUIDS, self.links, strict=False)).get(handle.uuid, 0)
        if link >= count:
            raise NVMLError("Invalid Argument")
        return int(link == count - 1)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        assert handle.uuid == MIG
        return self.handles[0]

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA Test"

    def nvmlDeviceGetMemoryInfo(self, handle):
        if handle.free is None:
            raise NotSupported("Not Supported")
        return SimpleNamespace(free=handle.free * GIB, total=80 * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        assert handle in self.handles
        return (9, 0)

    def nvmlSystemGetDriverVersion(self):
        return "570.1"


@pytest.fixture
def host(monkeypatch):
    """Make this host one with GPUs of so much free memory (GiB), and CUDA_VISIBLE_DEVICES as given."""
    made = []

    def make(*free, visible=None, driver=True, links=()):
        made.append(FakeNvml(free, driver, links))
        monkeypatch.setitem(sys.modules, "pynvml", made[-1])
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    yield make
    assert [nvml.open for nvml in made] == [0] * len(made)


def test_the_gpus_with_the_most_free_memory_are_taken_in_the_order_of_the_host(host):
    host(*FREE)
    devices = pick_devices(2, "auto")
    assert (devices.kind, devices.visible) == ("cuda", (UUIDS[1], UUIDS[3]))
    assert devices.reason == (
        "GPU 1 (NVIDIA Test, 70.0 GiB free), 3 (NVIDIA Test, 75.0 GiB free): of 4 those with the most free memory"
    )


def test_all_gpus_are_taken_when_there_are_no_more(host):
    host(*FREE)
    devices = pick_devices(4, "cuda")
    assert devices.visible == UUIDS
    assert devices.reason.endswith("all there are")


def test_equal_gpus_are_taken_from_the_first(host):
    host(80, 80, 80)
    assert pick_devices(2, "auto").visible == UUIDS[:2]


@pytest.mark.parametrize(
    ("visible", "entries"),
    [
        ("2,0", ("2", "0")),
        (" 3 , 1", ("3", "1")),
        (f"{UUIDS[2]},GPU-aa1", (UUIDS[2], "GPU-aa1")),
        (MIG, (MIG,)),
        ("0,9,1", ("0",)),
        ("0,-1,1", ("0",)),
        ("0,0", ("0",)),
        ("GPU-aa", ()),
        ("MIG-unknown", ()),
        ("", ()),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(host, visible, entries):
    host(*FREE, visible=visible)
    assert tuple(gpu.entry for gpu in visible_gpus()) == entries


def test_the_choice_stays_within_cuda_visible_devices_and_keeps_its_words(host):
    host(*FREE, visible="2,0,1")
    assert pick_devices(2, "auto").visible == ("2", "1")


@pytest.mark.parametrize(
    ("free", "visible", "driver"), [((), None, False), ((), None, True), ((80,), None, True), ((80, 80), "1", True)]
)
def test_too_few_gpus_mean_the_cpu_or_a_refusal_that_counts_them(host, free, visible, driver):
    host(*free, visible=visible, driver=driver)
    found, field = ("num_gpus(2) > 1 GPU visible", "num_gpus") if free else ("no GPU is visible", "device")
    devices = pick_devices(2, "auto")
    assert (devices.kind, devices.visible) == ("cpu", ())
    assert f"{found} on this host" in devices.reason
    assert ("CUDA_VISIBLE_DEVICES" in devices.reason) == (visible is not None)
    with pytest.raises(InvalidInput, match=re.escape(found)) as caught:
        pick_devices(2, "cuda")
    assert caught.value.field == field


def test_ranks_that_share_take_turns_on_the_gpus_that_there_are(host):
    host(*FREE)
    assert pick_devices(8, "cuda", share=True).visible == UUIDS
    assert pick_devices(2, "cuda", share=True).visible == (UUIDS[1], UUIDS[3])
    host(80)
    assert pick_devices(2, "auto", share=True).visible == UUIDS[:1]


def test_without_a_gpu_there_is_nothing_to_share(host):
    host()
    assert pick_devices(2, "auto", share=True).kind == "cpu"
    with pytest.raises(InvalidInput, match="device: cuda is wanted, but no GPU is visible on this host"):
        pick_devices(2, "cuda", share=True)


def test_the_cpu_is_taken_when_asked_for(host):
    host(*FREE)
    assert pick_devices(2, "cpu").kind == "cpu"


def test_a_gpu_without_memory_of_its_own_has_the_hosts(host):
    host(None)
    (gpu,) = visible_gpus()
    assert 0 < gpu.memory_free <= gpu.memory_total


def test_the_machine_is_described(host):
    host(*FREE, visible="1")
    rows = dict(describe_machine())
    assert rows["GPU 1"] == "NVIDIA Test, 70.0 GiB free of 80.0 GiB, compute capability 9.0, driver 570.1"
    assert rows["CUDA_VISIBLE_DEVICES"] == "1"
    assert rows["torch"][0].isdigit()
    assert {"python", "platform", "diffusers", "CPU cores", "memory"} <= rows.keys()
    host(driver=False)
    assert dict(describe_machine())["GPU"] == "none"


def test_describing_imports_no_package_that_it_describes():
    program = "import sys, launch.devices as d; d.describe_machine(); print(*sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "huggingface_hub"} & set(done.stdout.split())


# ---- the constants that layouts are chosen by --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("links", "constants"),
    [((18, 18, 18, 18), "H100 SXM, NVLink"), ((2, 18, 0, 18), "H100 PCIe"), ((), "H100 PCIe")],
)
def test_nvlink_on_every_gpu_means_fast_links(host, links, constants):
    host(*FREE, links=links)
    machine = this_machine(Config(num_gpus=4))
    assert machine.name.startswith(f"NVIDIA Test by the constants of {constants}")
    assert (machine.memory, machine.element) == (80 * GIB, 2)


def test_too_few_gpus_or_the_wish_for_none_means_the_cpu(host):
    host(*FREE, links=(18,) * 4)
    for config in (Config(num_gpus=8), Config(num_gpus=2, replicas=4), Config(num_gpus=2, device="cpu")):
        machine = this_machine(config)
        assert machine.name.startswith("one CPU core per rank")
        assert machine.memory == pytest.approx(memory_limit()[0] / (config.num_gpus * config.replicas))


def test_staged_ranks_share_the_memory_of_the_gpus_that_there_are(host):
    host(70)
    assert this_machine(Config(num_gpus=4, dist_backend="staged")).memory == 20 * GIB


def test_the_precision_that_was_asked_for_is_what_is_counted(host):
    host(*FREE)
    assert this_machine(Config(num_gpus=2, dit_precision="fp32")).element == 4
    assert this_machine(Config(num_gpus=2, device="cpu", dit_precision="bf16")).element == 2
