"""The job store on SQLite and on PostgreSQL: what is accepted is kept, what has ended stays ended, and every unfinished
job has one owner at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import stat
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import structlog
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres import PASSWORD, query
from sqlalchemy import create_engine

from gateway.jobs import database as database_module
from gateway.jobs import store as store_module
from gateway.jobs.database import StoreUnavailable, read_url
from gateway.jobs.store import METADATA, Asked, Job, JobStore, fingerprint
from runtime.config import Config, check_config, save_frozen
from runtime.errors import InvalidInput, StartFailed
from runtime.sampling import ResolvedParams, Terms

PATIENCE_S = 20.0
PARAMS = ResolvedParams(
    prompt="a red square \N{SNOWMAN}",
    negative_prompt="",
    num_inference_steps=4,
    guidance_scale=3.0,
    seed=2**63 - 1,
    height=64,
    width=96,
    num_frames=17,
    fps=8,
)


def job(number: int, **changes) -> Job:
    return Job(**({"id": f"video_{number:04x}", "params": PARAMS, "model": "demo", "created_at": 100.5} | changes))


@contextlib.asynccontextmanager
async def opened(url, **options):
    store = JobStore(url, **options)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


@pytest.fixture
def with_store(database_url):
    """Run an async function with an open store; the database stays between two calls."""

    def run(test):
        async def main():
            async with opened(database_url) as store:
                return await test(store)

        return asyncio.run(main())

    return run


@pytest.fixture
def with_two_stores(postgres):
    """Run an async function with the stores of two gateways on one database; a lease is two seconds."""

    def run(test):
        async def main():
            url = postgres.database()
            async with opened(url, lease_s=2.0) as one, opened(url, lease_s=2.0) as other:
                return await test(one, other)

        return asyncio.run(main())

    return run


def test_a_job_comes_back_as_it_was_put_in_also_by_another_process(with_store):
    full = job(1, timings={"encode": 0.25}, idempotency_key="k", started_at=101.0, error_message="no")
    assert with_store(lambda store: store.insert(full)) == full
    assert with_store(lambda store: store.get(full.id)) == full
    assert with_store(lambda store: store.get("video_ff")) is None


def test_a_finished_job_never_changes_back(with_store):
    async def test(store):
        await store.insert(job(1))
        assert await store.update(job(1).id, status="in_progress", step=2)
        assert await store.update(job(1).id, status="cancelled", error_code="cancelled")
        assert not await store.update(job(1).id, status="completed", timings={"total": 1.0})
        assert not await store.update(job(1).id, step=3)
        assert not await store.update("video_ff", step=3)
        return await store.get(job(1).id)

    assert with_store(test) == job(1, status="cancelled", step=2, error_code="cancelled")


def test_pages_follow_each_other(with_store):
    async def pages(store, order, limit=2):
        found, page, after = [], None, None
        while page is None or page.has_more:
            page = await store.list(after, limit, order)
            found.append([listed.id for listed in page.jobs])
            after = found[-1][-1]
        return found

    async def test(store):
        assert (await store.list()).jobs == []
        for number in range(5):
            await store.insert(job(number))
        ids = [job(number).id for number in range(5)]
        assert await pages(store, "asc") == [ids[:2], ids[2:4], ids[4:]]
        assert await pages(store, "desc") == [ids[:2:-1], ids[2:0:-1], ids[:1]]
        assert await pages(store, "asc", limit=5) == [ids]

    with_store(test)


def test_listing_goes_on_after_a_job_that_was_deleted(with_store):
    async def test(store):
        for number in range(4):
            await store.insert(job(number))
        assert await store.delete(job(1).id)
        assert not await store.delete(job(1).id)
        after = await store.list(job(1).id, 10, "asc")
        before = await store.list(job(1).id, 10, "desc")
        return [found.id for found in after.jobs], [found.id for found in before.jobs]

    assert with_store(test) == ([job(2).id, job(3).id], [job(0).id])


def test_an_account_sees_its_own_jobs(with_store):
    async def test(store):
        for number in range(6):
            await store.insert(job(number, terms=Terms(key="ab"[number % 2])))
        page = await store.list(None, 2, "asc", "a")
        rest = await store.list(page.jobs[-1].id, 2, "asc", "a")
        assert [found.id for found in page.jobs] == [job(0).id, job(2).id]
        assert page.has_more
        assert [found.id for found in rest.jobs] == [job(4).id]
        assert not rest.has_more
        assert (await store.list(account="c")).jobs == []
        assert (await store.get(job(1).id, "b")).id == job(1).id
        assert await store.get(job(1).id, "a") is None

    with_store(test)


def test_an_idempotency_key_is_one_job_of_its_account(with_store):
    async def test(store):
        first = await store.insert(job(1, idempotency_key="k"))
        assert await store.insert(job(2, idempotency_key="k")) == first
        others = job(5, idempotency_key="k", terms=Terms(key="other"))
        assert await store.insert(others) == others
        again = msgspec.structs.replace(others, id=job(6).id)
        assert await store.insert(again) == others
        assert await store.insert(job(3)) == job(3)
        assert await store.insert(job(4)) == job(4), "no key is no key twice"
        assert await store.insert(job(3)) == job(3), "its own second attempt"
        assert len((await store.list()).jobs) == 4

    with_store(test)


def test_two_gateways_that_get_one_key_at_once_make_one_job(with_two_stores):
    async def test(one, other):
        for number in range(0, 40, 2):
            key = str(number)
            pair = (
                one.insert(job(number, idempotency_key=key)),
                other.insert(job(number + 1, idempotency_key=key)),
            )
            first, second = await asyncio.gather(*pair)
            assert first == second
        assert len((await one.list(limit=100)).jobs) == 20

    with_two_stores(test)


def test_a_fingerprint_tells_requests_apart_and_not_their_drawn_seeds():
    def print_of(drawn=False, **changes):
        return fingerprint(job(1, **changes), drawn)

    reseeded = msgspec.structs.replace(PARAMS, seed=5)
    assert print_of() == print_of(
        asked=Asked(request_id="req_2", traceparent="00-1-2-00"), terms=Terms(key="a"), created_at=7.0
    )
    assert print_of() != print_of(params=reseeded)
    assert print_of(True) == print_of(True, params=reseeded)
    assert print_of(True) != print_of(), "a seed that was asked for is a part of the request"
    different = (
        {"params": msgspec.structs.replace(PARAMS, height=96)},
        {"model": "other"},
        {"asked": Asked(user="u")},
        {"terms": Terms(priority=1)},
    )
    assert len({print_of(**changes) for changes in different} | {print_of()}) == 5


def test_many_tasks_at_once(with_store, database_url):
    async def test(store):
        await asyncio.gather(*(store.insert(job(number)) for number in range(50)))
        rows = await asyncio.to_thread(query, database_url, "SELECT count(*), count(DISTINCT seq) FROM jobs")
        assert rows == [(50, 50)]

    with_store(test)


def test_an_sqlite_file_can_be_read_from_outside_meanwhile(tmp_path):
    async def main():
        async with opened(f"sqlite:///{tmp_path}/jobs.sqlite3") as store:
            await store.insert(job(1))
            with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as outside:
                assert outside.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                assert outside.execute("SELECT id FROM jobs").fetchall() == [(job(1).id,)]

    asyncio.run(main())


# ---- owners ------------------------------------------------------------------------------------------------------


def ids(jobs) -> list[str]:
    return [found.id for found in jobs]


async def until_claimed(store):
    claimed = []
    async with asyncio.timeout(PATIENCE_S):
        while not claimed:
            claimed = await store.claim(["demo"])
            await asyncio.sleep(0.05)
    return claimed


def test_what_another_process_left_is_claimed_in_the_order_of_arrival(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite3"

    async def main():
        async with opened(url) as first:
            for number in (3, 1, 2):
                await first.insert(job(number))
            await first.update(job(1).id, status="completed")
            await first.update(job(2).id, status="in_progress")
            assert await first.claim(["demo"]) == [], "they are its own"
        async with opened(url) as second:
            assert not await second.update(job(3).id, step=1), "not its own yet"
            assert ids(await second.claim(["demo"])) == [job(3).id, job(2).id]
            assert await second.update(job(3).id, step=1)
        async with opened(url) as third:
            assert ids(await third.claim([], but=["demo"])) == []
            assert ids(await third.claim([])) == [job(3).id, job(2).id], "to be failed: nobody else can serve them"

    asyncio.run(main())


def test_a_job_is_claimed_when_its_lease_has_run_out_and_then_its_owner_may_not_write(with_two_stores):
    async def test(one, other):
        await one.insert(job(1))
        assert await other.claim(["demo"]) == []
        assert not await other.update(job(1).id, step=1)
        assert await one.renew() == {job(1).id: None}
        assert ids(await until_claimed(other)) == [job(1).id]
        assert not await one.update(job(1).id, status="completed")
        assert await one.renew() == {}
        assert await one.mine(job(1).id) is None
        assert (await other.mine(job(1).id)).id == job(1).id
        assert await other.update(job(1).id, status="completed")
        assert await other.renew() == {}, "what has ended needs no lease"

    with_two_stores(test)


def test_a_renewed_lease_holds_and_a_given_back_job_is_free_at_once(with_two_stores):
    async def test(one, other):
        for number in (1, 2):
            await one.insert(job(number))
        for _ in range(25):
            assert len(await one.renew()) == 2
            assert await other.claim(["demo"]) == []
            await asyncio.sleep(0.1)
        await one.release(job(2).id)
        assert ids(await other.claim(["demo"])) == [job(2).id]
        await one.release()
        assert await other.claim(["another"]) == []
        assert await other.claim(["demo"], but=["demo"]) == []
        assert ids(await other.claim(["demo"])) == [job(1).id]

    with_two_stores(test)


def test_a_gateway_that_is_suspended_in_a_transaction_keeps_nothing_from_the_others(postgres, monkeypatch):
    monkeypatch.setattr(database_module, "IDLE_S", 0.5)
    url, awake, tries = postgres.database(), threading.Event(), []

    def lock_and_sleep(connection):
        connection.exec_driver_sql("SELECT id FROM jobs FOR UPDATE").all()
        tries.append(1)
        awake.wait(PATIENCE_S)

    async def main():
        async with opened(url, lease_s=1.0) as asleep, opened(url, lease_s=1.0) as other:
            await asleep.insert(job(1))
            locking = asyncio.create_task(asleep._database.run(lock_and_sleep))
            try:
                claimed = await until_claimed(other)
            finally:
                awake.set()
            assert ids(claimed) == [job(1).id]
            await locking
            assert not await asleep.update(job(1).id, step=1)

    asyncio.run(main())
    assert len(tries) == 2, "what it was about to do is tried again, and finds what has changed"


def test_a_model_that_no_gateway_serves_is_anybodys_in_the_end(with_two_stores, monkeypatch):
    async def test(one, other):
        await one.insert(job(1))
        await one.release()
        assert await other.claim(["another"]) == []
        monkeypatch.setattr(store_module, "ABANDONED_S", -1.0)
        assert ids(await other.claim(["another"])) == [job(1).id]

    with_two_stores(test)


def test_no_two_gateways_claim_the_same(with_two_stores):
    async def test(one, other):
        for round_ in range(5):
            numbers = range(40 * round_, 40 * round_ + 40)
            await asyncio.gather(*(one.insert(job(number)) for number in numbers))
            await one.release()
            async with opened(one.url) as third:
                claims = await asyncio.gather(*(store.claim(["demo"]) for store in (other, third) * 3))
                claimed = [job_id for claim in claims for job_id in ids(claim)]
                assert sorted(claimed) == [job(number).id for number in numbers]
                await asyncio.gather(*(store.release() for store in (other, third)))
            await asyncio.gather(*(one.delete(job_id) for job_id in claimed))

    with_two_stores(test)


def test_a_cancel_is_left_for_the_owner_and_done_at_once_without_one(with_two_stores):
    async def test(one, other):
        await one.insert(job(1))
        ending = {"status": "cancelled", "error_code": "cancelled"}
        assert not await other.end_unowned(job(1).id, **ending)
        assert await one.cancels() == {}
        await other.request_cancel(job(1).id, "enough")
        assert await one.cancels() == {job(1).id: "enough"}
        assert await one.renew() == {job(1).id: "enough"}
        await one.release()
        assert (await other.get(job(1).id)).cancel_requested == "enough"
        assert await other.end_unowned(job(1).id, **ending)
        assert (await one.get(job(1).id)).status == "cancelled"
        assert not await other.end_unowned(job(1).id, **ending)

    with_two_stores(test)


def test_a_second_gateway_on_one_sqlite_file_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite3"

    async def main():
        async with opened(url):
            with pytest.raises(StartFailed, match=r"another gateway \(process \d+\) uses .*--database-url"):
                async with opened(url):
                    pass
        async with opened(url) as again:
            await again.open()

    asyncio.run(main())


# ---- versions ----------------------------------------------------------------------------------------------------

OLD_TABLE = """
CREATE TABLE jobs (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR(64) NOT NULL, status VARCHAR(16) NOT NULL,
    progress INTEGER NOT NULL, params TEXT NOT NULL, terms TEXT NOT NULL, {more} model TEXT NOT NULL,
    created_at FLOAT NOT NULL, started_at FLOAT, completed_at FLOAT, stage VARCHAR(16) NOT NULL,
    step INTEGER NOT NULL, total_steps INTEGER NOT NULL, frames_done INTEGER NOT NULL, error_code TEXT,
    error_message TEXT, timings TEXT NOT NULL, output_file TEXT, idempotency_key VARCHAR(255),
    UNIQUE (id), UNIQUE (idempotency_key)
)
"""
OLD_COLUMNS = "id, status, progress, params, terms, model, created_at, stage, step, total_steps, frames_done, timings"


def make_old_store(path: Path, more: str = "") -> None:
    """As a gateway left it that knew no versions: numbers up to 3, of which the last is deleted."""
    with contextlib.closing(sqlite3.connect(path)) as old, old:
        old.execute(OLD_TABLE.format(more=more))
        old.execute("CREATE INDEX ix_jobs_status ON jobs (status)")
        params = msgspec.json.encode(PARAMS).decode()
        for number in (1, 2, 3):
            terms = msgspec.json.encode(Terms(key=f"key{number}")).decode()
            row = (job(number).id, "in_progress", 50, params, terms, "demo", 100.5, "denoise", 2, 4, 0, "{}")
            names, values = OLD_COLUMNS, row
            if more:
                names, values = f"{names}, asked, usage", (*row, '{"user": "u"}', "{}")
            marks = ", ".join("?" * len(values))
            old.execute(f"INSERT INTO jobs ({names}, idempotency_key) VALUES ({marks}, ?)", (*values, f"k{number}"))
        old.execute("DELETE FROM jobs WHERE seq = 3")


@pytest.mark.parametrize("more", ["", "asked TEXT NOT NULL, usage TEXT NOT NULL,"])
def test_a_store_of_before_there_were_versions_is_taken_over(tmp_path, more):
    make_old_store(tmp_path / "jobs.sqlite3", more)
    url = f"sqlite:///{tmp_path}/jobs.sqlite3"

    async def main():
        async with opened(url) as store:
            expected = job(
                1, status="in_progress", progress=50, stage="denoise", step=2, total_steps=4, idempotency_key="k1"
            )
            expected = msgspec.structs.replace(
                expected, terms=Terms(key="key1"), asked=Asked(user="u" if more else None)
            )
            assert await store.get(job(1).id, "key1") == expected
            assert ids(await store.claim(["demo"])) == [job(1).id, job(2).id]
            assert (await store.insert(job(7, idempotency_key="k2", terms=Terms(key="key2")))).id == job(2).id
            await store.insert(job(8, idempotency_key="k2"))
        async with opened(url) as store:
            assert ids((await store.list(order="asc")).jobs) == [job(number).id for number in (1, 2, 8)]

    asyncio.run(main())
    assert query(url, "SELECT seq FROM jobs ORDER BY seq")[-1][0] > 3, "a number was used again"
    assert query(url, "SELECT version_num FROM alembic_version") != [("0001",)]


def test_the_newest_version_is_the_table_that_the_code_knows(with_store, database_url):
    async def nothing(store):
        pass

    with_store(nothing)
    engine = create_engine(read_url(database_url))
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    engine.dispose()


def test_a_store_of_a_newer_version_is_refused(with_store, database_url):
    async def nothing(store):
        pass

    with_store(nothing)
    query(database_url, "UPDATE alembic_version SET version_num = '9000'")
    with pytest.raises(StartFailed, match=r"newer framemesh \(version 9000; this one knows up to \d+\)"):
        with_store(nothing)


def test_gateways_that_start_together_upgrade_one_after_the_other(postgres):
    url = postgres.database()

    async def main():
        stores = [JobStore(url) for _ in range(4)]
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.close() for store in stores))

    asyncio.run(main())
    assert len(query(url, "SELECT version_num FROM alembic_version")) == 1


def test_an_upgrade_that_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "jobs.sqlite3"
    make_old_store(path)
    with contextlib.closing(sqlite3.connect(path)) as old, old:
        old.execute("UPDATE jobs SET terms = 'broken' WHERE seq = 2")

    def schema():
        with contextlib.closing(sqlite3.connect(path)) as database:
            return sorted(database.execute("SELECT name, sql FROM sqlite_master").fetchall())

    async def main():
        async with opened(f"sqlite:///{path}"):
            pass

    before = schema()
    with pytest.raises(json.JSONDecodeError):
        asyncio.run(main())
    assert schema() == before


# ---- a database that goes away -----------------------------------------------------------------------------------


def test_a_restart_of_postgresql_is_waited_for(postgres):
    url = postgres.database()

    async def main():
        async with opened(url) as store:
            await store.insert(job(0))
            coming = await asyncio.to_thread(postgres.restart, 2.0)
            await asyncio.gather(*(store.insert(job(number)) for number in range(1, 9)))
            assert await store.update(job(1).id, step=1)
            await asyncio.to_thread(coming.join)
            return ids((await store.list(order="asc")).jobs)

    with structlog.testing.capture_logs() as logs:
        found = asyncio.run(main())
    assert sorted(found) == [job(number).id for number in range(9)]
    assert "the database is not reachable" in [entry["event"] for entry in logs]
    assert PASSWORD not in str(logs)


def test_who_waits_too_long_for_postgresql_is_told(postgres):
    url = postgres.database()

    async def main():
        async with opened(url) as store:
            await asyncio.to_thread(postgres.stop)
            try:
                with pytest.raises(StoreUnavailable, match="not reachable") as told:
                    await store.renew(patience_s=0.2)
            finally:
                await asyncio.to_thread(postgres.start)
            assert await store.renew() == {}
        return told.value

    assert PASSWORD not in str(asyncio.run(main()))


def test_an_error_of_the_statement_is_not_taken_for_a_lost_connection(with_store):
    async def test(store):
        with pytest.raises(Exception, match=r"(?i)no such column|does not exist"):
            await store._database.run(lambda connection: connection.exec_driver_sql("SELECT nowhere FROM jobs"))

    with_store(test)


# ---- which database ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_is_taken_and_its_password_hidden(scheme):
    url = f"{scheme}://me:{PASSWORD}@db.example/jobs"
    check_config(Config(database_url=url))
    store = JobStore(url)
    assert store.shared
    assert str(store.url) == "postgresql+psycopg://me:***@db.example/jobs"
    assert PASSWORD not in repr(Config(database_url=url))
    asyncio.run(store.close())


@pytest.mark.parametrize(
    "url", ["mysql://me:open-sesame@host/jobs", "open-sesame", "postgresql://me:open-sesame@host:x/a"]
)
def test_another_database_is_refused_without_repeating_its_password(url):
    with pytest.raises(StartFailed) as refused:
        JobStore(url)
    assert PASSWORD not in str(refused.value)
    if not url.startswith("postgres"):
        with pytest.raises(InvalidInput, match="database_url: is not of the form postgresql://") as refused:
            check_config(Config(database_url=url))
        assert PASSWORD not in str(refused.value)


def test_without_the_driver_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StartFailed, match=r"pip install 'framemesh\[postgres\]'"):
        JobStore("postgresql://host/jobs")


def test_a_database_that_cannot_be_opened_is_a_start_that_failed(tmp_path):
    (tmp_path / "jobs.sqlite3").write_bytes(b"something else " * 100)

    async def main():
        async with opened(f"sqlite:///{tmp_path}/jobs.sqlite3"):
            pass

    with pytest.raises(StartFailed, match=r"cannot open the job store sqlite:.*file is not a database"):
        asyncio.run(main())


def test_the_frozen_configuration_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "config.json"
    path.touch(mode=0o644)
    save_frozen(Config(database_url=f"postgresql://me:{PASSWORD}@host/jobs"), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
