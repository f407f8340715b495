"""How the storage and the study scale: many workers at once, and many trials.

    pip install -e '.[dev]'
    python -m scripts.bench.scale [--parts workers trials] [--sizes 1000 10000] [--json scripts/records/scale.json]

Workers: N processes of this machine run the tuner's own loop over trials (claim, ask, report, prune, tell) on one
study. Only the training is simulated: it sleeps one second before each report, and validates at once. The cost of a
report is all of the time between two of these sleeps; the gap is that between two trials of a worker. All processes and
the database share this machine's cores.

Trials: a study of that many complete trials of 20 reports each, written beforehand; then the time of the first ask of a
new process that has read the trials, of the next one, of `tuner status`, of the dashboard's page of the study, and of
the update of its note and plots.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial
from optuna_dashboard import wsgi

from scripts.bench.common import ROOT, Record, build_parser, run_benchmark, summarize
from tests.tuner.study.databases import Postgres, proxy
from trainer.errors import UserError
from trainer.evaluation import Evaluation
from trainer.loop import TrainResult
from tuner.show.page import StudyPage
from tuner.spec.setups import search_space
from tuner.spec.study_toml import StudySpec
from tuner.study import objective
from tuner.study.launch import join_study, open_study, run_trials
from tuner.study.optuna_internals import id_of
from tuner.study.samplers import SpecSampler
from tuner.study.storage import open_storage
from tuner.study.tracked_run import Runtime

WORKERS = {"sqlite": (1, 2, 4, 8), "postgresql": (1, 4, 16, 64), "proxy": (1, 4, 16, 64)}
TRIALS_A_WORKER = 4
PERIOD_S = 1.0
"""Of the reports."""
SAMPLES = 160
"""Of training before each report."""
GOALS = {"report_s": 0.01, "first_ask_s": 1.0, "ask_s": 1.0, "page_s": 1.0}


def build_spec(reports: int, num_trials: int) -> StudySpec:
    values = {
        "study": {"name": "toy", "workload": "tests.toy:Toy"},
        "train": {"batch_size": 8, "d_coef": 1.0},
        "search": {
            "train.batch_size": {"choices": [4, 8, 16]},
            "train.d_coef": {"low": 0.1, "high": 10.0, "log": True},
        },
        "trial": {"samples": SAMPLES * reports, "evaluations": reports, "num_trials": num_trials},
        "full": {"samples": 60 * SAMPLES * reports},
    }
    return StudySpec.build(values, base_dir=ROOT)


class SimulatedTraining:
    """Takes the place of `tracked_train`, and measures what happens between its sleeps."""

    def __init__(self, reports: int) -> None:
        self.reports = reports
        self.report_s: list[float] = []
        self.gap_s: list[float] = []
        self._ended: float | None = None

    def __call__(
        self, setup: Any, run_dir: Path, *_: object, on_eval: Callable[[Evaluation], None], **__: object
    ) -> TrainResult:
        if self._ended is not None:
            self.gap_s.append(time.monotonic() - self._ended)
        try:
            for number in range(1, self.reports + 1):
                time.sleep(PERIOD_S)
                started = time.monotonic()
                loss = compute_loss(setup.config.d_coef, number)
                samples, metrics = SAMPLES * number, {"val/loss": loss}
                on_eval(Evaluation(samples, number, samples, PERIOD_S * number, number, metrics, 1.0))
                self.report_s.append(time.monotonic() - started)
        finally:
            self._ended = time.monotonic()
        steps = self.reports
        return TrainResult(True, steps, samples, PERIOD_S * steps, steps, metrics, {}, run_dir)


def compute_loss(d_coef: float, number: int) -> float:
    return 1 + 2 / number + abs(math.log10(d_coef / 0.3))


def work(url: str, folder: str, reports: int, total: int, start_at: float, results: Any) -> None:
    """One worker, in a process of its own."""
    training = SimulatedTraining(reports)
    module: Any = objective
    module.tracked_train, module._decide_micro_batches = training, lambda trial, setup, *_: setup
    study, spec = join_study("toy", url)
    time.sleep(max(0.0, start_at - time.time() + np.random.default_rng().uniform(0, PERIOD_S)))
    run_trials(study, spec, Runtime(Path(folder), track=False), total, None)
    results.put((training.report_s, training.gap_s))


def measure_workers(url: str, num_workers: int, reports: int) -> Record:
    """Reports and gaps of workers that run at once."""
    total = TRIALS_A_WORKER * num_workers
    open_study(build_spec(reports, total), url)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        start_at = time.time() + 2 + num_workers / 8
        arguments = (url, folder, reports, total, start_at, results)
        processes = [context.Process(target=work, args=arguments) for _ in range(num_workers)]
        for process in processes:
            process.start()
        found = [results.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    reports_s = [second for report_s, _ in found for second in report_s]
    gaps = [second for _, gap_s in found for second in gap_s]
    return {"workers": num_workers, "report_s": summarize_tail(reports_s), "gap_s": summarize_tail(gaps)}


def summarize_tail(values: list[float]) -> dict[str, float]:
    return {**summarize(values), "mean": float(np.mean(values)), "p95": float(np.quantile(values, 0.95))}


def fill_study(spec: StudySpec, url: str, num_trials: int, reports: int) -> optuna.Study:
    """A study of complete trials, which no worker ran."""
    study, generator = open_study(spec, url), np.random.default_rng(0)
    for number in range(num_trials):
        params = {"train.batch_size": int(generator.choice([4, 8, 16])), "train.d_coef": 10 ** generator.uniform(-1, 1)}
        noise = generator.normal(0, 0.05)
        curve = {SAMPLES * n: compute_loss(params["train.d_coef"], n) + noise for n in range(1, reports + 1)}
        attrs = {"baseline": number == 0, "full_hours": 2.0, "d": [1e-3] * reports, "d_rising": False}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params=params,
                distributions=search_space(spec),
                value=curve[SAMPLES * reports],
                intermediate_values=curve,
                user_attrs=attrs,
            )
        )
    return study


def ask(url: str) -> list[float]:
    """Seconds of the first two asks of this process, without its imports."""
    seconds = []
    study, spec = join_study("toy", url)
    study.sampler = SpecSampler(spec)
    for _ in range(2):
        started = time.perf_counter()
        trial = study.ask()
        for name, distribution in search_space(spec).items():
            trial._suggest(name, distribution)
        seconds.append(time.perf_counter() - started)
        study.tell(trial, state=TrialState.FAIL)
    return seconds


def in_new_process(function: Callable[[str], list[float]], url: str) -> list[float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (url,))


def time_status(url: str, *options: str) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "tuner", "status", "toy", "--storage", url, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def time_dashboard(url: str) -> float:
    """Seconds of the first request for the study's data, as the page makes it."""
    storage = open_storage(url)
    study = optuna.load_study(study_name="toy", storage=storage)
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ |= {"PATH_INFO": f"/api/studies/{id_of(study)}", "QUERY_STRING": "after=0", "HTTP_ACCEPT_ENCODING": ""}
    started = time.perf_counter()
    answer = b"".join(wsgi(storage)(environ, lambda *_: None))
    taken = time.perf_counter() - started
    assert len(json.loads(answer)["trials"]) == len(study.get_trials(deepcopy=False))
    return taken


