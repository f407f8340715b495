"""Notifications, against a real HTTP server: forms, further attempts, limits, and no secret anywhere."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from tuner import Runtime, StudySpec, launch, promote
from tuner.spec.beside import NotifySection
from tuner.study import notify
from tuner.study.notify import Notifier, NotSent, Webhook, deliver, find_target

SECRET = "T0/B0/s3cr3t"


class Receiver(ThreadingHTTPServer):
    """Records the requests, and answers them with `answers`, then with 200. An answer of 0 is none at all."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.answers: list[int] = []
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{SECRET}"

    @property
    def texts(self) -> list[str]:
        return [body["text"] for _, body in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, json.loads(body)))
        code = self.server.answers.pop(0) if self.server.answers else 200
        if code == 0:
            self.server.released.wait()
            return
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(notify, "BACKOFF_S", (0.0, 0.0))
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("TUNER_NOTIFY", server.url)
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("url", "form", "expected"),
    [
        ("https://hooks.slack.com/services/T/B/x", None, ("/services/T/B/x", {"text": "hi"})),
        ("https://chat.example.org/hooks/x", None, ("/hooks/x", {"text": "hi"})),
        ("https://chat.example.org/hooks/x", "mattermost", ("/hooks/x", {"text": "hi"})),
        ("https://discord.com/api/webhooks/1/x", None, ("/api/webhooks/1/x", {"content": "hi"})),
        ("https://ntfy.sh/my-topic?auth=x", None, ("/?auth=x", {"topic": "my-topic", "message": "hi"})),
        ("https://push.example.org/ntfy/my-topic", "ntfy", ("/ntfy/", {"topic": "my-topic", "message": "hi"})),
    ],
)
def test_form_is_that_of_the_receiver(
    url: str, form: Any, expected: tuple[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_NOTIFY", url)
    target = find_target(NotifySection(form=form))
    assert isinstance(target, Webhook)
    here = receiver.url.removesuffix(f"/{SECRET}") + "/" + url.split("/", 3)[3]
    deliver(Webhook(here, target.form), "run_ended", "hi")
    assert receiver.requests == [expected]


@pytest.mark.parametrize(
    ("answers", "attempts", "reason"),
    [
        ([500, 503], 3, None),
        ([429], 2, None),
        ([500, 500, 500], 3, "HTTP 500"),
        ([404], 1, "HTTP 404"),
        ([302], 1, "HTTP 302"),
        ([0, 0, 0], 3, "TimeoutError"),
        ([0], 2, None),
    ],
)
def test_attempts_are_repeated_where_that_may_help(
    answers: list[int], attempts: int, reason: str | None, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.3)
    receiver.answers = answers
    target = find_target(NotifySection())
    assert target is not None
    if reason is None:
        deliver(target, "failed", "hi")
    else:
        with pytest.raises(NotSent) as error:
            deliver(target, "failed", "hi")
        assert str(error.value) == reason
    assert len(receiver.requests) == attempts


def test_server_that_does_not_answer_holds_the_end_up_for_a_limited_time(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "CLOSE_S", 0.1)
    receiver.answers = [0]
    with Notifier(NotifySection(), "it") as notifier:
        notifier.send("run_ended", "ended")
    assert caplog.messages == ["a notification was not sent within 0.1 s"]


def test_launch_and_full_run_report_their_ends(receiver: Receiver, runtime: Runtime, tmp_path: Path) -> None:
    study = launch(build(), storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=2)
    promote(study, runtime=runtime)
    ended, run = receiver.texts
    assert ended.startswith("study toy on ") and "best: trial" in ended and "val/loss" in ended and "baseline" in ended
    assert run.startswith("toy/full-trial-0000") and "ended at step" in run and "val/token_loss" in run


def test_only_chosen_events_are_sent_and_a_guard_may_send_its_own(receiver: Receiver) -> None:
    with Notifier(NotifySection(on=("gpu_idle", "stopped_by_guard")), "it") as notifier:
        notifier.event("gpu_idle", "the GPU is busy for 20% of the time only", step=1200)
        notifier.event("loss_not_falling", "no", step=1300)
        notifier.event("stopped_by_guard", "the loss exploded", step=1400)
        notifier.send("run_ended", "no")
    assert [text.partition(": ")[2] for text in receiver.texts] == [
        "step 1,200: the GPU is busy for 20% of the time only",
        "step 1,400: stopped by its guard, the loss exploded",
    ]


def test_failure_is_sent_but_no_mistake_before_the_first_step(receiver: Receiver) -> None:
    for error in (UserError("no such trial"), KeyboardInterrupt()):
        with pytest.raises(type(error)), Notifier(NotifySection(), "it"):
            raise error
    assert receiver.texts == []
    with pytest.raises(UserError), Notifier(NotifySection(), "it") as notifier:
        notifier.track({"train/loss": 1.0}, step=1, samples=8)
        raise UserError("the disk is full")
    with pytest.raises(ZeroDivisionError), Notifier(NotifySection(), "it"):
        raise ZeroDivisionError("by zero\nsecond line")
    assert [text.partition(": ")[2] for text in receiver.texts] == [
        "failed: the disk is full",
        "failed: ZeroDivisionError: by zero",
    ]


def test_address_is_in_no_log_and_in_no_stored_spec(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHAT_URL", receiver.url)
    receiver.answers = [404] * 9
    spec = StudySpec.load(write(tmp_path, TOML + '[notify]\nurl = "$CHAT_URL"\n'))
    with caplog.at_level(logging.DEBUG):
        study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=Runtime(tmp_path), num_trials=1)
        promote(study, runtime=Runtime(tmp_path))
    assert "the notification study_ended was not sent to 127.0.0.1 (slack): HTTP 404" in caplog.text
    assert len(receiver.requests) == 2
    assert SECRET not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"$CHAT_URL" in path.read_bytes() for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in repr(find_target(spec.notify))


@pytest.mark.parametrize(
    ("toml", "variable", "message"),
    [
        ('url = "https://x.org/T0/B0/s3cr3t"', "", "notify: url must be the name of an environment variable"),
        ('url = "$CHAT_URL"', "", "notify.url: the environment variable $CHAT_URL is not set"),
        ('url = "$CHAT_URL"', f"hooks/{SECRET}", "$CHAT_URL: it must hold a webhook's address"),
        ('url = "$CHAT_URL"', f"https://x.org/{SECRET} x", "$CHAT_URL: it must hold a webhook's address"),
        ('url = "$CHAT_URL"', "https://me:s3cr3t@x.org/", "$CHAT_URL: it must hold a webhook's address"),
        ('url = "$CHAT_URL"', f"https://x..org/{SECRET}", "$CHAT_URL: it must hold a webhook's address"),
        ('url = "$CHAT_URL"', "https://ntfy.sh/", "$CHAT_URL: the address of an ntfy topic ends with its name"),
        ('url = "$CHAT_URL"\ncommand = "x"', "", "notify: give url or command, not both"),
        ('on = ["faild"]', "", 'notify.on.0 "faild": input should be'),
        ('onn = ["failed"]', "", "unknown key notify.onn; did you mean notify.on?"),
    ],
)
def test_mistake_is_one_line_that_shows_no_address(
    toml: str, variable: str, message: str, run_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_URL", variable)
    finished = run_command("launch", str(write(tmp_path, f"{TOML}[notify]\n{toml}\n")), "--no-track")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert message in finished.stderr and SECRET not in finished.stderr
    assert not (tmp_path / "runs").exists()


def test_test_message(run_command: Command, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = run_command("notify")
    assert finished.returncode == 0 and finished.stdout == "sent to 127.0.0.1 (slack)\n"
    assert receiver.texts[0].startswith("a test message")
    receiver.answers = [403]
    finished = run_command("notify")
    assert finished.returncode == 2 and "did not take the message (HTTP 403)" in finished.stderr
    monkeypatch.delenv("TUNER_NOTIFY")
    finished = run_command("notify")
    assert finished.returncode == 2 and "set $TUNER_NOTIFY" in finished.stderr


def test_command_gets_event_and_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = f'printf "%s|%s" "$TUNER_EVENT" "$TUNER_MESSAGE" > {tmp_path}/got; exit 3'
    with Notifier(NotifySection(command=command), "it") as notifier:
        notifier.send("run_ended", "at 'the' end")
    event, _, message = (tmp_path / "got").read_text().partition("|")
    assert event == "run_ended" and message.endswith(": at 'the' end")
    assert caplog.messages == ["the notification run_ended was not sent to notify.command: exit code 3"]


def test_command_that_cannot_start_or_a_null_byte_ends_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "BACKOFF_S", ())
    real = notify.run_in_shell
    calls: list[dict[str, str]] = []

    def run(command: str, *, env: dict[str, str], **rest: Any) -> int | None:
        calls.append(env)
        if len(calls) == 1:
            raise OSError(12, "Cannot allocate memory")
        return real(command, env=env, **rest)

    monkeypatch.setattr(notify, "run_in_shell", run)
    with Notifier(NotifySection(command=f'printf "%s" "$TUNER_MESSAGE" > {tmp_path}/got'), "it") as notifier:
        notifier.send("failed", "no memory")
        notifier.send("failed", "null \0 byte")
    assert (tmp_path / "got").read_text().endswith(": null  byte")
    assert caplog.messages == ["the notification failed was not sent to notify.command: Cannot allocate memory"]


def test_run_that_goes_back_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import Diverged

    sent = []
    monkeypatch.setattr(Notifier, "send", lambda _, kind, text: sent.append((kind, text)))
    with pytest.raises(Diverged), Notifier(NotifySection(), "it", running=True, goes_back=True) as notifier:
        notifier.event("stopped_by_guard", "val/loss rose", step=3)
        raise Diverged("val/loss was nan")
    assert sent == [
        ("stopped_by_guard", "step 3: goes back to its best state, val/loss rose"),
        ("failed", "failed: Diverged: val/loss was nan; it goes back to its best state, unless it did before"),
    ]
