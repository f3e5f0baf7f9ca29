"""HTTP/1.1 as uvicorn reads it, except that what cannot be read is answered in the shape of every other error."""

from __future__ import annotations

import secrets

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.replies import CODES, error_body

MESSAGE = "this is no HTTP/1.1 request that can be read: a line or a header is malformed, or they exceed 64 KiB"


class Http(H11Protocol):
    """One connection. One parser for everybody, however uvicorn is installed: limits and refusals are the same."""

    def send_400_response(self, msg: str) -> None:
        """Answer what never becomes a request, and close the connection."""
        body = msgspec.json.encode(error_body(MESSAGE, "invalid_request_error", None, CODES[400]))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: req_{secrets.token_hex(12)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
