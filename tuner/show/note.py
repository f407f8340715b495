"""The note with which a study opens in optuna-dashboard, as Markdown."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.clock import format_hours
from tuner.show.samples import SampleRow
from tuner.show.table import (
    CONFIRMATION_HEADINGS,
    FULL_LENGTH_HEADINGS,
    confirmation_rows,
    describe_state,
    format_full_length,
    format_params,
    format_value,
    short_name,
    trial_marks,
)
from tuner.study.edges import describe_edges
from tuner.study.optuna_internals import backend_of, id_of, storage_of
from tuner.study.recommendation import describe_recommendation
from tuner.study.record import FullRunRecord, StudyRecord, TrialRecord
from tuner.study.servers import ProxyStorage, hide_password
from tuner.study.storage import DEFAULT_URL, database_url
from tuner.study.trial_length import judge_trial_length

MAX_RANKED = 15
MAX_INFEASIBLE = 8
MAX_FULL_RUNS = 8
MAX_SAMPLES = 10
MAX_REASON = 160
LEFT_ALIGNED = ("parameters", "remarks", "state", "folder", "files", "continued from", "code")
"""Headings of the columns of text."""


class Markdown(str):
    """A cell that is Markdown already."""


FENCE = "*Above: written by tuner after each trial. Below: yours, and it stays.*"
"""Separates the note from the user's own text. Stored notes are found by it: it must never change."""


def study_note(
    record: StudyRecord, promote: str | None, files: Mapping[str, str], samples: Sequence[SampleRow] = ()
) -> str:
    """The note of a study.

    Args:
        promote: The command that starts or continues the full run; None for readers who can't run it.
        files: Addresses of the files to download, by name.
        samples: What hooks left for the full runs.
    """
    links = ", ".join(f"[{escape(name)}]({address})" for name, address in files.items())
    parts = [
        _goal(record),
        _best(record),
        "### Leaderboard\n\n" + _leaderboard(record),
        _confirmation(record),
        _infeasible(record),
        _full_runs(record),
        _samples(samples),
        "" if promote is None else "### Promote\n\n" + _promotion(record, promote),
        f"### Files\n\n{links}" if files else "",
        f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    ]
    return "\n\n".join(part for part in parts if part)


def full_note(record: StudyRecord, promote: str) -> str:
    """The note of `<study>.full`."""
    address = f"/dashboard/studies/{id_of(record.study)}"
    heading = f"The curve of each full run that was promoted from [{escape(record.name)}]({address})."
    return "\n\n".join([heading, _full_runs(record), _continuation(record), _code(promote)])


def with_own_text(note: str, before: str) -> str:
    """The new note in place of the earlier one, with the user's text below."""
    own = own_text(before)
    return f"{note}\n\n---\n\n{FENCE}" + (f"\n\n{own}" if own else "")


def own_text(note: str) -> str:
    """The user's text in a stored note; without a fence all of it is."""
    _, fence, own = note.partition(FENCE)
    return (own if fence else note).strip()


def lineage(record: StudyRecord) -> str:
    """Where each full run comes from, as a table; and the data."""
    data = "" if record.num_samples is None else f"{record.num_samples:,} samples of training data"
    data += f", digest {escape(record.data_digest[:12])}" if data and record.data_digest else ""
    if not record.promotions:
        return f"### Lineage\n\n{data}" if data else ""
    cells = [
        [
            promotion.get("trial"),
            format_params(promotion.get("params", {})),
            f"{promotion['value']:.4f}" if "value" in promotion else "",
            promotion.get("continued_from") or "step 0",
            promotion.get("continued_at", ""),
            promotion.get("started", ""),
            promotion.get("code_version", ""),
        ]
        for promotion in record.promotions
    ]
    headings = ["trial", "parameters", record.metric, "continued from", "at step", "started", "code"]
    return f"### Lineage\n\n{_table(headings, cells)}\n\n{data}"


def promote_command(record: StudyRecord, run_root: Path, folder: Path | None = None) -> str:
    """The command that promotes, ready to paste; it begins with `cd` if it has relative paths.

    Args:
        folder: Folder of relative paths. Default: the working directory.
    """
    words, relative = ["tuner", "promote", shlex.quote(record.name)], not run_root.is_absolute()
    url = database_url(storage_of(record.study))
    if url is not None:
        relative |= url.get_backend_name() == "sqlite" and not Path(url.database or "").is_absolute()
        text = url.render_as_string(hide_password=False)
        # Everybody who reaches the dashboard reads the note: it must not hold a password.
        storage = '"$TUNER_STORAGE"' if hide_password(text) != text else shlex.quote(text)
        words += ["--storage", storage] if text != DEFAULT_URL else []
    elif isinstance(proxy := backend_of(storage_of(record.study)), ProxyStorage):
        words += ["--storage", proxy.shown]
    words += ["--run-root", shlex.quote(str(run_root))] if run_root != Path("runs") else []
    return (f"cd {shlex.quote(str(folder or Path.cwd()))}\n" if relative else "") + " ".join(words)


