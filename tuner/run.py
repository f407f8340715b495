"""One tracked training run: what trials, full runs and `tuner train` have in common."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna

from trainer import Evaluation, TrainResult, train
from trainer.tracking import AIM_RUN, AimTracker, Tracker, Trackers, aim_command, aim_run
from trainer.workload import Workload
from tuner.search_space import Setup
from tuner.workloads import folder_digest

WORKLOAD = "workload"
"""In a checkpoint's lineage: what it takes to build its workload again."""

LOGGERS = ("trainer", "tuner", "studies")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where runs lie and how they are followed; nothing of it changes what is computed."""

    run_root: Path = Path("runs")
    track: bool = True
    """Write to the Aim repository in `run_root`."""
    stop: Callable[[], bool] = lambda: False
    """Asked at every step boundary; True ends the run there with a checkpoint."""

    def run_dir(self, study: str, name: str) -> Path:
        return (self.run_root / study / name).resolve()


def tracked_train(
    setup: Setup,
    run_dir: Path,
    runtime: Runtime,
    *,
    experiment: str,
    lineage: Mapping[str, Any],
    trackers: Sequence[Tracker] = (),
    on_eval: Callable[[Evaluation], None] | None = None,
    resume: str | Path = "auto",
    init: Path | None = None,
) -> TrainResult:
    """`train()` with its log kept in `run_dir/train.log` and its figures in Aim."""
    followers = list(trackers)
    lineage = {**lineage, "code_version": code_version()}
    if runtime.track:
        # The study by name and the trial by number: these hold in whatever storage the study lies.
        params: dict[str, Any] = {
            **{key: lineage[key] for key in ("study", "trial") if key in lineage},
            "train": setup.config.model_dump(mode="json"),
            "workload": setup.workload.model_dump(mode="json"),
            "lineage": lineage,
        }
        followers.append(AimTracker(runtime.run_root, run_dir=run_dir, experiment=experiment, params=params))
    with log_file(run_dir):
        if runtime.track:
            log.info("curves: %s", aim_command(runtime.run_root))
        return train(
            setup.workload,
            setup.config,
            run_dir=run_dir,
            tracker=Trackers(followers),
            on_eval=on_eval,
            stop=runtime.stop,
            resume=resume,
            init=init,
            lineage={**lineage, WORKLOAD: describe_workload(setup.workload)},
        )


def link_aim(trial: optuna.Trial, run_dir: Path) -> None:
    """Give a trial the hash of the Aim run of its run directory, as soon as there is one."""
    if (run_hash := aim_run(run_dir)) and trial.user_attrs.get(AIM_RUN) != run_hash:
        trial.set_user_attr(AIM_RUN, run_hash)


def describe_workload(workload: Workload) -> dict[str, Any]:
    """Its import name ("module:Class"), the folder that the module is imported from, and its options."""
    cls = type(workload)
    parts = cls.__module__.split(".")
    packages = [".".join(parts[: i + 1]) for i in range(len(parts))]
    # The package that offers the class, sooner than the file that defines it: files are renamed more often.
    offered = (name for name in packages if getattr(sys.modules.get(name), cls.__name__, None) is cls)
    if getattr(sys.modules[cls.__module__], "__file__", None):
        source = Path(inspect.getfile(cls)).resolve()
        folder = source.parents[len(parts) - (source.name != "__init__.py")]
    else:
        folder = Path.cwd()  # a notebook's cell
    return {
        "class": f"{next(offered, cls.__module__)}:{cls.__name__}",
        "folder": str(folder),
        "options": workload.model_dump(mode="json"),
        "code": code_digest(workload),
    }


def code_digest(workload: Workload) -> str:
    """Of the Python files beside the one that defines its class, as this process found them; empty where there is no
    such file."""
    return _code_digest(type(workload))


@cache
def _code_digest(cls: type[Workload]) -> str:
    try:
        return folder_digest(Path(inspect.getfile(cls)).parent)
    except (OSError, TypeError):
        return ""  # a notebook's cell


@contextmanager
def log_file(run_dir: Path) -> Iterator[None]:
    """Append what the trainer and the workload log to `run_dir/train.log`."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    run_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@cache
def code_version() -> str:
    """The package's version, and the commit where it runs from a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("prodigy-tuner")
    return f"{version('prodigy-tuner')}+{commit}"
