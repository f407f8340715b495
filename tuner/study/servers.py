"""Storages on a server: a database, or Optuna's gRPC proxy before one. A server that is away a while ends nothing."""

from __future__ import annotations

import functools
import logging
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.trial import TrialState

from trainer.clock import clock
from trainer.errors import UserError, first_line
from tuner.study.optuna_internals import STORAGE_METHODS, make_proxy_server
from tuner.study.sqlite import BUSY_TIMEOUT_S, StorageFailure

OUTAGE_S = BUSY_TIMEOUT_S
"""Seconds that a call waits for its server."""
WARN_EVERY_S, PAUSE_S, CONNECT_S = 20.0, 1.0, 10
LIBPQ = {
    "connect_timeout": CONNECT_S,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""Options of the connections to PostgreSQL, in seconds, the last one in ms: by default one to a machine that is gone is
waited for for two hours, without a warning."""
MAX_CALLS, GRACE_S = 32, 5
"""Calls that a proxy answers at once, and the seconds they have to end when it stops."""
GONE = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)

S = TypeVar("S", bound=type[BaseStorage])

log = logging.getLogger(__name__)


def hide_password(url: str) -> str:
    """A database URL as it may be shown."""
    # Up to the last @: a password that is not percent-encoded may have one.
    return re.sub(r"([?&][^=&]*password=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*:).*@", r"\1***@", url))


def patient(cls: S) -> S:
    """Every call of a storage of this class waits for the server, with a warning now and then, up to `OUTAGE_S`."""
    for name in STORAGE_METHODS:
        if (method := getattr(cls, name, None)) is not None:
            setattr(cls, name, wait_for_server(method))
    return cls


def wait_for_server(method: Callable[..., Any]) -> Callable[..., Any]:
    """`patient` for one method."""

    @functools.wraps(method)
    def call(storage: Any, *args: Any, **kwargs: Any) -> Any:
        since, warned_at, is_repeated = time.monotonic(), -WARN_EVERY_S, False
        while True:
            try:
                return method(storage, *args, **kwargs)
            except UpdateFinishedTrialError:
                if is_repeated and method.__name__ == "set_trial_state_values" and _has_state(storage, *args, **kwargs):
                    # The call came through, and its answer was lost.
                    return True
                raise
            except Exception as error:
                if isinstance(error, StorageFailure) or (reason := storage.find_outage(error)) is None:
                    raise
                waited = time.monotonic() - since
                if waited > OUTAGE_S:
                    raise StorageFailure(
                        f"storage {storage.shown}: away for {clock(waited)} ({reason}): start it, then run this again."
                    ) from error
                if waited - warned_at >= WARN_EVERY_S:
                    warned_at = waited
                    log.warning("waiting for the storage %s (%s)", storage.shown, reason)
            is_repeated = True
            time.sleep(PAUSE_S)

    return call


def _has_state(storage: BaseStorage, trial_id: int, state: TrialState, values: object = None) -> bool:
    return storage.get_trial(trial_id).state == state


@patient
class ServerStorage(RDBStorage):
    """A database on a server."""

    @property
    def shown(self) -> str:
        """Its URL without the password."""
        return hide_password(self.engine.url.render_as_string(hide_password=False))

    @wait_for_server
    def read_value(self, statement: str) -> Any:
        """The one value that an SQL statement yields."""
        with self.engine.connect() as connection:
            return connection.exec_driver_sql(statement).scalar_one()

    def find_outage(self, error: Exception) -> str | None:
        """Why the server can't be reached, if that is the error."""
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        return first_line(cause.orig or cause) if isinstance(cause, GONE) else None


@patient
class ProxyStorage(GrpcStorageProxy):
    """A storage behind `tuner storage serve`."""

    @property
    def shown(self) -> str:
        return f"grpc://{self._host}:{self._port}"

    def find_outage(self, error: Exception) -> str | None:
        import grpc

        if not isinstance(error, grpc.Call):
            return None
        if error.code() == grpc.StatusCode.UNKNOWN:
            # An error of the proxy's, such as that its own database has been away for too long.
            raise StorageFailure(f"storage {self.shown}: {first_line(error.details())}; see the output of the proxy.")
        return "no answer" if error.code() == grpc.StatusCode.UNAVAILABLE else None


def open_server(url: sqlalchemy.URL) -> RDBStorage:
    """The storage at a database URL; its schema is created if it has none. Raises what SQLAlchemy and Optuna raise."""
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername == "postgresql" and find_spec("psycopg"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        arguments["connect_args"] = LIBPQ
    return ServerStorage(url.render_as_string(hide_password=False), engine_kwargs=arguments)


def open_proxy(url: sqlalchemy.URL) -> GrpcStorageProxy:
    """The storage of the proxy at grpc://HOST:PORT.

    Raises:
        ConnectionError: It does not answer.
        ImportError: grpcio is not installed.
    """
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        storage = ProxyStorage(host=url.host or "localhost", port=url.port or 13000)
    try:
        storage.wait_server_ready(CONNECT_S)
    except ConnectionError:
        raise ConnectionError(f"no answer in {CONNECT_S:g} s") from None
    return storage


def _check_port(host: str, port: int) -> None:
    """Raises OSError if a server has the port: gRPC would share it, and connections would go to one or the other."""
    if ":" not in host:
        socket.create_server((host, port)).close()


@contextmanager
def serve(storage: BaseStorage, host: str, port: int) -> Iterator[Any]:
    """Serve a storage through Optuna's gRPC proxy; yields the server, which has a thread for each of many workers.

    Raises:
        UserError: grpcio is not installed, or the port is in use.
    """
    # Optuna's cache in front of a database, as a study has it.
    cached = optuna.storages.get_storage(storage)
    try:
        _check_port(host, port)
        server = make_proxy_server(cached, host, port, ThreadPoolExecutor(MAX_CALLS))
    except ImportError as error:
        raise UserError(f"tuner storage serve: {error}; pip install 'prodigy-tuner[proxy]'.") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"--port {port}, --host {host}: {first_line(error)}; choose another.") from error
    server.start()
    try:
        yield server
    finally:
        server.stop(GRACE_S).wait()
