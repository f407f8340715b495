"""Commands on one training: train, evaluate, average, export, bench."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import UserError
from tuner.cli.terminal import (
    Format,
    LogFormat,
    Overrides,
    RunRoot,
    Spec,
    Track,
    finish,
    follow_run,
    show_log,
    stop_on_signals,
    user_errors,
)


def train(
    context: typer.Context,
    spec: Spec,
    override: Overrides = None,
    resume: Annotated[str, typer.Option(help="Checkpoint to continue from: auto, never, or a path.")] = "auto",
    init: Annotated[Path | None, typer.Option(help="Start at step 0 with the weights of this checkpoint.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help=r"The run directory. \[default: RUN_ROOT/<study>/train]")] = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
    log_format: LogFormat = Format.auto,
) -> None:
    r"""Train a full run without a study, from the spec's \[train] and \[full].

    Example: tuner train studies/indextts2/study.toml --set train.batch_size=16 --set full.steps=50_000
    """
    from rich.console import Console

    from trainer.checkpoint import BEST, holds_state, read_checkpoint
    from tuner.cli.ranks import ranks_of
    from tuner.doctor.quick import report_checks, run_spec_checks
    from tuner.spec.overrides import parse_overrides
    from tuner.spec.setups import full_setup
    from tuner.spec.study_toml import StudySpec
    from tuner.study.tracked_run import Runtime, tracked_train

    ranks = ranks_of(context)
    show_log(log_format)
    report = Console(stderr=log_format == Format.json).print
    study_spec = StudySpec.load(spec, parse_overrides(override), search=False)
    report_checks(run_spec_checks(study_spec, run_dir or run_root))
    name = study_spec.study.name
    folder = run_dir.resolve() if run_dir else Runtime(run_root).run_dir(name, "train")
    if init and not holds_state(folder):
        read_checkpoint(init, mmap=True)  # before anything is written
    title = f"{name}, full run without a study"
    with stop_on_signals(report) as stop, user_errors(), follow_run(title, log_format) as run:
        runtime = Runtime(run_root, track, stop, ranks=ranks)
        result = tracked_train(
            full_setup(study_spec, {}),
            folder,
            runtime,
            experiment=name,
            lineage={"spec": str(spec.resolve()), "overrides": override or []},
            trackers=[run],
            resume=resume,
            init=init.resolve() if init else None,
            full=study_spec,
        )
    again = "the same command with --resume auto" if resume == "never" else "the same command"
    best = f"Its best state is {result.run_dir / BEST}: continue it in a new folder (--resume PATH --run-dir NEW)"
    finish(run, result, again, remedy=best)


def evaluate(
    spec: Annotated[Path, typer.Argument(help="A study.toml; with --all a run directory.", show_default=False)],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint, a run directory, or a gpt.pth.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Rank all checkpoints of a run directory.")] = False,
    by: Annotated[
        str | None,
        typer.Option(help=r"With --all: sort by this metric; -METRIC: the highest first. \[default: val/loss]"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of validation samples, instead of all.")] = None,
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute a checkpoint's metrics on the spec's validation data, or those of all checkpoints of a run.

    Example: tuner evaluate studies/indextts2/study.toml --checkpoint checkpoints/gpt.pth
    """
    if every and (checkpoint or override):
        raise UserError("--all measures a run with its own options: leave --checkpoint and --set out.")
    if by and not every:
        raise UserError(f"--by {by}: it sorts the checkpoints of --all.")
    if checkpoint is None and not every:
        raise UserError(f"{spec}: name a --checkpoint, or give a run directory and --all.")
    from rich.console import Console

    from tuner.promotion.evaluate import evaluate_all, evaluate_checkpoint
    from tuner.show.json_events import to_json
    from tuner.show.table import checkpoints_table
    from tuner.spec.overrides import parse_overrides
    from tuner.spec.study_toml import StudySpec

    if not as_json:
        show_log(level=logging.WARNING if every else logging.INFO)
    if checkpoint is None:
        with user_errors():
            found = evaluate_all(spec, samples=samples, by=by or "val/loss")
        if as_json:
            print(to_json([one.to_dict() for one in found]))
        else:
            Console().print(checkpoints_table(found))
        return
    study_spec = StudySpec.load(spec, parse_overrides(override), search=False)
    with user_errors():
        evaluation = evaluate_checkpoint(study_spec, checkpoint, samples=samples)
    values = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
    text = f"{evaluation.checkpoint}, {evaluation.samples:,} samples: {values}"
    print(to_json(evaluation.to_dict()) if as_json else text)


def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints of one model.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
) -> None:
    """Average the weights of checkpoints.

    Example: tuner average runs/ko/full-trial-00007/milestone_*.pth --to mean.pth
    """
    from trainer.averaging import average_checkpoints

    print(f"{to}: the mean of {average_checkpoints(checkpoints, to)} checkpoints")


def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    to: Annotated[
        Path, typer.Option(help="The file to write; a name without an ending is a folder.", show_default=False)
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(help=r"best_*, latest, a step, or a path. \[default: the first best_*, else latest]"),
    ] = None,
    format: Annotated[str | None, typer.Option(help=r"pth or safetensors. \[default: by the name, else pth]")] = None,
    spec: Annotated[Path | None, typer.Option(help="Use the workload of this study.toml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Export a checkpoint for inference: the weights as a file, or a folder with all that loads them.

    Example: tuner export runs/indextts2-ko/full-trial-00007 --to release
    """
    from trainer.units import format_bytes
    from tuner.promotion.export import export

    show_log()
    exported = export(run_dir, to, checkpoint=checkpoint, format=format, spec=spec, force=force)
    size = format_bytes(exported.num_bytes)
    print(f"{exported.path}: {size}, from {exported.checkpoint}, step {exported.step}")


def bench(
    spec: Spec,
    rounds: Annotated[int, typer.Option(min=1, help="Number of measurements of each row.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each measurement, after a warm-up.")] = 30,
    only: Annotated[
        list[str] | None, typer.Option(help="Measure only this row or group, and the baseline. May be repeated.")
    ] = None,
    override: Overrides = None,
    chart: Annotated[Path | None, typer.Option(help="Write the chart to this .svg file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the speed-up of each optimization on this machine.

    Example: tuner bench studies/korean_demo/study.toml --chart speed.svg
    """
    from rich.console import Console

    from tuner.bench.report import check_chart_path, print_table, write_chart
    from tuner.bench.table import Bench
    from tuner.spec.overrides import parse_overrides
    from tuner.spec.study_toml import StudySpec

    if chart:
        check_chart_path(chart)
    study_spec = StudySpec.load(spec, parse_overrides(override), search=False)
    report = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    measurement = Bench(study_spec, rounds=rounds, steps=steps, only=only or [], report=report)
    measurement.run()
    result = measurement.result()
    if chart:
        write_chart(result, chart)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result, Console())
    if measurement.failed:
        raise typer.Exit(1)
