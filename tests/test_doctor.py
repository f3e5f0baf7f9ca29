"""`framemesh doctor` finds what was broken on purpose, says what to do about it, and ends with the right code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_devices import FakeNvml

from launch import devices, doctor
from launch.cli import main
from launch.doctor import CHECKS, Finding, examine
from launch.observe import RunFolder
from launch.process import child_environment
from runtime.config import Config
from runtime.keys import AUTHORIZED, write_pair
from runtime.wire import new_pair

GIB = 1 << 30


@pytest.fixture(autouse=True)
def clean_place(monkeypatch, tmp_path):
    """An empty working directory, a short TMPDIR of our own, no settings."""
    with tempfile.TemporaryDirectory(prefix="fmd") as short:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.setattr(tempfile, "tempdir", None)
        for name in [*os.environ, "OMP_NUM_THREADS"]:
            if name.startswith(("FRAMEMESH_", "SGLANG_", "OMP_", "CUDA_VISIBLE")):
                monkeypatch.delenv(name, raising=False)
        yield
        tempfile.tempdir = None


def findings(check, **settings):
    return list(examine(Config(**settings), [check]))


def worst(check, status, *words, **settings):
    """The only finding of this status; it says these words and what to do."""
    found = [finding for finding in findings(check, **settings) if finding.status == status]
    assert len(found) == 1, found
    assert all(word in found[0].found for word in words), found
    assert found[0].advice
    return found[0]


def all_ok(check, **settings):
    found = findings(check, **settings)
    assert found
    assert {finding.status for finding in found} == {"ok"}, found
    return found


# ---- the command -------------------------------------------------------------------------------------------------


def run(*words):
    command = [sys.executable, "-P", "-m", "launch", "doctor", *words]
    return subprocess.run(command, capture_output=True, text=True, env=child_environment({}), timeout=60, check=False)


def test_the_table_and_its_exit_code():
    table = run("--port", "0")
    lines = table.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "error"}, table
    assert table.returncode == (1 if any(line.startswith("error") for line in lines) else 0)
    assert all("  ->  " in line for line in lines if not line.startswith("ok"))


def test_json_says_the_same_and_every_check_reports():
    ran = run("--port", "0", "--json")
    told = [Finding(**each) for each in json.loads(ran.stdout)]
    names = {check.__name__.removeprefix("check_").replace("_", " ") for check in CHECKS}
    assert {finding.check for finding in told} == names
    assert {check for name, check in vars(doctor).items() if name.startswith("check_") and name != "check_config"} >= {
        *CHECKS
    }


def test_it_looks_at_the_settings_of_the_file_and_fails_with_1(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "mesh.json").write_text(json.dumps({"port": port}))
        assert main(["doctor", "--config", str(tmp_path / "mesh.json")]) == 1
        assert f"{port} on 127.0.0.1 is taken" in capsys.readouterr().out


def test_an_unknown_flag_is_2(capsys):
    assert main(["doctor", "--prot", "1"]) == 2


def test_it_leaves_nothing_behind(capsys, tmp_path):
    main(["doctor", "--port", "0", "--output-path", "deep/er"])
    assert list(tmp_path.iterdir()) == []
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


def test_a_check_that_raises_is_a_finding_and_the_others_go_on():
    def check_stars(config):
        yield Finding("stars", "ok", "so far")
        raise ZeroDivisionError("cloudy")

    found = list(examine(Config(port=0), [check_stars, doctor.check_port]))
    assert [finding.status for finding in found] == ["ok", "error", "ok"]
    assert "ZeroDivisionError: cloudy" in found[1].found


# ---- each thing broken -------------------------------------------------------------------------------------------


def test_settings():
    all_ok(doctor.check_settings)
    worst(doctor.check_settings, "error", "port", "70000 is not a port", port=70_000)
    worst(doctor.check_settings, "error", "sp_degree", num_gpus=3, sp_degree=2)
    worst(doctor.check_settings, "error", "there is no folder /nowhere", model_path="/nowhere")


def test_services(monkeypatch, tmp_path):
    all_ok(doctor.check_services)
    worst(doctor.check_services, "error", "webhook_secret_file", "cannot be read", webhook_secret_file="nowhere")
    wanted = {"output_store": "s3://bucket", "database_url": "postgresql://me@nowhere/db"}
    all_ok(doctor.check_services, output_store=wanted["output_store"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for (setting, value), extra in zip(wanted.items(), ("s3", "postgres"), strict=True):
        worst(doctor.check_services, "error", setting, f"pip install 'framemesh[{extra}]'", **{setting: value})


def test_a_transport_that_this_machine_does_not_have():
    worst(doctor.check_accelerators, "error", "dist_backend", "take gloo on the CPU", dist_backend="nccl")


def test_versions(monkeypatch, tmp_path):
    (found,) = all_ok(doctor.check_versions)
    assert all(name in found.found for name in ("Python", "torch", "diffusers", "pyzmq", "msgspec"))
    old = tmp_path / "site" / "msgspec-0.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: msgspec\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(old.parent))
    assert 'pip install "msgspec>=' in worst(doctor.check_versions, "error", "msgspec 0.1, wanted >=").advice


def test_versions_read_without_importing_anything_heavy():
    code = (
        "import sys; from launch.doctor import *; list(examine(Config())); "
        "print(*sorted({'torch', 'diffusers', 'transformers'} & {*sys.modules}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment({}), timeout=60, check=True
    )
    assert ran.stdout.strip() == ""


def test_another_python(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    worst(doctor.check_versions, "error", "Python 3.9.1, wanted <3.14,>=3.11")


def test_accelerators(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml((), driver=False))
    assert "which is fine" in all_ok(doctor.check_accelerators, num_gpus=2)[0].found
    worst(doctor.check_accelerators, "error", "no GPU is visible", device="cuda")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml((10 * GIB, 70 * GIB)))
    assert len(all_ok(doctor.check_accelerators, num_gpus=2)) == 3
    worst(doctor.check_accelerators, "warning", "num_gpus(3) > 2 GPUs", num_gpus=3)


def test_cores(monkeypatch):
    all_ok(doctor.check_cores, device="cpu")
    worst(doctor.check_cores, "warning", "4096 ranks on", device="cpu", num_gpus=4096)
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    worst(doctor.check_cores, "warning", "OMP_NUM_THREADS=4096", device="cpu")
    for nonsense in ("many", "0", "-1", "1.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        worst(doctor.check_cores, "error", f"OMP_NUM_THREADS={nonsense} is no number")


def test_memory(tmp_path):
    """A file that promises more weights than the host has bytes; its header is all that is read."""
    all_ok(doctor.check_memory, device="cpu")
    part = tmp_path / "big" / "transformer"
    part.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2**20, 2**22], "data_offsets": [0, 0]}}).encode()
    (part / "diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    big = str(tmp_path / "big")
    assert "fewer ranks" in worst(doctor.check_memory, "error", "the weights take", device="cpu", model_path=big).advice
    assert "not on this disk" in all_ok(doctor.check_memory, model_path="some/model")[0].found


def test_memory_of_a_cgroup(monkeypatch):
    monkeypatch.setattr(devices, "cgroup", lambda name: iter(["max", "40000000"] if name == "memory.max" else []))
    worst(doctor.check_memory, "warning", "0.03 GiB of 0.04 GiB (limit of the cgroup)", device="cpu")
    worst(doctor.check_memory, "error", "limit of the cgroup", device="cpu", num_gpus=2)


def test_cores_of_a_cgroup(monkeypatch):
    monkeypatch.setattr(doctor, "cgroup", lambda name: iter(["150000 100000", "max 100000"]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    worst(doctor.check_cores, "warning", "2 ranks on 1.5 cores", device="cpu", num_gpus=2)


def test_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worst(doctor.check_port, "error", f"{port} on 127.0.0.1 is taken", port=port)
    all_ok(doctor.check_port, port=port)
    all_ok(doctor.check_port, port=0)
    worst(doctor.check_port, "error", "192.0.2.99", host="192.0.2.99")


def test_tmpdir(monkeypatch, tmp_path):
    all_ok(doctor.check_tmpdir)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    worst(doctor.check_tmpdir, "warning", "absent cannot be written")
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(long))
    worst(doctor.check_tmpdir, "error", "is too long", "the system allows 107")


def test_a_tmpdir_whose_sockets_just_fit(monkeypatch):
    """The bound is the one that a mesh's own folder meets."""
    base = Path(tempfile.gettempdir())
    longest = len("/framemesh-12345678/scheduler")
    for spare, status in ((0, "ok"), (-1, "error")):
        folder = base / ("y" * (107 - longest - len(os.fsencode(base)) - 1 - spare))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setenv("TMPDIR", str(folder))
        assert {finding.status for finding in findings(doctor.check_tmpdir)} == {status}
        run_folder = RunFolder("demo")
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                name = str(run_folder.path / "scheduler")
                assert (len(os.fsencode(name)) <= 107) is (status == "ok")
                if status == "ok":
                    probe.bind(name)
        finally:
            run_folder.remove()


