"""Keys between hosts: who is authorized talks, in secret; nobody else gets a word in, and both sides say why."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
import zmq
import zmq.auth

from gateway.mesh import Frames, Mesh
from launch.cli import main
from launch.process import child_environment, python_module
from runtime import wire
from runtime.config import Config, save_frozen
from runtime.errors import InvalidInput
from runtime.keys import AUTHORIZED, Keys, load_keys, write_pair
from runtime.models.card import card_for, read_configs
from runtime.protocol import Cancel, FramesChunk, FromScheduler, Grant, Observe, ToScheduler, Welcome
from runtime.sampling import SamplingParams
from runtime.wire import AsyncChannel, Channel, new_pair, set_keys

PATIENCE_S = 20.0
QUIET_S = 0.3
ADDRESS = "127.0.0.2"
"""Not one of the loopback addresses that go without keys, and there on every Linux."""
SERVER_AT = f"tcp://{ADDRESS}:0"
DEMO = Path(wire.__file__).parents[1] / "workers" / "demo" / "model"
CHUNK = FramesChunk("video", 0, 0, 1, 1, 16, 16)


def make_host(place, name, *addresses):
    write_pair(place / name, name, *new_pair(), addresses)
    return place / name


def authorize(guest, at):
    """Copy a host's .pub file."""
    return shutil.copy(guest / f"{guest.name}.pub", at / AUTHORIZED)


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Two hosts that know each other, and one that knows the server but is not known."""
    monkeypatch.setattr(wire, "HANDSHAKE_S", 0.3)
    monkeypatch.setattr(wire, "RECONNECT_S", 0.05)
    monkeypatch.setattr(wire, "COMPLAIN_EVERY_S", 0.0)
    names = SimpleNamespace(
        server=make_host(tmp_path, "server", ADDRESS), client=make_host(tmp_path, "client"),
        stranger=make_host(tmp_path, "stranger"),
    )  # fmt: skip
    authorize(names.client, names.server)
    authorize(names.server, names.client)
    authorize(names.server, names.stranger)
    yield names
    set_keys(None)


@pytest.fixture
def opened():
    """Close what a test opens."""
    with contextlib.ExitStack() as stack:
        yield lambda channel: stack.callback(channel.close) and channel


@pytest.fixture
def lines():
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def server(hosts, opened):
    set_keys(load_keys(hosts.server))
    return opened(Channel.bind(SERVER_AT, ToScheduler))


def join(folder, endpoint, identity=b"client"):
    set_keys(None if folder is None else load_keys(folder))
    return Channel.connect(endpoint, FromScheduler, identity)


def eventually(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def said(lines, *words):
    return any(all(word in repr(line) for word in words) for line in lines)


@contextlib.contextmanager
def raw(endpoint, **options):
    """A ZMQ client that is none of ours."""
    with zmq.Context.instance().socket(zmq.DEALER) as client:
        client.linger = 0
        for name, value in options.items():
            setattr(client, name, value)
        client.connect(endpoint)
        yield client


def good_frames():
    codec = wire.Codec(ToScheduler)
    return codec.frames(Grant(1), None)


class LiveScheduler:
    """A real scheduler process that listens between hosts."""

    def __init__(self, folder):
        with socket.create_server((ADDRESS, 0)) as free:
            self.endpoint = f"tcp://{ADDRESS}:{free.getsockname()[1]}"
        place = folder.parent
        save_frozen(Config(curve_dir=str(folder), cost_cache=str(place / "cost")), place / "config.json")
        words = ("--bind", self.endpoint, "--config", str(place / "config.json"), "--model-folder", str(DEMO))
        self._process = subprocess.Popen(
            python_module("runtime", *words), env=child_environment({}), stderr=subprocess.PIPE, text=True
        )
        self.errors = ""

    def __enter__(self):
        assert self._process.stderr is not None
        while "listening" not in (line := self._process.stderr.readline()):
            assert line, "it ended before it listened"
        return self.endpoint

    def __exit__(self, *error):
        self._process.terminate()
        _, self.errors = self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0


# ---- who is let in -----------------------------------------------------------------------------------------------


def test_hosts_that_know_each_other_talk(hosts, server, opened):
    client = opened(join(hosts.client, server.endpoint))
    client.send(Grant(7), payload=b"x" * 200_000)
    received = server.receive(PATIENCE_S)
    assert (received.sender, received.message, received.payload) == (b"client", Grant(7), b"x" * 200_000)
    server.send(Welcome(3), to=b"client")
    assert client.receive(PATIENCE_S).message == Welcome(3)
    assert (server.dropped.refused, client.dropped.refused) == (0, 0)


def test_both_kinds_of_channel_in_one_process(hosts, opened):
    """A gateway has an asyncio context, a worker a plain one; each context has its own gate."""

    async def talk():
        set_keys(load_keys(hosts.server))
        frames = opened(AsyncChannel.bind(SERVER_AT, FramesChunk))
        control = opened(Channel.bind(SERVER_AT, ToScheduler))
        set_keys(load_keys(hosts.client))
        worker = opened(Channel.connect(frames.endpoint, ToScheduler, b"worker"))
        gateway = opened(AsyncChannel.connect(control.endpoint, FromScheduler, b"gateway"))
        worker.send(CHUNK, payload=bytes(768))
        await gateway.send(Grant(2))
        assert (await frames.receive()).message == CHUNK
        assert (await asyncio.to_thread(control.receive, PATIENCE_S)).message == Grant(2)
        set_keys(load_keys(hosts.stranger))
        stranger = opened(AsyncChannel.connect(frames.endpoint, ToScheduler, b"stranger"))
        await stranger.send(CHUNK)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(frames.receive(), QUIET_S)
        assert await asyncio.to_thread(eventually, lambda: frames.dropped.refused > 0)

    asyncio.run(asyncio.wait_for(talk(), PATIENCE_S))


def test_what_is_said_cannot_be_read_on_the_way(hosts, server, opened):
    """A relay writes down every byte; the same words over loopback without keys are there in the clear."""
    secret = "a very private prompt"

    def overheard(endpoint, folder):
        relay = Relay(endpoint)
        client = opened(join(folder, relay.endpoint))
        client.send(Cancel("id", secret))
        return relay, client

    relay, _ = overheard(server.endpoint, hosts.client)
    assert server.receive(PATIENCE_S).message.reason == secret
    assert len(relay.bytes) > 300
    assert secret.encode() not in relay.bytes
    set_keys(None)
    plain = opened(Channel.bind("tcp://127.0.0.1:0", ToScheduler))
    relay, _ = overheard(plain.endpoint, None)
    assert plain.receive(PATIENCE_S).message.reason == secret
    assert secret.encode() in relay.bytes


class Relay:
    """Hands bytes on between a client and a server."""

    def __init__(self, endpoint):
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server((host, 0))
        self.endpoint = f"tcp://{host}:{self._listener.getsockname()[1]}"
        self.bytes = b""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        client, _ = self._listener.accept()
        self._listener.close()
        server = socket.create_connection(self._server)
        threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
        self._pump(client, server)

    def _pump(self, source, target):
        with source, target, contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.bytes += data
                target.sendall(data)


def test_ipc_goes_without_keys_either_way(hosts, opened, tmp_path_factory):
    set_keys(load_keys(hosts.server))
    server = opened(Channel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/socket", ToScheduler))
    client = opened(join(None, server.endpoint))
    client.send(Grant(1))
    assert server.receive(PATIENCE_S).message == Grant(1)


def test_loopback_finds_this_hosts_own_key(hosts, opened):
    set_keys(load_keys(hosts.server))
    server = opened(Channel.bind("tcp://127.0.0.1:0", ToScheduler))
    client = opened(join(hosts.server, server.endpoint.replace("127.0.0.1", "localhost")))
    client.send(Grant(1))
    assert server.receive(PATIENCE_S).message == Grant(1)


# ---- who is not --------------------------------------------------------------------------------------------------


def test_a_key_that_is_not_authorized(hosts, server, opened, lines):
    stranger = opened(join(hosts.stranger, server.endpoint))
    stranger.send(Grant(1))
    assert server.receive(QUIET_S) is None
    assert eventually(lambda: server.dropped.refused and stranger.dropped.refused)
    public = load_keys(hosts.stranger).own.key.decode()
    assert said(lines, "not authorized", "127.0.0.", public), "the operator is told which key to add"
    assert eventually(lambda: said(lines, server.endpoint, "folder authorized")), "and the stranger what to ask for"
    assert server.receive(0) is None


def test_a_server_that_is_another_than_expected(hosts, server, opened, lines):
    """Somebody else answers under the server's address: the client does not talk to it."""
    shutil.copy(hosts.stranger / "stranger.pub", hosts.client / AUTHORIZED / "server.pub")
    with (hosts.client / AUTHORIZED / "server.pub").open("a") as file:
        file.write(f'metadata\n    addresses = "{ADDRESS}"\n')
    client = opened(join(hosts.client, server.endpoint))
    client.send(Grant(1))
    assert eventually(lambda: server.dropped.refused and client.dropped.refused)
    assert server.receive(QUIET_S) is None
    assert eventually(lambda: said(lines, "another key than the one here for its address"))
    assert eventually(lambda: said(lines, "takes this host for another"))


