"""Notifications: a webhook or a command of [notify], called in a thread. None of it can slow or end a run.

A webhook's address is a secret: it comes from an environment variable, and neither logs nor errors show more of it than
its host.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from types import TracebackType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from trainer.errors import UserError
from tuner.spec.beside import Form, NotifySection
from tuner.study.process import run_in_shell
from tuner.study.record import StudyRecord

log = logging.getLogger(__name__)

VARIABLE = "TUNER_NOTIFY"
"""Environment variable with the address of a webhook, for studies that name none."""
TIMEOUT_S = 10.0
"""Of one attempt."""
BACKOFF_S = (1.0, 4.0)
"""Waits between the attempts of one notification."""
CLOSE_S = 15.0
"""How long the end of a run waits for notifications that are being sent."""
MAX_TEXT = 1300
"""Characters. Discord takes 2,000, and ntfy 4,096 bytes: three for each Hangul syllable."""


class NotSent(Exception):
    """An attempt failed; the text shows no secret. `final`: another attempt would fail too."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.final = final


class _NoRedirects(HTTPRedirectHandler):
    """After a redirect urllib would send a GET without the message, and report success."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = build_opener(_NoRedirects)


@dataclass(frozen=True)
class Webhook:
    """An address that takes a POST of JSON."""

    url: str = field(repr=False)
    form: Form

    @property
    def name(self) -> str:
        return f"{urlsplit(self.url).hostname} ({self.form})"

    def send(self, kind: str, text: str) -> None:
        """Send once.

        Raises:
            NotSent
        """
        url, body = _format(self.url, self.form, text)
        headers = {"Content-Type": "application/json", "User-Agent": "prodigy-tuner"}
        try:
            with _opener.open(Request(url, json.dumps(body).encode(), headers), timeout=TIMEOUT_S):
                return
        except HTTPError as error:
            with error:
                raise NotSent(f"HTTP {error.code}", final=error.code < 500 and error.code != 429) from None
        except (OSError, HTTPException) as error:
            # The texts of some of these errors hold the address.
            reason = error.reason if isinstance(error, URLError) else error
            raise NotSent(getattr(reason, "strerror", None) or type(reason).__name__, final=False) from None


@dataclass(frozen=True)
class Command:
    """A command that is run in a shell."""

    command: str
    name = "notify.command"

    def send(self, kind: str, text: str) -> None:
        """Run once.

        Raises:
            NotSent
        """
        # A null byte can't be in a variable.
        env = {"TUNER_EVENT": kind, "TUNER_MESSAGE": text.replace("\0", "")}
        try:
            code = run_in_shell(self.command, env=env, timeout=TIMEOUT_S, grace=1.0)
        except OSError as error:  # no memory for a process
            raise NotSent(error.strerror or type(error).__name__, final=False) from None
        if code != 0:
            raise NotSent(f"exit code {code}" if code is not None else f"took over {TIMEOUT_S:g} s", final=True)


def _format(url: str, form: Form, text: str) -> tuple[str, dict[str, str]]:
    """Address and body of a message."""
    if form == "discord":
        return url, {"content": text}
    if form == "ntfy":
        # JSON goes to the server's root, and names the topic.
        parts = urlsplit(url)
        path, _, topic = parts.path.rstrip("/").rpartition("/")
        return urlunsplit(parts._replace(path=f"{path}/")), {"topic": topic, "message": text}
    return url, {"text": text}


def find_target(section: NotifySection) -> Webhook | Command | None:
    """The receiver of a study's notifications; None if there is none.

    Raises:
        UserError: The environment variable is missing, or holds no address. The message does not show its value.
    """
    if section.command:
        return Command(section.command)
    variable = (section.url or VARIABLE).removeprefix("$")
    url = os.environ.get(variable, "").strip()
    if not url:
        if section.url:
            raise UserError(
                f"notify.url: the environment variable ${variable} is not set: set it to the webhook's address, or "
                "remove notify.url."
            )
        return None
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        host = None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if not host or parts.scheme not in ("http", "https") or "@" in parts.netloc or not is_plain:
        raise UserError(
            f"${variable}: it must hold a webhook's address, such as https://hooks.slack.com/services/..., without a "
            "user name."
        )
    form = section.form or _guess_form(host)
    if form == "ntfy" and not parts.path.strip("/"):
        raise UserError(
            f"${variable}: the address of an ntfy topic ends with its name, such as https://ntfy.sh/my-topic."
        )
    return Webhook(url, form)


def _guess_form(host: str) -> Form:
    if host in ("discord.com", "discordapp.com") or host.endswith((".discord.com", ".discordapp.com")):
        return "discord"
    return "ntfy" if host.startswith("ntfy.") else "slack"


def deliver(target: Webhook | Command, kind: str, text: str) -> None:
    """Send a message, with further attempts where they may help.

    Raises:
        NotSent: The last attempt failed.
    """
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."
    for wait in (*BACKOFF_S, None):
        try:
            target.send(kind, text)
            return
        except NotSent as error:
            if error.final or wait is None:
                raise
            time.sleep(wait)


class Notifier:
    """Sends what happens to a study or a run. A tracker, and a context manager: its exit reports an error.

    Args:
        subject: The study or run, as messages name it.
        running: False: a user's mistake counts as a failure of the run only after its first figures.
        goes_back: A run that its guard stops, or that diverges, goes back to its best state (`on_decline`).
    """

    def __init__(self, section: NotifySection, subject: str, *, running: bool = False, goes_back: bool = False) -> None:
        self.subject, self._goes_back = subject, goes_back
        self._on, self._target = section.on, find_target(section)
        self._is_running = running
        self._queue: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        # A daemon: a server that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._started = False

    def __enter__(self) -> Notifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and (self._is_running or not isinstance(error, UserError)):
            is_caught = self._goes_back and type(error).__name__ == "Diverged"
            more = "; it goes back to its best state, unless it did before" if is_caught else ""
            self.send("failed", f"failed: {_describe(error)}{more}")
        if not self._started:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("a notification was not sent within %g s", CLOSE_S)

    def send(self, kind: str, text: str) -> None:
        """Send a message in the background, if [notify] has this kind of event."""
        if self._target is None or kind not in self._on:
            return
        self._queue.put((kind, f"{self.subject} on {platform.node()}: {text}"))
        if not self._started:
            self._started = True
            self._thread.start()

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self._is_running = True

    def event(self, kind: str, text: str, *, step: int) -> None:
        stopped = "goes back to its best state" if self._goes_back else "stopped by its guard"
        words = {"declined": "declines, ", "stopped_by_guard": f"{stopped}, "}
        self.send(kind, f"step {step:,}: {words.get(kind, '')}{text}")

    def close(self) -> None:
        """Do nothing: the end is sent after it."""

    def _work(self) -> None:
        assert self._target is not None
        while (message := self._queue.get()) is not None:
            try:
                deliver(self._target, *message)
            except NotSent as error:
                log.warning("the notification %s was not sent to %s: %s", message[0], self._target.name, error)


def _describe(error: Exception) -> str:
    """An error as one line; a worker's error is a traceback, whose last line names it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def describe_study(record: StudyRecord) -> str:
    """A study that has ended, as one line."""
    best, baseline = record.best, record.baseline
    if best is None:
        return f"ended ({record.ended}) without a complete trial"
    params = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in best.params.items()
    )
    compared = "" if baseline is None or baseline.value is None else f"; baseline {baseline.value:.4f}"
    return f"ended ({record.ended}); best: trial {best.number}, {params}, {record.metric} {best.value:.4f}{compared}"