def measure_trials(url: str, num_trials: int) -> Record:
    study = fill_study(build_spec(20, num_trials), url, num_trials, 20)
    first, second = in_new_process(ask, url)
    with tempfile.TemporaryDirectory() as folder:
        page, page_s = StudyPage(study, Path(folder)), []
        for _ in range(2):
            started = time.perf_counter()
            page.update(now=True)
            page_s.append(time.perf_counter() - started)
    return {
        "trials": num_trials,
        "first_ask_s": first,
        "ask_s": second,
        "first_page_s": page_s[0],
        "page_s": page_s[1],
        "status_s": time_status(url),
        "status_json_s": time_status(url, "--json"),
        "dashboard_s": time_dashboard(url),
    }


@contextmanager
def open_urls(kinds: Mapping[str, object]) -> Iterator[Callable[[str], str]]:
    """Yields a function from a storage's kind to the URL of a new one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = None
        if kinds.keys() - {"sqlite"}:
            server = Postgres(folder / "postgres")
            server.start()
            server.allow_connections(500)
            stack.callback(server.stop)

        def new_url(kind: str) -> str:
            if kind == "sqlite":
                return f"sqlite:///{folder}/{time.monotonic_ns()}.db"
            assert server is not None
            return server.create_database() if kind == "postgresql" else stack.enter_context(in_process_proxy(server))

        yield new_url


@contextmanager
def in_process_proxy(server: Postgres) -> Iterator[str]:
    """Optuna's proxy in a process of its own: gRPC and fork do not go together."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Queue(), context.Event()
    process = context.Process(target=serve_proxy, args=(server.create_database(), ready, over))
    process.start()
    yield ready.get(timeout=60)
    over.set()
    process.join()


def serve_proxy(url: str, ready: Any, over: Any) -> None:
    with proxy(url) as address:
        ready.put(address)
        over.wait()


def measure(arguments: argparse.Namespace) -> Record:
    """The parts and storages asked for; the others are those of the record that is there."""
    path, parts = arguments.json, {"workers": measure_all_workers, "trials": measure_all_trials}
    found = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    if found.get("reports", arguments.reports) != arguments.reports:
        raise UserError(f"--reports {arguments.reports}: {path} has figures of {found['reports']}: name another file.")
    with open_urls(dict.fromkeys(arguments.storages)) as new_url:
        measured = {part: parts[part](arguments, new_url) for part in arguments.parts}
    shared = {"goals": GOALS, "reports": arguments.reports, "period_s": PERIOD_S}
    return shared | {part: found.get(part, {}) | measured.get(part, {}) for part in parts}


def measure_all_workers(arguments: argparse.Namespace, new_url: Callable[[str], str]) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {kind: [] for kind in arguments.storages}
    for kind, found in rows.items():
        for num_workers in WORKERS[kind]:
            found.append(row := measure_workers(new_url(kind), num_workers, arguments.reports))
            report, gap = row["report_s"], row["gap_s"]
            print(
                f"{kind}, {num_workers} workers: a report {1e3 * report['median']:.1f} ms (95%: "
                f"{1e3 * report['p95']:.1f}), a gap {gap['median']:.2f} s",
                flush=True,
            )
    return rows


def measure_all_trials(arguments: argparse.Namespace, new_url: Callable[[str], str]) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {kind: [] for kind in arguments.storages if kind != "proxy"}
    for kind, found in rows.items():
        for size in arguments.sizes:
            found.append(row := measure_trials(new_url(kind), size))
            print(f"{kind}, {size} trials:", ", ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--reports", type=int, default=20, help="of each trial")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000], help="trials of the large studies")
    parser.add_argument("--parts", nargs="+", choices=["workers", "trials"], default=["workers", "trials"])
    parser.add_argument("--storages", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    run_benchmark(parser, measure, packages=("optuna", "optuna-dashboard", "sqlalchemy"))


if __name__ == "__main__":
    main()
