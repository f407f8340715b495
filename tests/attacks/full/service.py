"""The database under many processes and under locks, and the dashboard under strangers."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from hashlib import sha256
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import optuna

from tests.attacks.full.common import Job, Result, fork, join, last_line
from tuner.show.server import COOKIE, make_dashboard
from tuner.study.storage import open_storage

NUM_TRIALS, NUM_REPORTS = 50, 20


def url(job: Job) -> str:
    return f"sqlite:///{job.folder}/s.db"


def create(job: Job) -> None:
    """Create the study, in a fork: SQLite must not be carried across one."""
    join(fork(lambda: optuna.create_study(study_name="toy", storage=open_storage(url(job))), job.folder / "output"))


def work(job: Job, num_trials: int) -> None:
    """Run trials with many reports."""
    study = optuna.load_study(study_name="toy", storage=open_storage(url(job)))
    for _ in range(num_trials):
        trial = study.ask()
        for step in range(NUM_REPORTS):
            trial.report(float(trial.number), step)
        study.tell(trial, float(trial.number))


def start_dashboard(job: Job) -> tuple[int, str]:
    """Serve the database from a fork; returns its process id and the address with the token."""
    place = job.folder / "address"

    def serve() -> None:
        server, address = make_dashboard(open_storage(url(job)), port=0)
        place.with_suffix(".new").write_text(address)
        place.with_suffix(".new").rename(place)
        server.serve_forever()

    pid = fork(serve, job.folder / "dashboard.log")
    while not place.exists():
        time.sleep(0.05)
    return pid, place.read_text()


def request(address: str, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    parts = urlsplit(address)
    connection = HTTPConnection(parts.hostname or "", parts.port or 0, timeout=60)
    try:
        connection.request(method, path, body=b"{}" if method != "GET" else None, headers=headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def with_dashboard(job: Job, attack: Callable[[str], None]) -> None:
    create(job)
    pid, address = start_dashboard(job)
    try:
        attack(address)
    finally:
        os.kill(pid, signal.SIGKILL)
        join(pid)


def crowd_database(job: Job) -> Result:
    """Let many processes write to one file, with the dashboard asking beside them."""
    result, num_trials = Result(), NUM_TRIALS if job.size >= 16 else 3

    def attack(address: str) -> None:
        outputs = [job.folder / f"worker-{number}" for number in range(job.size)]
        workers = {fork(lambda: work(job, num_trials), output): output for output in outputs}
        token = urlsplit(address).query.partition("=")[2]
        cookie = {"Cookie": f"{COOKIE}_{sha256(token.encode()).hexdigest()[:8]}={token}"}
        while workers:
            status = request(address, "GET", "/api/studies", cookie)
            result.count(f"dashboard: {status}")
            for pid in list(workers):
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    output = workers.pop(pid)
                    result.check(code == 0, f"{output.name}: {code}, {last_line(output)}")
            time.sleep(0.1)

    with_dashboard(job, attack)
    trials = optuna.load_study(study_name="toy", storage=url(job)).trials
    result.attempts = job.size * num_trials
    result.check([trial.number for trial in trials] == list(range(result.attempts)), f"{len(trials)} trials")
    whole = [trial for trial in trials if trial.value == trial.number and len(trial.intermediate_values) == NUM_REPORTS]
    result.check(len(whole) == len(trials), f"{len(trials) - len(whole)} trials are not whole")
    return result


def lock_database(job: Job) -> Result:
    """Lock the file for a tenth of the seconds, and for all of them: whoever writes waits."""
    result, is_held = Result(), job.folder / "held"
    create(job)

    def hold(seconds: float) -> None:
        holder = sqlite3.connect(job.folder / "s.db", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        is_held.touch()
        time.sleep(seconds)
        holder.execute("ROLLBACK")

    for seconds in (job.size / 10, job.size):
        holder = fork(lambda seconds=seconds: hold(seconds), job.folder / "holder")
        while not is_held.exists():
            time.sleep(0.01)
        is_held.unlink()
        code = join(fork(lambda: work(job, 1), job.folder / "output"))
        join(holder)
        result.attempts += 1
        result.check(code == 0, f"locked for {seconds} s: {code}, {last_line(job.folder / 'output')}")
    return result


def strangers(job: Job) -> Result:
    """Ask the dashboard without its token, or with another one: every request is refused."""
    result, generator = Result(), random.Random(0)
    paths = [
        "/",
        "/api/studies",
        "/api/studies/1",
        "/dashboard",
        "/static/x.js",
        "/artifacts/1/1",
        "/..%2f..%2fetc/passwd",
    ]
    methods = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]

    def attack(address: str) -> None:
        host = urlsplit(address).netloc
        for _ in range(job.size):
            noise = bytes(generator.randrange(33, 126) for _ in range(generator.choice([1, 20, 400]))).decode()
            headers = generator.choice(
                [
                    {},
                    {"Cookie": f"token={noise}"},
                    {"Authorization": f"Bearer {noise}"},
                    {"Host": noise},
                    {"Origin": "http://evil"},
                    {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": host},
                ]
            )
            path = generator.choice(paths) + generator.choice(["", "?token=", "?token=" + noise.replace("#", ""), "//"])
            try:
                status = request(address, generator.choice(methods), path, headers)
            except (OSError, HTTPException) as error:
                result.failures.append(f"{path[:80]}: {error}")
                continue
            result.attempts += 1
            result.count(f"status {status}")
            result.check(400 <= status < 500, f"{path[:80]} {headers}: {status}")
        result.check(request(address, "GET", f"/?{urlsplit(address).query}") == 303, "the token is refused")

    with_dashboard(job, attack)
    log = Path(job.folder / "dashboard.log").read_text(errors="replace")
    result.check("Traceback" not in log, f"dashboard: {log[-200:]}")
    return result