def test_a_client_without_keys(hosts, opened, lines):
    set_keys(load_keys(hosts.server))
    server = opened(Channel.bind("tcp://127.0.0.1:0", ToScheduler))
    plain = opened(join(None, server.endpoint))
    plain.send(Grant(1))
    assert eventually(lambda: server.dropped.refused and plain.dropped.refused)
    assert server.receive(QUIET_S) is None
    assert said(lines, "one side uses keys and the other does not", "--curve-dir")


def test_a_server_without_keys_hears_nothing_from_a_client_with_keys(hosts, opened):
    set_keys(None)
    plain = opened(Channel.bind("tcp://127.0.0.1:0", ToScheduler))
    client = opened(join(hosts.client, plain.endpoint))
    client.send(Grant(1))
    assert eventually(lambda: plain.dropped.refused and client.dropped.refused)
    assert plain.receive(QUIET_S) is None


def test_strangers_of_every_kind(server):
    """No mechanism, a password, a key of its own making, and no ZMQ at all."""
    public, secret = new_pair()
    server_key = zmq.auth.load_certificate(server_file(server))[0]
    strangers = [
        {},
        {"plain_username": b"admin", "plain_password": b"admin"},
        {"curve_serverkey": server_key, "curve_publickey": public, "curve_secretkey": secret},
    ]
    for options in strangers:
        before = server.dropped.refused
        with raw(server.endpoint, **options) as client:
            client.send_multipart(good_frames(), copy=True)
            assert eventually(lambda before=before: server.dropped.refused > before), options
            assert server.receive(QUIET_S / 3) is None
    host, _, port = server.endpoint.removeprefix("tcp://").rpartition(":")
    greetings = (b"GET / HTTP/1.1\r\n\r\n" * 9, b"\x01\x00\x02\x00\x81\x01\xc0", os.urandom(500), b"\xff" * 500)
    for greeting in greetings:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(greeting)
            assert server.receive(QUIET_S / 3) is None