def test_a_tmpdir_without_exec(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID))
    worst(doctor.check_tmpdir, "warning", "is mounted noexec")


def test_shared_memory(monkeypatch):
    all_ok(doctor.check_shared_memory, device="cpu")
    monkeypatch.setattr(doctor, "LOW_SHM", 1 << 60)
    all_ok(doctor.check_shared_memory, device="cpu", num_gpus=2)
    assert "--shm-size" in worst(doctor.check_shared_memory, "warning", "GiB of", num_gpus=2, device="cuda").advice


def test_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, status in ((200, "error"), (1024, "warning"), (min(hard, 4096), "ok")):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            (found,) = findings(doctor.check_open_files)
            assert (found.status, bool(found.advice)) == (status, status != "ok")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_disk(monkeypatch, tmp_path):
    all_ok(doctor.check_disk, checkpoint_max_bytes=0)
    (tmp_path / "file").write_text("in the way")
    blocked = str(tmp_path / "file" / "below")
    worst(doctor.check_disk, "error", "spool_dir", "Not a directory", spool_dir=blocked, checkpoint_max_bytes=0)
    worst(doctor.check_disk, "error", "cost_cache", "Not a directory", cost_cache=blocked, checkpoint_max_bytes=0)
    worst(doctor.check_disk, "warning", "spool_dir", "checkpoints may take", checkpoint_max_bytes=1 << 60)
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(doctor, "LOW_DISK", 2 * free)
    assert {finding.status for finding in findings(doctor.check_disk)} == {"warning"}
    monkeypatch.setattr(doctor, "NO_DISK", 2 * free)
    assert {finding.status for finding in findings(doctor.check_disk)} == {"error"}


