"""The job store: what is accepted is kept, what has ended stays ended, pages follow each other without gaps."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
from sqlalchemy.exc import IntegrityError

from gateway.jobs.store import Job, JobStore
from runtime.sampling import ResolvedParams

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


@pytest.fixture
def with_store(tmp_path):
    """Run an async function with an open store; the file stays between two calls."""

    def run(test):
        async def main():
            store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite3")
            await store.open()
            try:
                return await test(store)
            finally:
                await store.close()

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


def test_unfinished_jobs_come_in_the_order_of_arrival(with_store):
    async def test(store):
        for number in (3, 1, 2):
            await store.insert(job(number))
        await store.update(job(1).id, status="completed")
        await store.update(job(2).id, status="in_progress")
        return [found.id for found in await store.unfinished()]

    assert with_store(test) == [job(3).id, job(2).id]


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


def test_an_idempotency_key_is_one_job(with_store):
    async def test(store):
        first = await store.insert(job(1, idempotency_key="k"))
        assert await store.insert(job(2, idempotency_key="k")) == first
        assert await store.insert(job(3)) == job(3)
        assert await store.insert(job(4)) == job(4), "no key is no key twice"
        with pytest.raises(IntegrityError):
            await store.insert(job(1))

    with_store(test)


def test_many_tasks_at_once_and_a_reader_from_outside(with_store, tmp_path):
    async def test(store):
        await asyncio.gather(*(store.insert(job(number)) for number in range(50)))
        outside = sqlite3.connect(tmp_path / "jobs.sqlite3")
        try:
            assert outside.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert outside.execute("SELECT count(*), count(DISTINCT seq) FROM jobs").fetchone() == (50, 50)
        finally:
            outside.close()

    with_store(test)