def server_file(server):
    """The key file of the only server of a test."""
    return wire._Process.keys.folder / f"{wire._Process.keys.own.name}.pub"


def test_an_added_key_takes_effect_without_a_restart(hosts, server, opened):
    stranger = opened(join(hosts.stranger, server.endpoint))
    stranger.send(Grant(5))
    assert eventually(lambda: server.dropped.refused > 0)
    assert server.receive(0) is None
    authorize(hosts.stranger, hosts.server)
    assert server.receive(PATIENCE_S).message == Grant(5)


def test_a_key_that_is_taken_away_is_refused_at_the_next_handshake(hosts, server, opened):
    first = opened(join(hosts.client, server.endpoint, b"first"))
    first.send(Grant(1))
    assert server.receive(PATIENCE_S).message == Grant(1)
    (hosts.server / AUTHORIZED / "client.pub").unlink()
    second = opened(join(hosts.client, server.endpoint, b"second"))
    second.send(Grant(2))
    assert eventually(lambda: server.dropped.refused > 0)
    first.send(Grant(3))
    assert server.receive(PATIENCE_S).message == Grant(3)
    assert server.receive(QUIET_S) is None


def test_a_key_file_that_others_can_write_or_that_is_nonsense_authorizes_nobody(hosts, server, opened, lines):
    (hosts.server / AUTHORIZED / "client.pub").chmod(0o666)
    (hosts.server / AUTHORIZED / "noise.pub").write_bytes(os.urandom(300))
    client = opened(join(hosts.client, server.endpoint))
    client.send(Grant(1))
    assert eventually(lambda: server.dropped.refused > 0)
    assert server.receive(0) is None
    assert said(lines, "client.pub", "could be changed by others", "chmod go-w")
    (hosts.server / AUTHORIZED / "client.pub").chmod(0o644)
    assert server.receive(PATIENCE_S).message == Grant(1)


