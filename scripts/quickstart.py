"""The whole workflow on the demo corpus: launch, promote, compare. Run by scripts/quickstart.sh.

python -m scripts.quickstart [--run-root runs] [--trials 10]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import optuna
from rich.console import Console
from rich.table import Table

from studies.korean_demo.corpus import make_corpus
from trainer import TrainResult, UserError
from trainer.clock import clock
from trainer.trackers import installed_trackers
from trainer.tracking import Tracker
from tuner import launch, open_study, promote
from tuner.cli.terminal import stop_on_signals
from tuner.show.live import StudyDisplay
from tuner.show.run import RunDisplay
from tuner.show.table import format_params, trial_table
from tuner.spec.setups import trial_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.keys import trial_name
from tuner.study.record import StudyRecord, read_spec
from tuner.study.tracked_run import Runtime, tracked_train

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "studies/korean_demo/study.toml"
FRESH_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-root", type=Path, default=Path("runs"))
    parser.add_argument("--trials", type=int, help="in place of the spec's trial.num_trials")
    arguments = parser.parse_args()
    console, started = Console(soft_wrap=True, highlight=False), time.monotonic()

    heading(console, 1, "the corpus: Korean law texts, spoken by espeak-ng")
    corpus = make_corpus(ROOT / "data/korean_demo")
    console.print(
        f"{'reusing' if corpus['reused'] else 'made'} data/korean_demo: {corpus['num_train']:,} utterances to train "
        f"on, {corpus['num_val']} to validate, {corpus['num_speakers']} speakers, {corpus['hours']:.1f} hours"
    )

    spec = StudySpec.load(SPEC)
    total = arguments.trials or spec.trial.num_trials
    study = open_study(spec, f"sqlite:///{arguments.run_root / 'tuner.db'}")
    with stop_on_signals(console.print) as stop:
        runtime = Runtime(arguments.run_root, stop=stop)
        heading(console, 2, f"the study: {total} trials of {spec.trial.samples:,} samples")
        before = len(study.get_trials(deepcopy=False))
        if before:
            console.print(
                f"the study exists with {before} trials: continuing it up to {total}, or reusing it if complete"
            )
        with StudyDisplay(study, spec, total=total, console=console) as display:
            launch(spec, study=study, runtime=runtime, num_trials=total, display=display)
        leave_if(stop, console)

        heading(console, 3, "baseline against best, once more on a fresh seed")
        record = StudyRecord.read(study)
        base, best = record.baseline, record.best
        assert base is not None and best is not None
        reruns: dict[int, TrainResult] = {}
        for number in dict.fromkeys((base.number, best.number)):
            announce(console, runtime.run_dir(spec.study.name, f"{trial_name(number)}-seed-{FRESH_SEED}"))
            with RunDisplay(f"trial {number}, seed {FRESH_SEED}", console) as follower:
                reruns[number] = rerun(study, number, seed=FRESH_SEED, runtime=runtime, tracker=follower)
            leave_if(stop, console)

        chosen = record.recommended
        assert chosen is not None
        heading(console, 4, f"promotion: the full run with trial {chosen.number}, {format_params(chosen.params)}")
        announce(console, runtime.run_dir(spec.study.name, f"full-{trial_name(chosen.number)}"))
        with RunDisplay("full run", console) as follower:
            full = promote(study, trial=chosen.number, runtime=runtime, trackers=[follower])
        leave_if(stop, console)

    show_results(console, StudyRecord.read(study), reruns, full)
    console.print(f"\nDone in {clock(time.monotonic() - started)}. To look further:")
    viewers = [kind.viewer(arguments.run_root) for kind in installed_trackers(spec.track.to)]
    for command in (f"tuner status {spec.study.name}", "tuner dashboard", *viewers):
        console.print(f"  .venv/bin/{command}")


def heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/bold]")


def announce(console: Console, run_dir: Path) -> None:
    if run_dir.exists():
        console.print(f"{run_dir.name} exists: continuing it, or reusing it if it has finished")


def leave_if(stop: object, console: Console) -> None:
    if callable(stop) and stop():
        console.print("Stopped; run the same command to continue.")
        sys.exit(130)


def rerun(study: optuna.Study, number: int, *, seed: int, runtime: Runtime, tracker: Tracker) -> TrainResult:
    """Train a trial's short run again on another seed, measured on the same validation set.

    The best of many noisy trials looks better than it is; a fresh seed gives its real value.
    """
    spec, params = read_spec(study), StudyRecord.read(study).trials[number].params
    setup = trial_setup(spec, params, seed=seed, save_every=None)
    name = spec.study.name
    run_dir = runtime.run_dir(name, f"{trial_name(number)}-seed-{seed}")
    lineage = {"study": name, "trial": number, "params": dict(params), "seed": seed}
    return tracked_train(setup, run_dir, runtime, experiment=name, lineage=lineage, trackers=[tracker])


def show_results(console: Console, record: StudyRecord, reruns: dict[int, TrainResult], full: TrainResult) -> None:
    """The trials, baseline against best, and the full run, as tables."""
    heading(console, 5, "the results")
    console.print(trial_table(record, "trials"))
    base, best = record.baseline, record.best
    assert base is not None and base.value is not None and best is not None and best.value is not None
    metric = "val/loss"
    table = Table(title="baseline against best, at equal samples seen", title_justify="left")
    for column in ("", "parameters", "samples", "loss in the study", "loss on a fresh seed"):
        table.add_column(column, justify="left" if column in ("", "parameters") else "right")
    for name, trial in (("baseline", base), ("best", best)):
        result = reruns[trial.number]
        table.add_row(
            f"{name} (trial {trial.number})",
            format_params(trial.params),
            f"{result.samples:,}",
            f"{trial.value:.4f}",
            f"{result.metrics[metric]:.4f}",
        )
    console.print(table)
    fresh = reruns[base.number].metrics[metric] - reruns[best.number].metrics[metric]
    console.print(
        f"gain in {metric}: {base.value - best.value:.4f} in the study, {fresh:.4f} on the fresh seed "
        "(the second is the fair one: the minimum over noisy trials always wins)"
    )
    losses = ", ".join(f"{name} {value:.4f}" for name, value in full.metrics.items())
    console.print(f"full run, {full.samples:,} samples in {clock(full.seconds)} of training: {losses}")
    console.print(f"checkpoints: {full.run_dir}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(2)