def escape(text: object) -> str:
    """Text on one line, without Markdown's special characters."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(str(text).split()))


def _goal(record: StudyRecord) -> str:
    trial, states = record.spec["trial"], [trial.state for trial in record.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    search = "; ".join(_dimension(name, space) for name, space in record.spec["search"].items())
    lines = [
        f"- **Goal**: the {'lowest' if record.minimized else 'highest'} {escape(record.metric)} "
        f"after {trial[record.unit]:,} {record.unit} of training",
        f"- **Searched**: {search}",
        f"- **Budget**: {trial['num_trials']} trials by its study.toml; so far {counts or 'none'}",
    ]
    length = judge_trial_length(record)
    lines += [f"- **Length of a trial**: {escape(str(length))}"] if length else []
    lines += [f"- **Ended**: {escape(record.ended)}"] if record.ended else []
    return "\n".join(lines)


def _dimension(name: str, space: Mapping[str, Any]) -> str:
    if "choices" in space:
        return escape(f"{name} from {', '.join(format_value(choice) for choice in space['choices'])}")
    log = " on a log scale" if space.get("log") else ""
    return escape(f"{name} {format_value(space['low'])} to {format_value(space['high'])}{log}")


def _best(record: StudyRecord) -> str:
    best, baseline = record.best, record.baseline
    if best is None:
        return "**No trial is complete yet.**"
    text = f"**Best: trial {best.number}** ({escape(format_params(best.params))}), "
    text += f"{escape(record.metric)} {best.value:.4f}"
    if record.is_baseline(best):
        text += ": the baseline itself"
    elif baseline is not None and baseline.value is not None:
        text += f", {abs(baseline.value - (best.value or 0)):.4f} better than the baseline ({baseline.value:.4f})"
    hours = record.full_hours(best)
    text += f". At its speed the full run takes about {format_hours(hours)}." if hours else "."
    if best.ended_with_d_rising:
        text += (
            "\n\n**d was still rising at its end**: the short run is too short for this d\\_coef. The order of the "
            "trials may change in a longer one; give `[trial]` more samples, or confirm before the full run."
        )
    if recommendation := describe_recommendation(record):
        text += f"\n\n**For the full run**: {escape(recommendation)}."
    for sentence in describe_edges(record):
        text += f"\n\n**At the edge**: {escape(sentence)}."
    return text


def _leaderboard(record: StudyRecord) -> str:
    """The best trials, and the baseline in any case."""
    if not record.ranked:
        return "empty"
    rows = list(enumerate(record.ranked, 1))
    shown = rows[:MAX_RANKED]
    baseline = [row for row in rows[MAX_RANKED:] if record.is_baseline(row[1])]
    shown = shown[: MAX_RANKED - len(baseline)] + baseline
    names = list(record.spec["search"])
    headings = [
        "",
        "trial",
        *map(short_name, names),
        record.metric,
        "against baseline",
        "full run",
        *FULL_LENGTH_HEADINGS,
        "remarks",
    ]
    cells = [
        [
            rank,
            trial.number,
            *(format_value(trial.params.get(name, "")) for name in names),
            f"{trial.value:.4f}",
            *_comparison(record, trial),
        ]
        for rank, trial in shown
    ]
    left = len(rows) - len(shown)
    return _table(headings, cells) + (f"\n\n{left} more complete trials are in leaderboard.csv." if left else "")


def _comparison(record: StudyRecord, trial: TrialRecord) -> list[str]:
    """The leaderboard's last columns: difference to the baseline, hours and length of the full run, remarks."""
    reference = None if record.baseline is None or record.is_baseline(trial) else record.baseline.value
    hours = record.full_hours(trial)
    remarks = trial_marks(record, trial) + ["d still rising"] * trial.ended_with_d_rising
    micro = trial.micro_batch_size
    batch = trial.params.get("train.batch_size", record.spec["train"].get("batch_size"))
    remarks += [f"in micro-batches of {micro}"] if micro and batch and micro != batch else []
    return [
        "" if reference is None else f"{(trial.value or 0.0) - reference:+.4f}",
        format_hours(hours) if hours else "",
        *format_full_length(record, trial),
        ", ".join(remarks),
    ]


