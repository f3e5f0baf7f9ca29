"""Several meshes with real processes: replicas under one launcher, and meshes and a gateway apart."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys

import httpx2
import psutil
import pytest
from served import BODY, ROLES, eventually, names, parse_events

from framemesh import Generator
from launch.cli import main
from launch.devices import Devices
from launch.edge import frames_endpoints
from launch.fleet import replica_config, split
from launch.observe import observe_meshes
from launch.options import COMMANDS, CONFIG, ELSEWHERE, HTTP_ONLY, MESH_ONLY
from launch.process import child_environment
from runtime.config import Config
from runtime.errors import InvalidInput
from runtime.keys import write_pair
from runtime.wire import new_pair, set_keys

STEPS = 60


def processes(server, role):
    """All children of the server in a role, the oldest first."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "-m" in command and command[command.index("-m") + 1] == ROLES[role]:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def endpoint_of(process) -> str:
    """The scheduler's, of a scheduler or its workers."""
    return next(word for word in process.cmdline() if word.startswith("ipc://"))


def framemesh(*words):
    command = [sys.executable, "-P", "-m", "launch", *words]
    return subprocess.run(command, env=child_environment({}), capture_output=True, text=True, timeout=60, check=True)


def seen() -> dict[str, set[str]]:
    """Request -> the meshes that have it."""
    found: dict[str, set[str]] = {}
    with observe_meshes(None) as meshes:
        for observer, status in meshes:
            for job in status.jobs:
                found.setdefault(job.id, set()).add(observer.place)
    return found


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_nothing_and_runs_nothing_twice(serve, short_tmp):
    server = serve("--replicas", "2").wait_ready()
    health = server.http.get("/health/ready").json()
    assert (health["reason"], health["ranks_ready"], health["num_ranks"]) == ("ready", 2, 2)
    ids = [server.create(seed=number, num_inference_steps=STEPS) for number in range(4)]
    eventually(lambda: len(seen()) == 4)
    where = [place for places in seen().values() for place in places]
    assert len(set(where)) == 2, "shared out"
    for video_id in ids:
        server.until(video_id, "step", step=5)
    workers = processes(server, "workers")[0]
    scheduler = next(one for one in processes(server, "scheduler") if endpoint_of(one) == endpoint_of(workers))
    for victim in (scheduler, workers, *workers.children()):
        victim.kill()
    told = {video_id: names(server_events(server, video_id)) for video_id in ids}
    for video_id in ids:
        assert server.result(video_id)["status"] == "completed"
        assert told[video_id].count("done") == 1
        assert len(server.frames(video_id)) == 17
    eventually(lambda: len(processes(server, "scheduler")) == len(processes(server, "workers")) == 2)
    server.remember()
    eventually(lambda: server.http.get("/health/ready").json()["reason"] == "ready", 60)
    assert not seen(), "something still runs"
    more = [server.create(num_inference_steps=4, seed=number) for number in range(4)]
    for video_id in more:
        assert server.result(video_id)["status"] == "completed"
    drained = framemesh("drain").stderr.splitlines()
    assert drained[-1] == "stopped"
    assert server.end() == 0
    assert tracebacks(server.stderr) == []
    assert not list(short_tmp.glob("framemesh-*"))


def tracebacks(said: str) -> list[str]:
    """Each with its first lines."""
    return [part[:2000] for part in said.split("Traceback")[1:]]


def server_events(server, video_id):
    with server.follow(video_id) as events:
        return list(events)


@pytest.mark.slow
def test_one_replica_can_be_drained_and_the_other_serves_on(serve, short_tmp):
    server = serve("--replicas", "2").wait_ready()
    video_id = server.create(num_inference_steps=STEPS)
    server.until(video_id, "step", step=1)
    (place,) = seen()[video_id]
    assert framemesh("drain", "--mesh", place).stderr.splitlines()[-1] == "stopped"
    assert server.video(video_id)["status"] == "completed"
    assert len(processes(server, "scheduler")) == 1
    assert server.process.poll() is None
    later = [server.create(num_inference_steps=4, seed=number) for number in range(3)]
    for video_id in later:
        assert server.result(video_id)["status"] == "completed"
    assert "draining" in server.http.get("/health/ready").json()["reason"]
    assert server.end(signal.SIGTERM) == 0
    assert tracebacks(server.stderr) == []
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.slow
def test_a_replica_that_is_given_up_leaves_its_jobs_to_the_other(serve, short_tmp):
    server = serve("--replicas", "2", "--crash-limit", "1").wait_ready()
    ids = [server.create(seed=number, num_inference_steps=STEPS) for number in range(4)]
    for video_id in ids:
        server.until(video_id, "step", step=5)
    processes(server, "scheduler")[0].kill()
    for video_id in ids:
        assert server.result(video_id, 90)["status"] == "completed"
        assert len(server.frames(video_id)) == 17
    assert "a replica is given up" in server.stderr
    assert server.stderr.count("a request goes on elsewhere") == 2
    assert len(processes(server, "scheduler")) == 1
    processes(server, "scheduler")[0].kill()
    assert server.end() == 1
    assert server.stderr.splitlines()[-1].startswith("error: the scheduler process ended with exit code -9")
    assert not list(short_tmp.glob("framemesh-*"))


