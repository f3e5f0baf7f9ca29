"""Webhooks: signed as OpenAI's SDK verifies it, sent until they are heard, and never in anybody's way."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import httpx2
import openai
import pytest
import structlog
from fake_mesh import MODEL_FOLDER
from receiver import Answer, Receiver
from served import BODY, eventually, names
from sqlalchemy import text

from gateway.jobs import webhooks as webhooks_module
from gateway.jobs.deliveries import Deliveries, Delivery
from gateway.jobs.store import JobStore
from gateway.jobs.webhooks import read_secrets
from runtime.config import Config, check_config, save_frozen
from runtime.errors import InvalidInput

ROOT = Path(__file__).parent.parent
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(webhooks_module, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(webhooks_module, "PAUSE_FACTOR", 1)


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


def write_secrets(folder: Path, *lines: str, mode: int = 0o600) -> Path:
    path = folder / "secrets"
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(mode)
    return path


@pytest.fixture
def signing(start, tmp_path):
    """A function that starts a gateway which signs, and takes URLs on this host."""
    path = write_secrets(tmp_path, SECRET)

    def signing(**changes):
        return start(**({"webhook_secret_file": str(path), "allow_private_urls": True} | changes))

    return signing


def events(receiver) -> list[dict]:
    return [json.loads(received.body) for received in receiver.received]


def test_the_ends_of_jobs_are_told_as_the_sdk_reads_them(signing, receiver, fake):
    gateway = signing()
    fake.failures = {"denoise:3": ("out_of_memory", "too large")}
    failed = gateway.create(webhook_url=f"{receiver.url}/hook?team=7")
    gateway.wait(failed, "failed")
    fake.failures, fake.held = {}, {"denoise:1"}
    cancelled = gateway.create(webhook_url=f"{receiver.url}/hook")
    fake.wait_for("denoise:1")
    gateway.http.post(f"/v1/videos/{cancelled}/cancel").raise_for_status()
    fake.release()
    done = gateway.create(webhook_url=f"{receiver.url}/hook")
    gateway.wait(done)
    gateway.wait(gateway.create())
    eventually(lambda: len(receiver.received) == 3)

    client = openai.OpenAI(api_key="none", base_url=gateway.url, webhook_secret=SECRET)
    told = {}
    for received in receiver.received:
        event = client.webhooks.unwrap(received.body, received.headers)
        told[event.data.id] = event.type
        assert event.object == "event"
        assert event.id == received.headers["webhook-id"]
        assert event.id.startswith("evt_")
        assert abs(event.created_at - time.time()) < 60
        assert received.headers["content-type"] == "application/json"
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(received.body.replace(b"video_", b"video_0"), received.headers)
    assert told == {failed: "video.failed", cancelled: "video.cancelled", done: "video.completed"}
    assert receiver.received[0].path == "/hook?team=7"


def test_what_was_not_heard_is_said_again(signing, receiver):
    answers = [Answer(500), Answer(302, {"location": f"{receiver.url}/elsewhere"}), Answer(404), Answer(204)]
    receiver.answer = lambda _received: answers.pop(0)
    gateway = signing()
    gateway.wait(gateway.create(num_frames=1, webhook_url=receiver.url))
    eventually(lambda: not answers)
    eventually(lambda: pending(gateway) == 0)
    assert len(receiver.received) == 4
    assert {received.path for received in receiver.received} == {"/"}, "no redirect is followed"
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 1
    assert len({received.body for received in receiver.received}) == 1


def pending(gateway) -> int:
    query = text("SELECT count(*) FROM deliveries WHERE next_at IS NOT NULL")
    counting = gateway.runner._store.transact(lambda connection: connection.scalar(query))
    return asyncio.run_coroutine_threadsafe(counting, gateway._loop).result(5)


def test_a_receiver_that_is_gone_for_good_is_left_alone(signing, receiver, monkeypatch):
    receiver.answer = lambda _received: Answer(410)
    gateway = signing()
    gateway.wait(gateway.create(num_frames=1, webhook_url=receiver.url))
    eventually(lambda: receiver.received != [] and pending(gateway) == 0)
    assert len(receiver.received) == 1
    receiver.answer = lambda _received: Answer(503)
    monkeypatch.setattr(webhooks_module, "RETRY_FOR_S", 0.3)
    gateway.wait(gateway.create(num_frames=1, webhook_url=receiver.url))
    eventually(lambda: len(receiver.received) > 1 and pending(gateway) == 0)


def test_the_pauses_grow_for_about_a_day(monkeypatch):
    monkeypatch.undo()
    now, attempts, pauses = time.time(), 0, []
    first = now
    monkeypatch.setattr(webhooks_module.time, "time", lambda: now)
    while True:
        attempts += 1
        next_at = webhooks_module._next_at(Delivery("evt_1", "video_1", "video.failed", "http://a", first, attempts))
        if next_at is None:
            break
        pauses.append(next_at - now)
        now = next_at
    assert 10 <= attempts <= 20
    assert 0.8 * 86_400 < now - first <= 86_400
    assert pauses[0] < 3
    assert all(later > 2 * earlier for earlier, later in pairwise(pauses[:6]))


def test_a_slow_receiver_holds_up_nobody(signing, receiver):
    let_go, most, now = threading.Event(), 0, 0
    lock = threading.Lock()

    def slow(received):
        nonlocal most, now
        if received.path != "/slow":
            return Answer()
        with lock:
            now += 1
            most = max(most, now)
        let_go.wait(20)
        with lock:
            now -= 1
        return Answer()

    receiver.answer = slow
    gateway = signing()
    try:
        ids = [gateway.create(num_frames=1, webhook_url=f"{receiver.url}/slow") for _ in range(7)]
        for video_id in ids:
            gateway.wait(video_id)
        eventually(lambda: now == webhooks_module.AT_ONCE_PER_URL)
        quick = gateway.create(num_frames=1, webhook_url=f"{receiver.url}/quick")
        gateway.wait(quick)
        eventually(lambda: any(received.path == "/quick" for received in receiver.received))
    finally:
        let_go.set()
    eventually(lambda: {event["data"]["id"] for event in events(receiver)} == {*ids, quick})
    assert most == webhooks_module.AT_ONCE_PER_URL


def test_every_job_is_told_to_the_operator_too(signing, receiver):
    """The operator's own URL may be inside the network; the same URL of a client is told once."""
    gateway = signing(webhook_url=f"{receiver.url}/own", allow_private_urls=False)
    plain = gateway.create(num_frames=1)
    gateway.wait(plain)
    assert f"{receiver.url}/own" not in gateway.http.get("/server_info").raise_for_status().text
    eventually(lambda: [event["data"]["id"] for event in events(receiver)] == [plain])
    refused = gateway.http.post("/v1/videos", json=BODY | {"webhook_url": f"{receiver.url}/hook"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook_url")
    gateway.close()

    gateway = signing(webhook_url=f"{receiver.url}/own")
    receiver.received.clear()
    both = gateway.create(num_frames=1, webhook_url=f"{receiver.url}/own")
    eventually(lambda: pending(gateway) == 0 and len(receiver.received) == 1)
    other = gateway.create(num_frames=1, webhook_url=f"{receiver.url}/hook")
    eventually(lambda: len(receiver.received) == 3)
    told = [(received.path, json.loads(received.body)["data"]["id"]) for received in receiver.received]
    assert sorted(told) == sorted([("/own", both), ("/own", other), ("/hook", other)])


REFUSED = ["http://127.0.0.1:1/hook", "http://localhost/hook", "http://169.254.169.254/latest", "ftp://example.org/a"]
REFUSED += ["http://[::1]/", "example.org", "", "http://user:pw@example.org/", "http://nowhere.invalid/"]


def test_a_url_that_leads_inside_is_refused_before_anything_is_queued(signing, fake):
    gateway = signing(allow_private_urls=False)
    for url in REFUSED:
        answer = gateway.http.post("/v1/videos", json=BODY | {"webhook_url": url})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "webhook_url", "invalid_url"), url
    assert fake.submitted == []
    assert gateway.http.get("/v1/videos").json()["data"] == []


def test_a_url_that_leads_inside_by_now_is_not_called(signing, receiver, logs):
    """What was accepted is checked again when it is called."""
    first = signing()
    receiver.answer = lambda _received: Answer(500)
    first.wait(first.create(num_frames=1, webhook_url=f"{receiver.url}/hook"))
    eventually(lambda: receiver.received != [])
    first.close()
    receiver.received.clear()
    signing(allow_private_urls=False)
    eventually(lambda: any("AddressRefused" in str(entry.get("outcome")) for entry in logs))
    assert receiver.received == []


def test_what_falls_due_between_two_looks_is_not_overlooked(signing, receiver, logs, monkeypatch):
    """By a gateway that has just come: nothing wakes it."""
    take = Deliveries.take

    async def take_slowly(*args):
        delivery = await take(*args)
        if delivery is None:
            await asyncio.sleep(1.5)
        return delivery

    monkeypatch.setattr(webhooks_module, "FIRST_PAUSE_S", 1.0)
    answers = [Answer(500), Answer(204)]
    receiver.answer = lambda _received: answers.pop(0)
    first = signing()
    first.wait(first.create(num_frames=1, webhook_url=f"{receiver.url}/hook"))
    eventually(lambda: any(entry.get("outcome") == 500 for entry in logs))
    first.close()
    monkeypatch.setattr(Deliveries, "take", take_slowly)
    signing()
    eventually(lambda: not answers, 0.7 * webhooks_module.LOOK_EVERY_S)


def test_a_delivery_that_was_just_taken_is_given_back_at_the_end(signing, receiver, monkeypatch):
    """And not at the end of its lease."""
    taken, take = threading.Event(), Deliveries.take

    async def take_slowly(*args):
        delivery = await take(*args)
        if delivery is not None:
            taken.set()
            await asyncio.sleep(0.5)
        return delivery

    with monkeypatch.context() as patch:
        patch.setattr(Deliveries, "take", take_slowly)
        first = signing()
        first.wait(first.create(num_frames=1, webhook_url=f"{receiver.url}/hook"))
        assert taken.wait(5)
        first.close()
    assert receiver.received == []
    signing()
    eventually(lambda: receiver.received != [])


def test_without_a_secret_nobody_can_ask_for_webhooks(gateway, fake):
    answer = gateway.http.post("/v1/videos", json=BODY | {"webhook_url": "https://example.org/hook"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "webhook_url", "webhooks_not_configured")
    assert "--webhook-secret-file" in error["message"]
    assert fake.submitted == []
    assert gateway.http.post("/v1/videos", json=BODY | {"webhook_url": None}).status_code == 200


def test_secrets_are_checked_before_anything_starts(tmp_path):
    wrong = [
        ([], 0o600, "is empty"),
        ([SECRET], 0o640, "mode 0640"),
        (["hunter2"], 0o600, "whsec_"),
        (["whsec_!!!"], 0o600, "base64"),
        (["whsec_YWJj"], 0o600, "3 bytes"),
    ]
    for lines, mode, words in wrong:
        with pytest.raises(InvalidInput, match=words) as refused:
            read_secrets(write_secrets(tmp_path, *lines, mode=mode))
        assert refused.value.field == "webhook_secret_file"
        assert not any(line in str(refused.value) for line in lines), "a secret is not shown"
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_secrets(tmp_path / "none")
    for options, field in [
        ({"webhook_url": "https://example.org/hook"}, "webhook_url"),
        ({"webhook_url": "example.org", "webhook_secret_file": "a"}, "webhook_url"),
    ]:
        with pytest.raises(InvalidInput) as refused:
            check_config(Config(**options))
        assert refused.value.field == field


def test_while_secrets_change_either_of_them_verifies(signing, receiver, tmp_path):
    other = "whsec_" + base64.b64encode(bytes(range(100, 132))).decode()
    gateway = signing(webhook_secret_file=str(write_secrets(tmp_path, other, SECRET)))
    gateway.wait(gateway.create(num_frames=1, webhook_url=receiver.url))
    eventually(lambda: receiver.received != [])
    [received] = receiver.received
    for secret in (SECRET, other):
        client = openai.OpenAI(api_key="none", base_url=gateway.url, webhook_secret=secret)
        assert client.webhooks.unwrap(received.body, received.headers).type == "video.completed"


def test_two_processes_take_a_delivery_once(database_url):
    async def main():
        store = JobStore(database_url)
        await store.open()
        deliveries = Deliveries(store)
        owed = [Delivery(f"evt_{n}", "video_1", "video.failed", "http://a", time.time()) for n in range(5)]
        for delivery in owed:
            statement = deliveries.owing(delivery)
            await store.transact(lambda connection, statement=statement: connection.execute(statement))
        taken = await asyncio.gather(*(deliveries.take(10, ()) for _ in range(8)))
        first, second, *_ = got = [delivery for delivery in taken if delivery is not None]
        assert sorted(delivery.id for delivery in got) == [delivery.id for delivery in owed]
        assert await deliveries.take(10, ()) is None
        await deliveries.postpone(first, time.time() - 1)
        assert await deliveries.take(10, ["http://a"]) is None, "that URL has enough to do"
        again = await deliveries.take(10, ())
        assert (again.id, again.attempts) == (first.id, 2)
        await deliveries.prune(time.time() + 1)
        await deliveries.postpone(second, time.time() - 1)
        assert await deliveries.take(10, ()) is None
        await store.close()

    asyncio.run(main())


def test_a_receiver_hears_of_a_job_although_the_gateway_was_killed_in_between(fake, tmp_path, receiver):
    """The receiver is away when the job ends, the gateway is killed, and both come back."""
    config_file = tmp_path / "config.json"
    secrets = write_secrets(tmp_path, SECRET)
    config = Config(
        output_path=str(tmp_path / "out"), port=0, webhook_secret_file=str(secrets), allow_private_urls=True
    )
    save_frozen(config, config_file)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-P", "-m", "gateway", "--config", str(config_file), "--model-folder", str(MODEL_FOLDER)]
    command += ["--scheduler", fake.endpoint, "--frames"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = []

    def launch() -> httpx2.Client:
        frames = f"ipc://{fake.folder}/frames{len(running)}"
        process = subprocess.Popen([*command, frames], env=environment, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return httpx2.Client(base_url=json.loads(process.stdout.readline())["url"], timeout=10)

    asked, let_go = threading.Event(), threading.Event()

    def hang(_received):
        asked.set()
        let_go.wait(20)
        return Answer(500)

    try:
        receiver.answer = hang
        with launch() as http:
            body = BODY | {"num_frames": 1, "webhook_url": receiver.url}
            video_id = http.post("/v1/videos", json=body).raise_for_status().json()["id"]
            assert asked.wait(20)
            assert http.get(f"/v1/videos/{video_id}").json()["status"] == "completed", "nobody waited for the receiver"
            running[0].send_signal(signal.SIGKILL)
            running[0].wait(10)
        let_go.set()
        receiver.answer = lambda _received: Answer()
        expire_leases(tmp_path / "out" / "jobs.sqlite3")
        with launch():
            eventually(lambda: len(receiver.received) == 2, 20)
        first, second = receiver.received
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert json.loads(second.body)["data"]["id"] == video_id
    finally:
        let_go.set()
        for process in running:
            process.kill()
            process.communicate()


def expire_leases(database: Path) -> None:
    """As if the 15 seconds were over that a dead process's deliveries wait for."""
    with contextlib.closing(sqlite3.connect(database)) as store:
        changed = store.execute("UPDATE deliveries SET next_at = next_at - 15 WHERE next_at IS NOT NULL").rowcount
        store.commit()
    assert changed == 1


def test_the_end_and_the_word_of_it_are_stored_together_or_not_at_all(signing, receiver, monkeypatch):
    """If the delivery cannot be written the job's end is not either."""
    gateway = signing()
    monkeypatch.setattr(Deliveries, "owing", lambda _self, _delivery: text("INSERT INTO nothing VALUES (1)"))
    video_id = gateway.create(num_frames=1, webhook_url=receiver.url)
    with gateway.follow(video_id) as following:
        assert names(following)[-1] == "error"

    row = asyncio.run_coroutine_threadsafe(gateway.runner._store.get(video_id), gateway._loop).result(5)
    assert row.status == "in_progress"
