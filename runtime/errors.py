"""The exception tree: what went wrong, whose fault it is, and how each edge says so.

FramemeshError
├── InvalidInput (also a ValueError)   the caller's fault: exit code 2, HTTP 400, names the field
├── NotReady                           the mesh cannot take work now: HTTP 503
├── RequestFailed                      an accepted request ended without output; carries code and reason
├── StartFailed                        a process of the mesh did not come up, or died: exit code 1
├── NotCheckpointable                  a state that nobody knows how to save (internal to the workers)
├── CheckpointUnusable                 a saved state that does not fit: the request starts again from step 0
└── PeerGone                           a message had no one to go to (internal to the wire)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.protocol import Usage


UNSUPPORTED_PARAMETER = "unsupported_parameter"
"""The code of a parameter that this model has no use for, whatever its value; a lenient server ignores it."""


class FramemeshError(Exception):
    """Root of everything this project raises on purpose."""


class InvalidInput(FramemeshError, ValueError):
    """A value that the caller has to change.

    Args:
        field: the parameter, flag or config key at fault, in the caller's spelling.
        message: what is wrong and what would be right, one sentence.
        code: a stable machine-readable word, OpenAI's where it has one.
    """

    def __init__(self, field: str, message: str, *, code: str = "invalid_value") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.code = code


class NotReady(FramemeshError):
    """The mesh is starting, restarting or draining."""

    def __init__(self, reason: str, *, draining: bool = False) -> None:
        super().__init__(reason)
        self.draining = draining


class RequestFailed(FramemeshError):
    """An accepted request that ended as failed or cancelled; `usage` is what it took, if a scheduler said so."""

    def __init__(self, request_id: str, code: str, reason: str, usage: Usage | None = None) -> None:
        super().__init__(f"request {request_id} {code}: {reason}")
        self.request_id = request_id
        self.code = code
        self.reason = reason
        self.usage = usage


class StartFailed(FramemeshError):
    """A child process died or did not become ready in time."""


class NotCheckpointable(FramemeshError):
    """A request's state cannot be saved: its solver is not among those whose state is known."""


class CheckpointUnusable(FramemeshError):
    """A saved state is damaged, or of another request, model, solver or version; it is never resumed roughly."""


class PeerGone(FramemeshError):
    """The addressed peer is not connected (any more), or its queue is full."""
