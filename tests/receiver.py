"""An HTTP server of one's own for tests: it notes what it is sent and answers as it is told."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] | None = None
    body: bytes | Iterable[bytes] = b""
    """Parts are sent as they come; the connection's end is the body's."""


class Receiver:
    """Listens on a free port of 127.0.0.1, or on one that was used before."""

    def __init__(
        self,
        answer: Callable[[Received], Answer] = lambda _received: Answer(),
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.received: list[Received] = []
        self.answer = answer
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            """Connections stay open for a client that wants that."""

            def do_GET(self) -> None:
                length = int(self.headers.get("content-length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                received = Received(self.path, headers, self.rfile.read(length))
                receiver.received.append(received)
                with contextlib.suppress(OSError):
                    self._send(receiver.answer(received))

            do_POST = do_GET

            def _send(self, answer: Answer) -> None:
                whole = isinstance(answer.body, bytes)
                length = {"content-length": str(len(answer.body))} if whole else {"connection": "close"}
                self.send_response(answer.status)
                for name, value in (length | (answer.headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [answer.body] if whole else answer.body:
                    self.wfile.write(part)
                    self.wfile.flush()

            def log_message(self, *_words: object) -> None:
                pass

        return Handler
