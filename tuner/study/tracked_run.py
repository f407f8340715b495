"""One tracked training run, as trials, confirmations, full runs and `tuner train` all do it."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import optuna

from trainer import Evaluation, TrainResult, UserError, train
from trainer.ranks import ALONE, Ranks
from trainer.run_folder import LOG, open_run_folder
from trainer.trackers import installed_trackers
from trainer.tracking import AimTracker, Tracker, Trackers, aim_run
from trainer.workload import Workload
from tuner.spec.setups import Setup
from tuner.spec.study_toml import StudySpec
from tuner.spec.workloads import folder_digest
from tuner.study.hooks import Hook, HookRunner
from tuner.study.keys import write_aim_run
from tuner.study.notify import Notifier
from tuner.study.samples import Samples

WORKLOAD = "workload"
"""Key in a checkpoint's lineage: how to build its workload again."""

LOGGERS = ("trainer", "tuner", "studies")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where runs are stored and how they are tracked; none of it changes the result of a run."""

    run_root: Path = Path("runs")
    track: bool = True
    """Write to the trackers of the spec's [track]."""
    stop: Callable[[], bool] = lambda: False
    """Called at every step boundary; True ends the run there with a checkpoint."""
    alive: Callable[[], object] = lambda: None
    """Called at every batch of a validation, which may take long."""
    ranks: Ranks = ALONE
    """The processes that share each batch of a run."""

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
    full: StudySpec | None = None,
) -> TrainResult:
    """Calls `train()`, logs to `run_dir/train.log`, and tracks the run as the spec's [track] says.

    Args:
        full: The spec of a full run, which has the hooks and notifications in it.
    """
    lineage = {**lineage, "code_version": code_version()}
    # The study by name and the trial by number: both stay valid if the study is copied to another storage.
    params: dict[str, Any] = {
        **{key: lineage[key] for key in ("study", "trial") if key in lineage},
        "train": setup.config.model_dump(mode="json"),
        "workload": setup.workload.model_dump(mode="json"),
        "lineage": lineage,
    }
    with log_file(run_dir), ExitStack() as stack:
        for kind in installed_trackers(setup.trackers) if runtime.track else ():
            log.info("curves: %s", kind.viewer(runtime.run_root))
            tracker = kind(runtime.run_root, run_dir=run_dir, experiment=experiment, params=params)
            trackers = [*trackers, tracker]
        notifier = None
        if full is not None:
            goes_back = full.full.on_decline == "finish"
            notifier = stack.enter_context(Notifier(full.notify, f"{experiment}/{run_dir.name}", goes_back=goes_back))
            trackers = [*trackers, notifier]
            if full.hooks is not None:
                aim = next((tracker for tracker in trackers if isinstance(tracker, AimTracker)), None)
                # First, so that Aim is open until the last hook has ended.
                hook = Hook(
                    full.hooks, full.base_dir, {"study": full.study.name, "trial": str(lineage.get("trial", ""))}
                )
                trackers = [_build_hooks(hook, setup, run_dir, runtime, aim), *trackers]
        result = train(
            setup.workload,
            setup.config,
            run_dir=run_dir,
            tracker=Trackers(trackers),
            on_eval=on_eval,
            stop=runtime.stop,
            alive=runtime.alive,
            resume=resume,
            init=init,
            lineage={**lineage, WORKLOAD: describe_workload(setup.workload)},
            ranks=runtime.ranks,
        )
        if notifier is not None and result.finished:
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            notifier.send("run_ended", f"ended at step {result.step:,}, {metrics}")
    return result


def _build_hooks(hook: Hook, setup: Setup, run_dir: Path, runtime: Runtime, aim: AimTracker | None) -> HookRunner:
    def show(samples: Samples) -> None:
        if aim is not None:
            aim.samples(samples.files, samples.metrics, step=samples.step)

    return HookRunner(
        hook,
        run_dir,
        best=next(iter(setup.workload.best_checkpoints().values()), None),
        num_steps=setup.config.num_steps,
        stop=runtime.stop,
        on_samples=show,
    )


def link_aim(trial: optuna.Trial, run_dir: Path) -> None:
    """Store the hash of a run directory's Aim run with its trial, once Aim has made the run."""
    if run_hash := aim_run(run_dir):
        write_aim_run(trial, run_hash)


def describe_workload(workload: Workload) -> dict[str, Any]:
    """A workload's import name ("module:Class"), the folder that its module is imported from, and its options."""
    cls = type(workload)
    parts = cls.__module__.split(".")
    packages = [".".join(parts[: i + 1]) for i in range(len(parts))]
    # A package that exports the class rather than the file that defines it: files are renamed more often.
    exporting = (name for name in packages if getattr(sys.modules.get(name), cls.__name__, None) is cls)
    if getattr(sys.modules[cls.__module__], "__file__", None):
        source = Path(inspect.getfile(cls)).resolve()
        folder = source.parents[len(parts) - (source.name != "__init__.py")]
    else:
        folder = Path.cwd()  # a notebook's cell
    return {
        "class": f"{next(exporting, cls.__module__)}:{cls.__name__}",
        "folder": str(folder),
        "options": workload.model_dump(mode="json"),
        "code": code_digest(workload),
    }


def code_digest(workload: Workload) -> str:
    """Digest of the Python files in the folder of the workload's class, when this process first asked; "" if the class
    has no file."""
    return _code_digest(type(workload))


@cache
def _code_digest(cls: type[Workload]) -> str:
    try:
        return folder_digest(Path(inspect.getfile(cls)).parent)
    except (OSError, TypeError):
        return ""  # a notebook's cell


class _LogFile(logging.FileHandler):
    """Says once that lines are lost, instead of a traceback for each of them."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._report(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # of lines that were not written yet
            self._report(error)

    def _report(self, error: OSError) -> None:
        if not self.has_failed:
            self.has_failed = True
            print(
                f"{self.baseFilename} can't be written ({error.strerror}): lines of the log are lost.", file=sys.stderr
            )


@contextmanager
def log_file(run_dir: Path) -> Iterator[None]:
    """Append the logs of the trainer and the workload to `run_dir/train.log`.

    Raises:
        UserError: The folder is no run directory, or the file can't be written.
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    open_run_folder(run_dir)
    try:
        handler = _LogFile(run_dir / LOG, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{run_dir / LOG} can't be written ({error.strerror}): remove it, or name another folder."
        ) from error
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
    try:
        package = version("prodigy-tuner")
    except PackageNotFoundError:
        package = "uninstalled"  # it runs from a copy of the repository
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return package
    return f"{package}+{commit}"