def _confirmation(record: StudyRecord) -> str:
    confirmation = record.confirmation
    if confirmation is None:
        return ""
    result = f"By {confirmation.metric}, over {confirmation.rung:,} {confirmation.unit}: {confirmation.verdict}."
    table = _table(CONFIRMATION_HEADINGS, confirmation_rows(confirmation))
    return f"### Confirmation\n\n{escape(result)}\n\n{table}"


def _infeasible(record: StudyRecord) -> str:
    trials = [trial for trial in record.trials if trial.state == "infeasible"]
    lines = []
    for trial in trials[-MAX_INFEASIBLE:]:
        baseline = " (baseline)" if record.is_baseline(trial) else ""
        reason = textwrap.shorten(trial.infeasible or "", MAX_REASON, placeholder=" ...")
        lines.append(f"- trial {trial.number}{baseline}, {escape(format_params(trial.params))}: {escape(reason)}")
    left = len(trials) - len(lines)
    lines += [f"- and {left} earlier ones, in leaderboard.csv"] if left else []
    return "### Infeasible\n\n" + "\n".join(lines) if lines else ""


def _full_runs(record: StudyRecord) -> str:
    runs = record.full_runs[-MAX_FULL_RUNS:]
    if not runs:
        return ""
    # A run that ends before its speed is measured has no hours.
    timed = ["duration"] if any(run.hours is not None for run in runs) else []
    table = _table(
        ["trial", "state", "step", "of", record.metric, *timed, "folder"],
        [_full_run_cells(record, run, bool(timed)) for run in runs],
    )
    left = len(record.full_runs) - len(runs)
    return f"### Full runs\n\n{table}" + (f"\n\n{left} earlier ones are not listed." if left else "")


def _full_run_cells(record: StudyRecord, run: FullRunRecord, timed: bool) -> list[object]:
    value = run.metrics.get(record.metric, run.curve[max(run.curve)] if run.curve else None)
    cells: list[object] = [run.trial, describe_state(run), f"{run.step:,}", f"{run.steps:,}" if run.steps else ""]
    cells += ["" if value is None else f"{value:.4f}"]
    cells += ["" if run.hours is None else format_hours(run.hours)] if timed else []
    return [*cells, run.run_dir]


def _samples(rows: Sequence[SampleRow]) -> str:
    """The newest samples, with links to their files."""
    if not rows:
        return ""
    shown = rows[: -MAX_SAMPLES - 1 : -1]
    names = list(dict.fromkeys(name for row in shown for name in row.metrics))
    cells = [
        [
            row.trial,
            f"{row.step:,}",
            *(format_value(row.metrics.get(name, "")) for name in names),
            Markdown(", ".join(f"[{escape(name)}]({address})" for name, address in row.links.items())),
        ]
        for row in shown
    ]
    left = len(rows) - len(shown)
    table = _table(["trial", "step", *names, "files"], cells)
    return f"### Samples\n\n{table}" + (f"\n\n{left} earlier ones are among the study's artifacts." if left else "")


def _promotion(record: StudyRecord, promote: str) -> str:
    if record.full_runs:
        return f"{_continuation(record)}\n\n{_code(promote)}"
    if record.best is None:
        return "Once a trial is complete:\n\n" + _code(promote)
    winner = record.confirmation and record.confirmation.winner.number
    trial = f"{record.favourites[0].number}" if winner is None else f"{winner}, which won the confirmation"
    return f"The full run with trial {trial}, from its checkpoint:\n\n" + _code(promote)


def _continuation(record: StudyRecord) -> str:
    unfinished = [run.trial for run in record.full_runs if run.state != "finished"]
    return f"To continue the full run of trial {unfinished[-1]}:" if unfinished else "The full run has finished; again:"


def _code(command: str) -> str:
    """An indented block, in which nothing needs to be escaped."""
    return textwrap.indent(command, "    ")


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; its cells have their own space, as the dashboard's tables have none between columns."""
    lines = [
        [f"\u00a0\u00a0{cell if isinstance(cell, Markdown) else escape(cell)}" for cell in row]
        for row in (headings, *rows)
    ]
    lines.insert(1, [":---" if heading in LEFT_ALIGNED else "---:" for heading in headings])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
