"""Whose a job is: what one caller sees of the jobs of all. Knows neither keys nor how jobs are kept."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import Request

from gateway.auth import Caller, caller
from gateway.jobs.store import Job, Order, Page
from gateway.services import Services
from runtime.errors import InvalidInput


async def find_own(request: Request, here: Services, video_id: str) -> Job:
    """A job of the caller's.

    Raises:
        InvalidInput: there is none; whether somebody else has one of this id is not told.
    """
    job = await here.runner.find(video_id)
    if job is None or not caller(request).may_see(job.terms.key):
        raise InvalidInput("video_id", f"there is no video {video_id!r}", code="video_not_found")
    return job


async def list_own(request: Request, here: Services, after: str | None, limit: int, order: Order) -> Page:
    """A page of the caller's jobs: full as long as there are more of them, whoever else has some in between."""
    asking = caller(request)
    own: list[Job] = []
    while True:
        page = await here.runner.list(after, limit, order)
        own += _visible(asking, page.jobs)
        if len(own) > limit or not page.has_more:
            return Page(own[:limit], len(own) > limit)
        after = page.jobs[-1].id


def _visible(asking: Caller, jobs: Iterable[Job]) -> list[Job]:
    return [job for job in jobs if asking.may_see(job.terms.key)]