def test_a_gate_that_breaks_lets_nobody_in_and_says_so(hosts, server, opened, lines, monkeypatch):
    friend = opened(join(hosts.client, server.endpoint, b"friend"))
    friend.send(Grant(1))
    assert server.receive(PATIENCE_S).message == Grant(1)
    with monkeypatch.context() as broken:
        broken.setattr(Keys, "is_authorized", lambda self, key: 1 / 0)
        late = opened(join(hosts.client, server.endpoint, b"late"))
        late.send(Grant(2))
        assert eventually(lambda: said(lines, "the gate for keys broke", "error"))
    seen = server.dropped.refused
    assert eventually(lambda: server.dropped.refused > seen), "who knocks again is refused, though the keys are good"
    assert server.receive(QUIET_S) is None
    friend.send(Grant(3))
    assert server.receive(PATIENCE_S).message == Grant(3)
    set_keys(load_keys(hosts.server))
    opened(Channel.bind(SERVER_AT, ToScheduler))
    assert server.receive(PATIENCE_S).message == Grant(2), "the next server brings a new gate"


# ---- endpoints ---------------------------------------------------------------------------------------------------


def test_without_keys_nothing_leaves_the_host(opened):
    set_keys(None)
    for make in (lambda: Channel.bind(SERVER_AT, ToScheduler), lambda: join(None, f"tcp://{ADDRESS}:5555")):
        with pytest.raises(InvalidInput, match="is not loopback; sockets between hosts need keys"):
            make()


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("tcp://10.9.8.7:5555", r"no key in .*authorized has the address 10.9.8.7; copy that host's .pub file there"),
        ("tcp://0.0.0.0:5555", "no key in"),
        ("tcp://user@127.0.0.2:5555", "not of the form tcp://HOST:PORT"),
        ("tcp://127.0.0.2:1;127.0.0.2:2", "not of the form"),
        ("tcp://127.0.0.2:1/path", "not of the form"),
        ("tcp://:5555", "not of the form"),
        ("tcp://127.0.0.2", "cannot connect to"),
    ],
)
def test_addresses_that_no_key_goes_with(hosts, endpoint, words):
    with pytest.raises(InvalidInput, match=words):
        join(hosts.client, endpoint)


def test_an_address_of_two_keys_is_refused(hosts):
    twin = make_host(hosts.client.parent, "twin", ADDRESS)
    authorize(twin, hosts.client)
    with pytest.raises(InvalidInput, match=r"several keys in .*authorized \(server, twin\); keep one"):
        join(hosts.client, "tcp://127.0.0.2:5555")


def test_addresses_have_many_spellings(hosts):
    other = make_host(hosts.client.parent, "Other.example", "fd00:0::7", "10.0.0.7")
    authorize(other, hosts.client)
    keys, expected = load_keys(hosts.client), load_keys(other).own.key
    for address in ("other.EXAMPLE", "other.example.", "fd00::7", "FD00::0007", "10.0.0.7"):
        assert keys.server_key(address) == expected


# ---- the folder --------------------------------------------------------------------------------------------------


def test_pyzmq_reads_the_same_keys(hosts):
    keys = load_keys(hosts.client)
    assert zmq.auth.load_certificate(hosts.client / "client.secret") == (keys.own.key, keys.secret)
    assert zmq.auth.load_certificate(hosts.client / "client.pub") == (keys.own.key, None)


def test_a_secret_is_private_from_its_first_moment_and_never_told(tmp_path, lines):
    before = os.umask(0)
    try:
        folder = make_host(tmp_path, "host")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.iterdir()]}
    assert modes == {"host": 0o700, "host.secret": 0o600, "host.pub": 0o644, AUTHORIZED: 0o700}
    keys = load_keys(folder)
    keys.authorized.hosts()
    secret = keys.secret.decode()
    assert secret in (folder / "host.secret").read_text()
    assert secret not in (folder / "host.pub").read_text() + repr(keys) + repr(lines)