# ---- apart -------------------------------------------------------------------------------------------------------


ADDRESS = "127.0.0.2"
"""Not one of the loopback addresses that go without keys, and there on every Linux."""


@pytest.fixture
def start(tmp_path, short_tmp):
    started = []

    def start(name, *words):
        folder = tmp_path / name
        folder.mkdir()
        log = (folder / "stderr.log").open("ab")
        command = [sys.executable, "-P", "-m", "launch", *words, "--output-path", str(folder / "outputs")]
        environment = child_environment({})
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True))
        log.close()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_gateway_and_a_mesh_apart_over_tcp_with_keys(start, tmp_path, short_tmp):
    write_pair(tmp_path / "keys", "here", *new_pair(), [ADDRESS])
    keys = ("--curve-dir", str(tmp_path / "keys"))
    endpoint = f"tcp://{ADDRESS}:{free_port()}"
    gateway = start(
        "gateway", "gateway", "--port", "0", "--mesh", f"film={endpoint}", "--frames-bind", f"tcp://{ADDRESS}:0", *keys
    )
    said = gateway.stdout.readline()
    assert said.startswith("framemesh serves film at http://")
    with httpx2.Client(base_url=said.split()[-1], timeout=30) as http:
        for answer in (http.get("/v1/models"), http.post("/v1/videos", json=BODY)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert http.get("/health/live").status_code == 200

        mesh = start("mesh", "mesh", "--bind", endpoint, "--device", "cpu", *keys)
        assert mesh.stdout.readline() == f"framemesh has a mesh of demo at {endpoint}\n"
        eventually(lambda: http.get("/health/ready").status_code == 200)
        assert http.get("/v1/models").json()["data"][0]["task_type"] == "T2V"
        video = http.post("/v1/videos", json=BODY).raise_for_status().json()
        with http.stream("GET", f"/v1/videos/{video['id']}/events") as response:
            told = list(parse_events(response.iter_lines()))
        assert sum(data["count"] for _, name, data in told if name == "frames") == 17
        assert told[-1][1] == "done"

        mesh.send_signal(signal.SIGTERM)
        assert mesh.wait(30) == 0
        refused = http.post("/v1/videos", json=BODY).json()["error"]
        assert (refused["code"], "server" in refused["message"]) == ("draining", False), "the gateway goes on"
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(30) == 0
    for name in ("gateway", "mesh"):
        assert tracebacks((tmp_path / name / "stderr.log").read_text()) == []
    assert not list(short_tmp.glob("framemesh-*"))


BAD_GATEWAYS = [
    (["--mesh", "demo"], "mesh: 'demo' is not of the form NAME=SCHEDULER"),
    ([], "mesh: names no mesh"),
    (
        ["--mesh", "demo=tcp://10.0.0.1:5555"],
        "mesh: tcp://10.0.0.1:5555 is not loopback; sockets between hosts need keys",
    ),
    (
        ["--mesh", "demo=ipc:///x", "--frames-bind", "tcp://0.0.0.0:1"],
        "frames_bind: 0.0.0.0 is no address to connect to",
    ),
    (["--mesh", "demo=ipc:///x", "--frames-bind", "10.0.0.1:1"], "frames_bind: 10.0.0.1:1 is not of the form tcp://"),
    (
        ["--mesh", "demo=ipc:///x", "--num-gpus", "2"],
        "--num-gpus: is no flag of gateway; it goes with `serve` and `mesh`",
    ),
]
BAD_MESHES = [
    (["--bind", "tcp://127.0.0.1:0"], "bind: port 0 is a different one at each start"),
    (["--bind", "tcp://127.0.0.1"], "bind: tcp://127.0.0.1 is not of the form tcp://ADDRESS:PORT"),
    (["--bind", "tcp://10.0.0.1:5555"], "bind: tcp://10.0.0.1:5555 is not loopback; sockets between hosts need keys"),
    (["--port", "1"], "--port: is no flag of mesh; it goes with `serve` and `gateway`"),
    (["--replicas", "2"], "--replicas: is no flag of mesh; it goes with `serve`"),
]


@pytest.mark.parametrize(("words", "message"), BAD_GATEWAYS, ids=lambda words: " ".join(words)[:40])
def test_a_gateway_that_could_not_work_is_refused_before_it_starts(words, message, capsys, tmp_path):
    assert main(["gateway", "--port", "0", "--output-path", str(tmp_path), *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_mesh_elsewhere_needs_a_place_for_its_frames(capsys, tmp_path):
    write_pair(tmp_path / "keys", "here", *new_pair(), ["10.0.0.9"])
    words = ["--mesh", "demo=tcp://10.0.0.1:5555", "--curve-dir", str(tmp_path / "keys")]
    assert main(["gateway", "--port", "0", "--output-path", str(tmp_path), *words]) == 2
    assert "error: frames_bind: tcp://10.0.0.1:5555 is on another host; name an address" in capsys.readouterr().err
    set_keys(None)


@pytest.mark.parametrize(("words", "message"), BAD_MESHES, ids=lambda words: " ".join(words)[:40])
def test_a_mesh_that_could_not_work_is_refused_before_it_starts(words, message, capsys, tmp_path):
    assert main(["mesh", "--output-path", str(tmp_path), *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_flags_of_meshes_and_gateways_are_none_of_serve(capsys):
    for flag in ("--bind=tcp://127.0.0.1:1", "--mesh=a=ipc:///x", "--frames-bind=tcp://127.0.0.1:1"):
        assert main(["serve", flag]) == 2
        assert "is no flag of serve" in capsys.readouterr().err
    with pytest.raises(InvalidInput, match="a Generator has one mesh"):
        Generator.from_pretrained("demo", replicas=2)


def test_every_setting_of_a_mesh_alone_is_a_setting():
    assert {name.partition(".")[0] for name in CONFIG} >= MESH_ONLY | HTTP_ONLY | ELSEWHERE
    assert COMMANDS["gateway"].keys().isdisjoint(MESH_ONLY)


# ---- how they are laid out ---------------------------------------------------------------------------------------


def test_devices_are_split_in_order_and_shared_only_if_they_are_too_few():
    gpus = Devices("cuda", ("a", "b", "c", "d"), "four")
    assert [part.visible for part in split(gpus, 2, 2)] == [("a", "b"), ("c", "d")]
    assert [part.visible for part in split(gpus, 1, 3)] == [("a",), ("b",), ("c",)]
    assert [part.visible for part in split(gpus, 4, 2)] == [gpus.visible] * 2
    assert split(Devices("cpu", (), "none"), 2, 2) == [Devices("cpu", (), "none")] * 2


def test_replicas_have_spools_of_their_own_and_one_cost_cache(tmp_path):
    config = Config(output_path=str(tmp_path), replicas=2, cost_cache="costs")
    spools = {replica_config(config, number).spool for number in range(2)}
    assert spools == {tmp_path / "spool" / "replica0", tmp_path / "spool" / "replica1"}
    assert {replica_config(config, number).cost_cache for number in range(2)} == {"costs"}
    alone = Config(output_path=str(tmp_path))
    assert replica_config(alone, 0) == alone


def test_frames_come_over_a_socket_from_here_and_over_tcp_from_elsewhere(tmp_path):
    schedulers = ["ipc:///x", "tcp://10.0.0.1:1", "tcp://127.0.0.1:1", "tcp://10.0.0.2:1"]
    local = [f"ipc://{tmp_path}/frames{number}" for number in range(4)]
    assert list(frames_endpoints(schedulers, tmp_path, None)) == local
    far = list(frames_endpoints(schedulers, tmp_path, "tcp://10.0.0.9:7000"))
    assert far == [local[0], "tcp://10.0.0.9:7000", local[2], "tcp://10.0.0.9:7001"]
    assert list(frames_endpoints(schedulers[1:2] * 2, tmp_path, "tcp://[::2]:0")) == ["tcp://[::2]:0"] * 2
