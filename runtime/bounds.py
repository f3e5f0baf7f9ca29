"""The ranges of everything that travels: what is outside makes a message malformed before anybody computes with it.

The numbers are far beyond what a mesh does and far below what breaks one. They are checked where bytes become Structs
and nowhere else: a Struct that is made in Python is not checked.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_PROMPT_CHARS = 1_000_000
MAX_ID_CHARS = 1024
MAX_RANKS = 65_536
MAX_REQUESTS = 100_000
"""In one message; all that a gateway may have to submit again to a new scheduler."""

Int63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""Counters without a natural end: epochs, sequence numbers, bytes, seeds."""
ItemSeq = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
"""Of a work item; -1 for none."""
Rank = Annotated[int, Meta(ge=0, le=MAX_RANKS - 1)]
RankCount = Annotated[int, Meta(ge=0, le=MAX_RANKS)]
Degree = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Times = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""How often something happened: attempts, generations, losses."""
Pid = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""0: not known."""
RealPid = Annotated[int, Meta(ge=2, le=2**31 - 1)]
"""One that may be killed: 0 and negative numbers are groups, 1 is everybody's parent."""
Credits = Annotated[int, Meta(ge=0, le=1_000_000)]
Steps = Annotated[int, Meta(ge=0, le=10_000)]
SomeSteps = Annotated[int, Meta(ge=1, le=10_000)]
Frames = Annotated[int, Meta(ge=0, le=1_000_000)]
"""Frames or chunks of frames."""
SomeFrames = Annotated[int, Meta(ge=1, le=1_000_000)]
Pixels = Annotated[int, Meta(ge=1, le=65_536)]
Priority = Annotated[int, Meta(ge=-1000, le=1000)]
Guidance = Annotated[float, Meta(ge=-1000, le=1000)]
Seconds = Annotated[float, Meta(ge=0, le=1e18)]
"""Neither NaN nor infinite: both fail a comparison."""
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]

Id = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
"""Of a request; also names of hosts, keys and kinds."""
Word = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
Place = Annotated[str, Meta(max_length=4096)]
"""A path or an endpoint."""
Prompt = Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