def swap_public(folder):
    other = make_host(folder.parent, "other")
    shutil.copy(other / "other.pub", folder / "host.pub")


def swap_both(folder):
    """A public key that stands in both files, and a secret one that is not its own."""
    text = (folder / "host.secret").read_text()
    key = load_keys(folder).secret.decode()
    (folder / "host.secret").write_text(text.replace(key, new_pair()[1].decode()))


FAULTS = {
    "no folder": (shutil.rmtree, "cannot be read: No such file"),
    "no pair": (lambda f: (f / "host.secret").unlink(), "holds no key pair of this host; make one with framemesh key"),
    "no public half": (lambda f: (f / "host.pub").unlink(), "host.pub cannot be read"),
    "two pairs": (lambda f: shutil.copy(f / "host.secret", f / "b.secret"), r"several secret keys \(b.secret, host"),
    "group may read": (lambda f: (f / "host.secret").chmod(0o640), r"open to others \(mode 0640\); run: chmod 600"),
    "all may read": (lambda f: (f / "host.secret").chmod(0o604), "open to others"),
    "all may add keys": (lambda f: (f / AUTHORIZED).chmod(0o777), "could be changed by others"),
    "group may change": (lambda f: f.chmod(0o770), "could be changed by others"),
    "no key inside": (lambda f: (f / "host.secret").write_text("curve\n"), "no line \"secret-key\""),
    "half a key": (lambda f: (f / "host.pub").write_text('public-key = "abc"'), "no key of 40 Z85 characters"),
    "noise": (lambda f: (f / "host.secret").write_bytes(b"\xff" * 100), "is no text"),
    "another public half": (swap_public, "of two different pairs"),
    "another secret half": (swap_both, "does not belong to host's public key"),
    "a secret in the public file": (lambda f: shutil.copy(f / "host.secret", f / "host.pub"), "holds a SECRET key"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_trusted_is_refused(tmp_path, fault):
    folder = make_host(tmp_path, "host")
    set_keys(load_keys(folder))
    set_keys(None)
    damage, words = FAULTS[fault]
    damage(folder)
    with pytest.raises(InvalidInput, match=words) as refusal:
        set_keys(load_keys(folder))
    assert refusal.value.field == "curve_dir"
    assert wire._Process.keys is None


# ---- processes ---------------------------------------------------------------------------------------------------


def test_threads_end_with_their_sockets(hosts, opened):
    def watchers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("handshakes of")]

    set_keys(load_keys(hosts.server))
    channels = [Channel.bind(SERVER_AT, ToScheduler) for _ in range(3)]
    channels += [join(hosts.client, channel.endpoint) for channel in channels]
    assert len(watchers()) == 6
    for channel in channels:
        channel.close()
    assert eventually(lambda: not watchers())


def test_a_process_with_open_sockets_ends_at_once(hosts):
    """Neither the gate nor the watchers keep it."""
    code = f"""
from runtime.keys import load_keys
from runtime.protocol import *
from runtime.wire import *
set_keys(load_keys({str(hosts.server)!r}))
server = Channel.bind({SERVER_AT!r}, ToScheduler)
client = Channel.connect(server.endpoint, FromScheduler, b"client")
client.send(Grant(1))
print(server.receive(10).message)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], env=child_environment({}), capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "Grant(credits=1)\n", "")


def test_a_scheduler_process_takes_the_folder_from_its_configuration(hosts, opened):
    scheduler = LiveScheduler(hosts.server)
    with scheduler as endpoint:
        friend = opened(join(hosts.client, endpoint, b"friend"))
        friend.send(Observe())
        assert isinstance(friend.receive(PATIENCE_S).message, Welcome)
        with raw(endpoint) as plain:
            plain.send_multipart(good_frames(), copy=True)
            stranger = opened(join(hosts.stranger, endpoint, b"stranger"))
            stranger.send(Observe())
            assert stranger.receive(QUIET_S) is None
            assert plain.poll(0) == 0
    assert "a key that is not authorized" in scheduler.errors
    assert load_keys(hosts.server).secret.decode() not in scheduler.errors


@pytest.mark.slow
def test_a_video_between_two_hosts(hosts, tmp_path):
    """Scheduler and gateway on the one, the rank on the other: control and frames over TCP with keys."""
    save_frozen(Config(curve_dir=str(hosts.client), device="cpu"), tmp_path / "worker.json")
    elastic = ("--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    shared = ("--config", str(tmp_path / "worker.json"), "--model-folder", str(DEMO))
    card = card_for(read_configs(DEMO))
    params = card.check(SamplingParams(prompt="a red circle moving right", seed=1, num_inference_steps=2))

    async def ask(endpoint):
        set_keys(load_keys(hosts.server))
        mesh = Mesh(endpoint, SERVER_AT)
        await mesh.start()
        try:
            await mesh.wait_ready(120.0)
            events = [event async for event in mesh.run(mesh.request("video", params))]
            assert sum(len(event.pixels) for event in events if isinstance(event, Frames)) == params.num_frames
            assert (mesh._frames.dropped.refused, mesh._control.dropped.refused) == (0, 0)
        finally:
            await mesh.close()

    with LiveScheduler(hosts.server) as endpoint, (tmp_path / "worker.log").open("wb") as log:
        command = python_module("torch.distributed.run", *elastic, "-m", "workers", "--scheduler", endpoint, *shared)
        workers = subprocess.Popen(command, env=child_environment({}), stdout=log, stderr=log, start_new_session=True)
        try:
            asyncio.run(ask(endpoint))
        finally:
            os.killpg(workers.pid, signal.SIGKILL)
            workers.wait()


# ---- the command -------------------------------------------------------------------------------------------------


def test_keygen_makes_a_pair_and_says_where_it_goes(tmp_path, capsys):
    assert main(["keygen", "--curve-dir", str(tmp_path / "keys"), "--name", "gpu0"]) == 0
    said = capsys.readouterr().out
    keys = load_keys(tmp_path / "keys")
    set_keys(keys)
    set_keys(None)
    assert keys.own.name == "gpu0"
    for words in (
        "gpu0.secret",
        "it never leaves this host",
        f"{tmp_path / 'keys' / 'gpu0.pub'} OTHER:",
        "--curve-dir",
    ):
        assert words in said
    assert keys.secret.decode() not in said
    assert {"127.0.0.1", "::1"}.isdisjoint(keys.own.addresses)


def test_keygen_overwrites_nothing(tmp_path, capsys):
    words = ["keygen", "--curve-dir", str(tmp_path / "keys"), "--name"]
    assert main([*words, "gpu0"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "keys").glob("gpu0.*")}
    assert main([*words, "gpu0"]) == main([*words, "gpu1"]) == 2
    assert "is there already and is not overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").glob("gpu*")} == before


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "x" * 201, 'quo"te'])
def test_keygen_refuses_names_that_are_no_host(tmp_path, capsys, name):
    assert main(["keygen", "--curve-dir", str(tmp_path / "keys"), "--name", name]) == 2
    assert "is no host name" in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()


def test_keygen_takes_its_folder_from_the_environment_or_has_one_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FRAMEMESH_CURVE_DIR", raising=False)
    assert main(["keygen"]) == 0
    assert load_keys(tmp_path / "config" / "framemesh" / "keys") is not None
    monkeypatch.setenv("FRAMEMESH_CURVE_DIR", str(tmp_path / "named"))
    assert main(["keygen", "--name", "named"]) == 0
    assert load_keys(tmp_path / "named").own.name == "named"
    (tmp_path / "file").write_text("in the way")
    assert main(["keygen", "--curve-dir", str(tmp_path / "file" / "below")]) == 2


def test_an_operator_looks_at_a_mesh_between_hosts(hosts, opened, capsys):
    """`framemesh jobs --mesh tcp://…` with the keys, and without."""
    with LiveScheduler(hosts.server) as endpoint:
        assert main(["jobs", "--mesh", endpoint, "--curve-dir", str(hosts.client), "--json"]) == 0
        assert capsys.readouterr().out.strip() == "[]"
        assert main(["jobs", "--mesh", endpoint]) == 2
        assert "sockets between hosts need keys (--curve-dir)" in capsys.readouterr().err
