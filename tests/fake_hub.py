"""A Hugging Face hub on localhost: the paths that huggingface_hub 2 asks for, over repositories held in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """One model repository: its files by revision."""

    revisions: dict[str, Files]
    gated: bool = False
    token: str | None = None
    """The only token that may read; None: anyone may."""

    def commit(self, revision: str) -> str:
        listing = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.revisions[revision].items())
        return hashlib.sha1(repr(listing).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The revision's name, given its name or its commit."""
        return next((name for name in self.revisions if revision in (name, self.commit(name))), None)


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class FakeHub:
    """The server; a context manager. Requests are answered from threads and noted in order."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cut_once: dict[str, int] = field(default_factory=dict)
    """Files whose next download stops after so many bytes."""
    fail_once: set[str] = field(default_factory=set)
    """Files whose next download is answered with 500."""
    status: int | None = None
    """Answer everything with this status."""

    def __enter__(self) -> Self:
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloads(self, name: str) -> list[Request]:
        """The requests for the content of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}") and "/resolve/" in r.path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = self.headers
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, headers["Authorization"], headers["Range"]))
        if self.hub.status is not None:
            return self._refuse(self.hub.status, "")
        repo_id, action, rest = _parse(path)
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if repo.token is not None and headers["Authorization"] != f"Bearer {repo.token}":
            # As the hub does: the card of a gated model is public, its files are not.
            if not repo.gated:
                return self._refuse(401, "RepoNotFound")
            if action == "resolve":
                return self._refuse(403, "GatedRepo")
        revision, _, name = rest.partition("/")
        known = repo.find(revision)
        if known is None:
            return self._refuse(404, "RevisionNotFound")
        return self._serve(repo, known, action, name)

    def _serve(self, repo: Repo, revision: str, action: str, name: str) -> None:
        files, commit = repo.revisions[revision], repo.commit(revision)
        if action == "revision":
            self._send_json({"id": "any/name", "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        elif action == "tree":
            self._send_json([_tree_entry(path, data) for path, data in files.items()])
        elif name in files:
            self._send_file(name, files[name], commit)
        else:
            self._refuse(404, "EntryNotFound")

    def _send_file(self, name: str, data: bytes, commit: str) -> None:
        if self.command == "GET" and name in self.hub.fail_once:
            self.hub.fail_once.discard(name)
            return self._refuse(500, "")
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start : self.hub.cut_once.pop(name, len(data))])

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _parse(path: str) -> tuple[str, str, str]:
    """(repository, action, "revision/file") of a path of the hub."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    repo_id, action, rest = "/".join(parts[:2]), *(parts[2:3] or ["revision"]), parts[3:] or ["main"]
    return repo_id, action, "/".join(rest)


def _tree_entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
