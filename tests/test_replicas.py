"""Several meshes of one model, and several models, behind one gateway: where requests go, and where they go on."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import fake_mesh
import msgspec
import numpy as np
import pytest
import structlog
from fake_mesh import FakeMesh, moving_frames
from served import BODY, Gateway, eventually, names

from gateway import mesh as mesh_module
from gateway import replicas as replicas_module
from gateway.__main__ import connect
from gateway.catalog import Catalog, Model
from gateway.jobs import runner as runner_module
from gateway.mesh import Frames, Mesh
from gateway.replicas import Replicas
from runtime.config import Config
from runtime.errors import InvalidInput, NotReady, RequestFailed
from runtime.places import Place, is_remote, read_places
from runtime.protocol import Completed, Progress
from runtime.sampling import SamplingParams

PATIENCE_S = 20.0
FIRSTS = [0, 1, 5, 9, 13]


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def eager(monkeypatch):
    """A mesh that is silent is missed at once, though not before one that only takes its time."""
    monkeypatch.setattr(mesh_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(replicas_module, "BEAT_S", 0.05)


@pytest.fixture
def impatient(eager, monkeypatch):
    """Silence is noticed soon, but ten beats have to be missed."""
    monkeypatch.setattr(fake_mesh, "BEAT_S", 0.1)
    monkeypatch.setattr(replicas_module, "SILENT_S", 1.0)
    monkeypatch.setattr(replicas_module, "LOST_S", 1.2)


@pytest.fixture
def fakes(sockets):
    """Two meshes of the demo model."""
    with contextlib.ExitStack() as stack:
        made = []
        for name in ("a", "b"):
            (sockets / name).mkdir()
            made.append(FakeMesh(sockets / name))
            stack.callback(made[-1].close)
        yield made


@pytest.fixture
def params(fakes):
    return fakes[0].card.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=4))


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 what is waited for is another thread's
            await asyncio.sleep(0.005)


class Consumer:
    """Takes what comes of one request."""

    def __init__(self, replicas, request, **how):
        self.events = []
        self.task = asyncio.create_task(self._take(replicas, request, how))

    async def _take(self, replicas, request, how):
        async with contextlib.aclosing(replicas.run(request, **how)) as events:
            async for event in events:
                self.events.append(event)

    @property
    def firsts(self):
        return [event.first for event in self.events if isinstance(event, Frames)]

    async def whole(self, params):
        """Every frame once, in order, and one end."""
        async with asyncio.timeout(PATIENCE_S):
            await self.task
        assert self.firsts == FIRSTS
        pixels = np.concatenate([event.pixels for event in self.events if isinstance(event, Frames)])
        assert np.array_equal(pixels, moving_frames(params))
        assert [isinstance(event, Completed) for event in self.events].count(True) == 1
        assert isinstance(self.events[-1], Completed)


@pytest.fixture
def play(fakes):
    """Runs scene(replicas) in a loop of its own, over both meshes."""

    def play(scene, ready=True):
        async def main():
            meshes = [Mesh(fake.endpoint, f"ipc://{fake.folder}/frames") for fake in fakes]
            replicas = Replicas(meshes)
            await replicas.start()
            try:
                async with asyncio.timeout(3 * PATIENCE_S):
                    for mesh in meshes if ready else ():
                        await mesh.wait_ready(PATIENCE_S)
                    await scene(replicas)
            finally:
                await replicas.close()

        asyncio.run(main())

    return play


def ids(fake) -> list[str]:
    return [request.id for request in fake.submitted]


async def in_thread(work, *args):
    return await asyncio.to_thread(work, *args)


async def begin(replicas, fakes, params, name, **how):
    """A request, and the fakes as (where it runs, the other)."""
    consumer = Consumer(replicas, replicas.request(name, params), **how)
    await until(lambda: any(name in ids(fake) for fake in fakes))
    here, there = fakes if name in ids(fakes[0]) else fakes[::-1]
    return consumer, here, there


# ---- where a request goes ----------------------------------------------------------------------------------------


def test_without_predictions_the_mesh_with_the_fewest_requests_is_next(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:1"}
        consumers = [(await begin(replicas, fakes, params, f"r{number}"))[0] for number in range(6)]
        assert [len(fake.submitted) for fake in fakes] == [3, 3]
        for fake in fakes:
            fake.release()
        for consumer in consumers:
            await consumer.whole(params)

    play(scene)


def test_the_mesh_with_the_least_predicted_work_is_next_and_what_was_sent_counts(play, fakes, params):
    async def scene(replicas):
        await begin(replicas, fakes, params, "first")
        fakes[0].backlog_s, fakes[1].backlog_s = 100.0, 1.0
        for fake, mesh in zip(fakes, replicas.meshes, strict=True):
            fake.announce()
            await until(lambda mesh=mesh, fake=fake: mesh.state.backlog_s == fake.backlog_s)
        assert replicas.state.backlog_s == 1.0
        for fake in fakes:
            fake.held = {"denoise:1"}
        # As if one of these took 40 seconds, of which no scheduler has said that it knows.
        replicas._pace = 40.0 / replicas._operations(params)
        where = [(await begin(replicas, fakes, params, f"r{number}"))[1] for number in range(4)]
        assert where == [fakes[1], fakes[1], fakes[1], fakes[0]]

    play(scene)


def test_how_long_requests_take_is_learnt_from_their_ranks(play, fakes, params):
    async def scene(replicas):
        await (await begin(replicas, fakes, params, "first"))[0].whole(params)
        assert replicas._pace * replicas._operations(params) == pytest.approx(0.7), "encode 0.2 s, denoise 0.5 s"

    play(scene)


@pytest.mark.parametrize("trouble", ["not ready", "draining", "gave up", "another model"])
def test_a_mesh_that_cannot_take_work_gets_none(play, fakes, params, trouble, logs):
    if trouble == "not ready":
        fakes[0].ready = False
    elif trouble == "draining":
        fakes[0].draining = True
    elif trouble == "gave up":
        fakes[0].gave_up = "rank 0 died three times"
    else:
        configs = fakes[1].model.configs | {"transformer": fakes[1].model.configs["transformer"] | {"num_layers": 99}}
        fakes[1].model = msgspec.structs.replace(fakes[1].model, configs=configs)
    lazy, busy = fakes if trouble != "another model" else fakes[::-1]

    async def scene(replicas):
        for mesh in replicas.meshes:
            await until(lambda mesh=mesh: mesh.state.num_ranks)
        assert replicas.state.ready
        assert f"replica {fakes.index(lazy)}: " in replicas.state.reason
        for number in range(3):
            await (await begin(replicas, fakes, params, f"r{number}"))[0].whole(params)
        assert (ids(lazy), len(ids(busy))) == ([], 3)

    play(scene, ready=False)
    assert (trouble == "another model") == any("another model" in entry["event"] for entry in logs)


def test_a_silent_mesh_gets_nothing_new_and_is_not_ready(play, fakes, params, impatient):
    async def scene(replicas):
        await (await begin(replicas, fakes, params, "first"))[0].whole(params)
        fakes[0].freeze()
        await until(lambda: "has been silent" in replicas.state.reason)
        assert replicas.state.ready
        before = len(fakes[0].submitted)
        for number in range(3):
            await (await begin(replicas, fakes[1:] * 2, params, f"r{number}"))[0].whole(params)
        assert len(fakes[0].submitted) == before
        await in_thread(fakes[0].thaw)
        await until(lambda: replicas.state.reason == "ready")

    play(scene)


def test_while_no_mesh_is_ready_requests_wait_and_go_to_the_first_that_is(play, fakes, params):
    async def scene(replicas):
        request = replicas.request("a", params)
        for fake in fakes:
            fake.ready = False
            fake.announce()
        await until(lambda: not replicas.state.ready)
        consumer, gone = Consumer(replicas, request), Consumer(replicas, replicas.request("gone", params))
        await asyncio.sleep(0.05)
        assert ids(fakes[0]) == ids(fakes[1]) == []
        gone.task.cancel()
        fakes[1].become_ready()
        await consumer.whole(params)
        assert (ids(fakes[0]), ids(fakes[1])) == ([], ["a"])

    play(scene)


# ---- where it goes on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["queued", "denoise:2", "decode:3"])
def test_what_a_silent_mesh_had_goes_on_elsewhere_and_is_dropped_when_it_comes_back(
    play, fakes, params, impatient, mark
):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {mark}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await in_thread(here.wait_for, mark)
        there.release()
        had = FIRSTS[:3] if mark == "decode:3" else []
        await until(lambda: consumer.firsts == had)
        here.freeze()
        await consumer.whole(params)
        assert [request.attempt for request in there.submitted] == [1]
        assert here.cancelled == [], "it has heard nothing yet"
        chunks = len(here.chunks)
        here.release()
        await in_thread(here.thaw)
        await until(lambda: here.cancelled)
        assert set(here.cancelled) == {"a"}
        await until(lambda: not any(mesh.remembers("a") for mesh in replicas.meshes))
        # It may have come as far as its next frames before it read its messages; nobody saw those, and none was stored.
        assert (here.completed, there.completed) == ([], ["a"])
        assert here.stored == []
        assert len(here.chunks) - chunks <= 1
        await until(lambda: here.credits == there.credits == mesh_module.FRAME_CREDITS)

    play(scene)


def test_a_mesh_that_gives_up_loses_its_requests_to_the_other_one(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"decode:2"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await in_thread(here.wait_for, "decode:2")
        here.give_up("rank 0 died three times")
        await in_thread(there.wait_for, "decode:2")
        await until(lambda: here.cancelled == ["a"])
        there.release()
        await consumer.whole(params)
        assert [request.attempt for request in there.submitted] == [1]
        # Started again by an operator, it takes its share.
        here.gave_up = ""
        await in_thread(here.restart)
        await until(lambda: replicas.state.reason == "ready")
        there.drain()
        await until(lambda: "draining" in replicas.state.reason)
        here.release()
        later, _, _ = await begin(replicas, fakes, params, "b")
        await later.whole(params)
        assert ids(here)[-1] == "b"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_module, "SILENCE_S", 0.5)
        play(scene)


def test_the_last_mesh_that_gives_up_fails_what_it_had_with_the_reason(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:1"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        here.give_up("the first reason")
        await in_thread(there.wait_for, "denoise:1")
        there.give_up("the second reason")
        with pytest.raises(RequestFailed, match="the second reason") as caught:
            async with asyncio.timeout(PATIENCE_S):
                await consumer.task
        assert caught.value.code == "mesh_lost"
        with pytest.raises(RequestFailed, match=r"replica 0: .*; replica 1: ") as caught:
            await anext(replicas.run(replicas.request("b", params)))
        assert caught.value.code == "mesh_lost"

    play(scene)


def test_a_draining_mesh_ends_what_it_has_and_gets_nothing_new(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:2"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await in_thread(here.wait_for, "denoise:2")
        here.drain()
        await until(lambda: "draining" in replicas.state.reason)
        assert not replicas.state.draining
        others = [(await begin(replicas, [there, there], params, f"r{number}"))[0] for number in range(3)]
        for fake in fakes:
            fake.release()
        for one in (consumer, *others):
            await one.whole(params)
        assert (ids(here), ids(there)) == (["a"], ["r0", "r1", "r2"])
        there.drain()
        await until(lambda: replicas.state.draining)
        with pytest.raises(NotReady, match="draining"):
            replicas.request("late", params)

    play(scene)


def test_a_submit_that_meets_a_drain_on_its_way_goes_to_the_other_one(play, fakes, params):
    async def scene(replicas):
        fakes[0].draining = True  # and nobody was told
        consumers = [Consumer(replicas, replicas.request(name, params)) for name in "ab"]
        for consumer in consumers:
            await consumer.whole(params)
        assert sorted(fakes[1].completed) == ["a", "b"]
        assert fakes[0].completed == []

    play(scene)


def test_a_scheduler_that_is_back_in_time_is_told_of_its_own_requests_only(play, fakes, params, eager):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:2"}
        consumers = [(await begin(replicas, fakes, params, name))[0] for name in "abcd"]
        mine, others = ids(fakes[0]), ids(fakes[1])
        assert len(mine) == len(others) == 2
        await in_thread(fakes[0].restart)
        await until(lambda: len(fakes[0].submitted) == 4)
        for fake in fakes:
            fake.release()
        for consumer in consumers:
            await consumer.whole(params)
        assert [(request.id, request.attempt) for request in fakes[0].submitted[2:]] == [(name, 1) for name in mine]
        assert ids(fakes[1]) == others
        assert sorted(fakes[0].completed + fakes[1].completed) == list("abcd")

    play(scene)


def test_a_new_scheduler_is_told_that_what_went_elsewhere_is_over(play, fakes, params, impatient):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:2"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await in_thread(here.die)
        await in_thread(there.wait_for, "denoise:2")
        await in_thread(here.come_back)
        await until(lambda: here.stored == ["a"])  # a checkpoint of it can go
        for fake in fakes:
            fake.release()
        await consumer.whole(params)
        assert ids(here) == ["a"]

    play(scene)


def test_a_request_that_is_stored_needs_no_other_mesh(play, fakes, params, impatient):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"deliver"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await until(lambda: consumer.firsts == FIRSTS and here.stored == ["a"])
        here.freeze()
        await consumer.whole(params)
        assert consumer.events[-1].timings == {"encode": 0.2, "denoise": 0.5}
        assert ids(there) == []

    play(scene)


def test_a_request_that_is_stored_outlives_the_last_mesh(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"deliver"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await until(lambda: here.stored == ["a"])
        there.give_up("the first reason")
        await until(lambda: replicas.state.reason != "ready")
        here.give_up("the second reason")
        await consumer.whole(params)

    play(scene)


def test_a_request_does_not_return_to_a_mesh_that_still_has_it(play, fakes, params, impatient):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:2"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await until(lambda: here.at("a") == "denoise:2")
        here.freeze()
        await until(lambda: there.at("a") == "denoise:2")
        here.loses_cancels = True
        here.thaw()
        await until(lambda: here.cancelled and replicas.state.reason == "ready")
        there.freeze()
        await until(lambda: "has been silent" in replicas.state.reason)
        await asyncio.sleep(2 * replicas_module.LOST_S)
        assert len(here.submitted) == 1, "it was submitted before the first life was over"
        # It speaks of the request again, and hears once more that it is to drop it.
        here.loses_cancels = False
        here.release()
        await until(lambda: len(here.submitted) == 2)
        assert [request.attempt for request in here.submitted] == [0, 2]
        await consumer.whole(params)
        there.release()
        there.thaw()
        await until(lambda: there.cancelled)
        assert there.completed == []
        assert here.completed == ["a"]

    play(scene)


def test_leaving_the_loop_cancels_where_it_runs_now(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:1"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        here.give_up("rank 0 died three times")
        await in_thread(there.wait_for, "denoise:1")
        consumer.task.cancel()
        await until(lambda: there.cancelled == ["a"])

    play(scene)


# ---- a gateway that was started anew -----------------------------------------------------------------------------


def test_a_resumed_request_goes_on_where_an_earlier_gateway_had_it(fakes, params):
    """Its owner is asked for, whoever has less to do."""

    @contextlib.asynccontextmanager
    async def gateway(name):
        replicas = Replicas([Mesh(fake.endpoint, f"ipc://{fake.folder}/frames{name}") for fake in fakes])
        await replicas.start()
        try:
            async with asyncio.timeout(3 * PATIENCE_S):
                await replicas.wait_model()
                yield replicas
        finally:
            await replicas.close()

    async def main():
        for fake in fakes:
            fake.held = {"denoise:2"}
        async with gateway("first") as replicas:
            begun = [(name, *await begin(replicas, fakes, params, name)) for name in "abcd"]
            for name, _, owner, _ in begun:
                await until(lambda name=name, owner=owner: owner.at(name) == "denoise:2")
        for _, consumer, _, _ in begun:
            consumer.task.cancel()
        async with gateway("second") as replicas:
            consumers = [
                Consumer(replicas, replicas.request(name, params, resumed=True), resumed=True) for name in "badc"
            ]
            await until(lambda: sum(len(fake.submitted) for fake in fakes) == 8)
            for name, _, owner, _ in begun:
                assert ids(owner).count(name) == 2
            for fake in fakes:
                fake.release()
            for consumer in consumers:
                await consumer.whole(params)

    asyncio.run(main())
    assert sorted(fakes[0].completed + fakes[1].completed) == list("abcd")


# ---- over HTTP ---------------------------------------------------------------------------------------------------


class TwoReplicas(Gateway):
    """A gateway over two meshes of one model."""

    others: list[FakeMesh]

    def _catalog(self) -> Catalog:
        meshes = [self._connect(fake) for fake in (self.fake, *self.others)]
        return Catalog([Model(self.config.model_name, self.fake.card, Replicas(meshes))])


class TwoModels(Gateway):
    """A gateway over two models, whose cards the meshes tell."""

    others: list[FakeMesh]

    def _catalog(self) -> Catalog:
        fakes = {"one": self.fake, "org/two": self.others[0]}
        return Catalog([Model(name, None, Replicas([self._connect(fake)])) for name, fake in fakes.items()])


@pytest.fixture
def serve(fakes, tmp_path):
    started = []

    def serve(kind, **config):
        kind = type(kind.__name__, (kind,), {"others": fakes[1:]})
        started.append(kind(fakes[0], tmp_path, **config))
        return started[-1]

    yield serve
    for gateway in started:
        gateway.close()


def test_a_job_that_moves_is_one_job_with_the_same_video(serve, fakes):
    gateway = serve(TwoReplicas)
    eventually(lambda: gateway.http.get("/health/ready").json()["reason"] == "ready")
    undisturbed = gateway.create(seed=1)
    gateway.wait(undisturbed)
    for fake in fakes:
        fake.held = {"decode:3"}
    video_id = gateway.create(seed=1)
    here, there = fakes if video_id in ids(fakes[0]) else fakes[::-1]
    eventually(lambda: any(video_id in ids(fake) for fake in fakes))
    here, there = fakes if video_id in ids(fakes[0]) else fakes[::-1]
    here.wait_for("decode:3")
    with gateway.follow(video_id) as events:
        here.give_up("rank 0 died three times")
        there.wait_for("decode:3")
        there.release()
        told = list(events)
    assert [data["first"] for _, name, data in told if name == "frames"] == FIRSTS
    assert names(told)[-1] == "done"
    content = [gateway.http.get(f"/v1/videos/{name}/content").content for name in (undisturbed, video_id)]
    assert content[0] == content[1]
    assert gateway.http.get("/health/ready").status_code == 200
    assert "rank 0 died three times" in gateway.http.get("/health/ready").json()["reason"]
    meshes = gateway.http.get("/server_info").json()["meshes"]
    assert sorted((mesh["model"], mesh["ready"]) for mesh in meshes) == [("demo", False), ("demo", True)]


def test_several_models_are_listed_found_by_name_and_independent(serve, fakes, monkeypatch):
    monkeypatch.setattr(runner_module, "MODEL_PATIENCE_S", 0.1)
    fakes[0].ready = False
    gateway = serve(TwoModels)
    eventually(lambda: gateway.http.get("/health/ready").status_code == 200)
    assert gateway.http.get("/health/ready").json()["reason"] == "one: the workers are starting"
    listed = {model["id"]: model for model in gateway.http.get("/v1/models").json()["data"]}
    assert list(listed) == ["one", "org/two"]
    assert ("num_gpus" in listed["one"], listed["org/two"]["num_gpus"]) == (False, 2)
    refused = gateway.http.post("/v1/videos", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
    assert gateway.http.get("/v1/models/one").json()["error"]["code"] == "model_loading"
    assert gateway.http.get("/v1/models/org%2Ftwo").json()["task_type"] == "T2V"
    info = gateway.http.get("/server_info").json()
    assert [(mesh["model"], mesh["ready"], len(mesh["ranks"])) for mesh in info["meshes"]] == [
        ("one", False, 2),
        ("org/two", True, 2),
    ]
    assert ["family" in model for model in info["models"]] == [False, True]
    assert gateway.http.get("/metrics").status_code == 200
    unknown = gateway.http.post("/v1/videos", json=BODY | {"model": "three"}).json()["error"]
    assert (unknown["code"], "'one', 'org/two'" in unknown["message"]) == ("model_not_found", True)
    second = gateway.create(model="org/two")
    assert gateway.wait(second)["model"] == "org/two"
    fakes[0].become_ready()
    eventually(lambda: gateway.http.get("/health/ready").json()["reason"] == "ready")
    assert gateway.wait(gateway.create())["model"] == "one"
    assert gateway.wait(gateway.create(model="one"))["model"] == "one"
    assert (len(fakes[0].completed), fakes[1].completed) == (2, [second])


def test_no_model_that_is_ready_is_not_ready(serve, fakes):
    for fake in fakes:
        fake.ready = False
    gateway = serve(TwoModels)
    eventually(lambda: "org/two: the workers are starting" in gateway.http.get("/health/ready").json()["reason"])
    assert gateway.http.get("/health/ready").status_code == 503
    assert gateway.http.get("/v1/models").json()["error"]["code"] == "model_loading"
    threading.Timer(0.05, fakes[1].become_ready).start()
    eventually(lambda: gateway.http.get("/health/ready").status_code == 200)


# ---- words -------------------------------------------------------------------------------------------------------


def test_places_in_words():
    words = ["a=tcp://h:1,tcp://h:2", "org/b=ipc:///tmp/x=y/scheduler", "a=ipc:///z"]
    assert read_places("mesh", words) == (
        Place("a", ("tcp://h:1", "tcp://h:2", "ipc:///z")),
        Place("org/b", ("ipc:///tmp/x=y/scheduler",)),
    )
    assert read_places("mesh", ["ipc:///tmp/x=y/scheduler"], "demo") == (Place("demo", ("ipc:///tmp/x=y/scheduler",)),)
    for bad in (["ipc:///x"], ["demo"], ["=tcp://h:1"], ["demo=http://h:1"], [], ["a=ipc:///x", "b=ipc:///x"]):
        with pytest.raises(InvalidInput) as caught:
            read_places("mesh", bad)
        assert caught.value.field == "mesh"
    assert [is_remote(url) for url in ("ipc:///x", "tcp://127.0.0.1:1", "tcp://10.0.0.1:1")] == [False, False, True]


def test_every_scheduler_needs_its_own_endpoint_for_frames():
    with pytest.raises(InvalidInput, match="1 times for 2 schedulers"):
        connect(Config(), None, [Place("demo", ("ipc:///x", "ipc:///y"))], ["ipc:///z"])


def test_progress_comes_from_the_mesh_that_has_it(play, fakes, params):
    async def scene(replicas):
        for fake in fakes:
            fake.held = {"denoise:3"}
        consumer, here, there = await begin(replicas, fakes, params, "a")
        await in_thread(here.wait_for, "denoise:3")
        here.give_up("gone")
        await in_thread(there.wait_for, "denoise:3")
        there.release()
        await consumer.whole(params)
        steps = [event.step for event in consumer.events if isinstance(event, Progress) and event.stage == "denoise"]
        assert steps == [0, 1, 2, 3, 0, 1, 2, 3, 4]

    play(scene)
