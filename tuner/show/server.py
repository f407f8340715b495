"""optuna-dashboard on the storage, behind a token, on the loopback interface by default.

optuna-dashboard has neither authentication nor a read-only mode: whoever reaches its port can delete a study. It serves
uploaded files under the type that the uploader names, on its own origin, where an HTML file could act as the user.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Callable, Iterable
from hashlib import sha256
from ipaddress import ip_address
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage
from optuna_dashboard import wsgi

from trainer.errors import UserError
from tuner.study.storage import artifact_dir

COOKIE = "tuner_token"
READING = ("GET", "HEAD", "OPTIONS")

HEADERS = {
    # Styles: the page writes them inline. Scripts come from its own file alone.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FILE_HEADERS = {"Content-Security-Policy": "sandbox; default-src 'none'", "Content-Disposition": "attachment"}
"""For uploaded files: opened in a tab they are saved and not shown. The page's audio and images play as before."""

WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def guarded(app: WSGIApp, *, token: str, read_only: bool) -> WSGIApp:
    """A WSGI application that requires the token, and in read-only mode refuses all requests that change something.

    The token comes once in the URL (`/?token=...`); a redirect moves it into a cookie and removes it from the URL.
    """
    # Cookies are shared by all servers of a host, whatever their port: each dashboard needs its own name.
    name = f"{COOKIE}_{sha256(token.encode()).hexdigest()[:8]}"

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def refuse(status: str, text: str) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]

        given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0]
        if _same(given, token):
            cookie = f"{name}={token}; Path=/; HttpOnly; SameSite=Strict"
            location = "/" + quote(environ.get("PATH_INFO", "").lstrip("/"), encoding="latin-1")
            start_response("303 See Other", [("Location", location), ("Set-Cookie", cookie)])
            return [b""]
        if not _same(_cookie(environ, name), token):
            return refuse("403 Forbidden", "Open the address that `tuner dashboard` printed: it carries the token.\n")
        if read_only and environ["REQUEST_METHOD"] not in READING:
            return refuse("403 Forbidden", "This dashboard is read-only: start it without --read-only to change.\n")
        return app(environ, start_response)

    return application


def isolated(app: WSGIApp, *, host: str) -> WSGIApp:
    """A WSGI application that answers to this server's names alone, refuses changes from other origins, and forbids
    the browser to run or to embed what users have uploaded.

    Another name than the server's in a request means that a page of that name points it here (DNS rebinding). Addresses
    can't be rebound, so any is accepted.
    """
    names = {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = environ.get("HTTP_HOST", "")
        name = _host_name(given)
        origin = environ.get("HTTP_ORIGIN")
        refusal = ""
        if name not in names and not _is_ip(name):
            refusal = f"This dashboard is not {name!r}: open the address that `tuner dashboard` printed.\n"
        elif origin is not None and environ["REQUEST_METHOD"] not in READING and origin.partition("://")[2] != given:
            refusal = "This request comes from a page of another origin.\n"
        extra = FILE_HEADERS if environ.get("PATH_INFO", "").startswith("/artifacts/") else {}

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            added = {**HEADERS, **extra}
            dropped = {key.lower() for key in (*added, "Access-Control-Allow-Origin")}
            kept = [(key, value) for key, value in headers if key.lower() not in dropped]
            return start_response(status, [*kept, *added.items()], *rest)

        if refusal:
            start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
            return [refusal.encode()]
        # optuna-dashboard 0.21 fails without it.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")
        return app(environ, start)

    return application


def with_bodies(app: WSGIApp) -> WSGIApp:
    """The application with a body in every answer.

    The page of optuna-dashboard 0.21 parses every answer as JSON. At a 204 it reports that it failed to delete a study
    that is deleted, and keeps it on its list.
    """

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started: list[str] = []

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            started.append(status)
            if not status.startswith("204"):
                return start_response(status, headers, *rest)
            kept = [(name, value) for name, value in headers if name.lower() not in ("content-type", "content-length")]
            return start_response("200 OK", [*kept, ("Content-Type", "application/json")], *rest)

        body = app(environ, start)
        return [b"{}"] if started and started[0].startswith("204") else body

    return application


def make_dashboard(
    storage: BaseStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    read_only: bool = False,
    token: str = "",
) -> tuple[WSGIServer, str]:
    """Create a server, ready for `serve_forever()`, and return it with the address to open, token included.

    Raises:
        UserError: The port is in use, or the host is no interface of this machine.
    """
    token = token or secrets.token_urlsafe(16)
    files = artifact_dir(storage)
    if not read_only:
        # Users of the dashboard may upload files.
        files.mkdir(parents=True, exist_ok=True)
    app = with_bodies(wsgi(storage, artifact_store=FileSystemArtifactStore(files)))
    app = isolated(guarded(app, token=token, read_only=read_only), host=host)
    try:
        server = make_server(host, port, app, _ThreadingServer, _QuietHandler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}, --host {host}: {error}; choose another.") from error
    return server, f"http://{host}:{server.server_port}/?token={token}"


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection: a browser opens some that it does not use yet, and a single thread would wait."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the first line of each visit would show the token."""


def _cookie(environ: dict[str, Any], name: str) -> str:
    # Not by `http.cookies`, which reads no cookie if another program's is malformed.
    pairs = (pair.strip().partition("=") for pair in environ.get("HTTP_COOKIE", "").split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def _host_name(host: str) -> str:
    """The name or address in a Host header, without its port; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_ip(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