def test_clock(monkeypatch):
    all_ok(doctor.check_clock)
    real = time.time
    steps = iter((0.0, 3600.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(steps))
    worst(doctor.check_clock, "warning", "moved by +3600")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    worst(doctor.check_clock, "error", "the year is 1970")


@pytest.fixture
def keys(tmp_path):
    for name in ("here", "there"):
        write_pair(tmp_path / name, name, *new_pair(), ("10.0.0.1" if name == "here" else "10.0.0.2",))
    shutil.copy(tmp_path / "there" / "there.pub", tmp_path / "here" / AUTHORIZED)
    return tmp_path / "here"


def test_keys(keys):
    all_ok(doctor.check_keys)
    assert "may connect: there" in all_ok(doctor.check_keys, curve_dir=str(keys))[0].found
    (keys / AUTHORIZED / "noise.pub").write_text("noise")
    worst(doctor.check_keys, "warning", "noise.pub", curve_dir=str(keys))
    (keys / AUTHORIZED / "noise.pub").unlink()
    twin = keys.parent / "twin"
    write_pair(twin, "twin", *new_pair(), ("10.0.0.2",))
    shutil.copy(twin / "twin.pub", keys / AUTHORIZED)
    worst(doctor.check_keys, "error", "10.0.0.2 is an address of several keys: there, twin", curve_dir=str(keys))
    (keys / AUTHORIZED / "there.pub").unlink()
    (keys / AUTHORIZED / "twin.pub").unlink()
    worst(doctor.check_keys, "warning", "here is alone", curve_dir=str(keys))
    (keys / "here.secret").chmod(0o644)
    worst(doctor.check_keys, "error", "open to others (mode 0644); run: chmod 600", curve_dir=str(keys))
    worst(doctor.check_keys, "error", "framemesh keygen", curve_dir=str(keys / "absent"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-host.invalid", "does not resolve"),
        ("192.0.2.77", "is 192.0.2.77, which is not this host"),
    ],
)
def test_a_host_name_that_leads_elsewhere(monkeypatch, name, words):
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr(doctor, "RESOLVE_S", 30.0)
    assert "/etc/hosts" in worst(doctor.check_network, "error", words, "torchrun and gloo would hang").advice


def test_a_name_server_that_does_not_answer(monkeypatch):
    over, real = threading.Event(), socket.getaddrinfo

    def resolve(host, *words, **options):
        if host == "silent":
            over.wait()
        return real("127.0.0.1", *words, **options)

    monkeypatch.setattr(socket, "gethostname", lambda: "silent")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(doctor, "RESOLVE_S", 0.1)
    worst(doctor.check_network, "error", "was not resolved within 0.1 s")
    over.set()


def test_network(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    all_ok(doctor.check_network)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    worst(doctor.check_network, "error", "GLOO_SOCKET_IFNAME=nope0 is no interface here")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    all_ok(doctor.check_network)


def test_a_mesh_that_runs_here():
    folder = RunFolder("a-model-of-this-test")
    try:
        told = [f for f in findings(doctor.check_other_meshes) if "a-model-of-this-test" in f.found]
        assert [(f.status, f"pid {os.getpid()}" in f.found) for f in told] == [("warning", True)]
    finally:
        folder.remove()
    assert not any("a-model-of-this-test" in f.found for f in findings(doctor.check_other_meshes))


def test_what_a_killed_launcher_left_behind():
    code = "import os; from launch.observe import RunFolder; f = RunFolder('x'); print(f.path, flush=True); os._exit(9)"
    command = [sys.executable, "-c", code]
    path = subprocess.run(
        command, capture_output=True, text=True, env=child_environment({}), check=False
    ).stdout.strip()
    command = [sys.executable, "-c", "input()", "--config", f"{path}/config.json"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        told = {f.found: (f.status, f.advice) for f in findings(doctor.check_other_meshes) if path in f.found}
        assert told == {
            f"{path} was left by a launcher that was killed": ("warning", "the next start removes it"),
            f"pid {child.pid} still serves {path}, whose launcher is dead": ("error", f"kill -9 {child.pid}"),
        }
        shutil.rmtree(path)
        (left,) = [f for f in findings(doctor.check_other_meshes) if path in f.found]
        assert left.status == "error", "its folder is gone too"
    finally:
        child.communicate()


def test_a_mesh_of_another_tmpdir_is_not_taken_for_dead(monkeypatch):
    folder = RunFolder("elsewhere")
    child = subprocess.Popen(
        [sys.executable, "-c", "input()", "--config", f"{folder.path}/config.json"], stdin=subprocess.PIPE
    )
    try:
        with tempfile.TemporaryDirectory() as other:
            monkeypatch.setattr(tempfile, "tempdir", other)
            told = [
                f for f in findings(doctor.check_other_meshes) if "elsewhere" in f.found or str(child.pid) in f.found
            ]
        assert [f.status for f in told] == ["warning"]
    finally:
        child.communicate()
        folder.remove()
