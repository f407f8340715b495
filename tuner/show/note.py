"""The note with which a study opens in optuna-dashboard, as Markdown."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer.clock import format_hours
from tuner.full.runs import run_state
from tuner.show.files import database_url
from tuner.show.findings import Findings
from tuner.show.table import format_params, format_value, is_rising
from tuner.storage import DEFAULT_URL
from tuner.trials import BASELINE, FULL_HOURS, INFEASIBLE, last_value, state_of

MAX_RANKED = 15
MAX_INFEASIBLE = 8
MAX_FULL_RUNS = 8
MAX_REASON = 160

FENCE = "*Above: written by tuner after each trial. Below: yours, and it stays.*"


def study_note(found: Findings, promote: str, files: Mapping[str, str]) -> str:
    """The study's note.

    Args:
        promote: The command that starts or continues the full run.
        files: Addresses of the files to download, by name.
    """
    parts = [
        _goal(found),
        _best(found),
        "### Leaderboard\n\n" + _leaderboard(found),
        _confirmation(found),
        _infeasible(found),
        _full_runs(found),
        "### Promote\n\n" + _promotion(found, promote),
        "### Files\n\n" + ", ".join(f"[{escape(name)}]({address})" for name, address in files.items()) if files else "",
        f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    ]
    return "\n\n".join(part for part in parts if part)


def full_note(found: Findings, promote: str) -> str:
    """The note of `<study>.full`."""
    runs = f"The curve of each full run that was promoted from [{escape(found.name)}]({_address(found)})."
    return "\n\n".join([runs, _full_runs(found), _again(found), _code(promote)])


def with_own_text(note: str, before: str) -> str:
    """`note` in place of the earlier one, with what a person wrote below it, or before there was one."""
    _, fence, own = before.partition(FENCE)
    own = own if fence else before
    return f"{note}\n\n---\n\n{FENCE}" + (f"\n\n{own.strip()}" if own.strip() else "")


def promote_command(study: optuna.Study, run_root: Path, folder: Path | None = None) -> str:
    """The command that promotes, as it is to be typed; `cd` first where it has relative paths.

    Args:
        folder: Where relative paths begin. Default: the working directory.
    """
    words, relative = ["tuner", "promote", shlex.quote(study.study_name)], not run_root.is_absolute()
    url = database_url(study._storage)
    if url is not None:
        relative |= url.get_backend_name() == "sqlite" and not Path(url.database or "").is_absolute()
        told = url.render_as_string(hide_password=False)
        # A note is read by whoever reaches the dashboard: no password in it.
        shown = '"$TUNER_STORAGE"' if url.password else shlex.quote(told)
        words += ["--storage", shown] if told != DEFAULT_URL else []
    words += ["--run-root", shlex.quote(str(run_root))] if run_root != Path("runs") else []
    return (f"cd {shlex.quote(str(folder or Path.cwd()))}\n" if relative else "") + " ".join(words)


def escape(text: object) -> str:
    """Text as Markdown shows it letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(str(text).split()))


def _goal(found: Findings) -> str:
    trial = found.spec["trial"]
    unit = next(unit for unit in ("samples", "steps", "seconds") if unit in trial)
    states = [state_of(t) for t in found.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    ended = [f"- **Ended**: {escape(found.ended)}"] if found.ended else []
    return "\n".join(
        [
            f"- **Goal**: the {'lowest' if found.minimized else 'highest'} {escape(found.metric)} "
            f"after {trial[unit]:,} {unit} of training",
            f"- **Searched**: {'; '.join(_space(name, space) for name, space in found.spec['search'].items())}",
            f"- **Budget**: {trial['num_trials']} trials by its study.toml; so far {counts or 'none'}",
            *ended,
        ]
    )


def _space(name: str, space: Mapping[str, Any]) -> str:
    if "choices" in space:
        return escape(f"{name} from {', '.join(format_value(choice) for choice in space['choices'])}")
    log = " on a log scale" if space.get("log") else ""
    return escape(f"{name} {format_value(space['low'])} to {format_value(space['high'])}{log}")


def _best(found: Findings) -> str:
    best = found.best
    if best is None:
        return "**No trial is complete yet.**"
    text = f"**Best: trial {best.number}** ({escape(format_params(best.params))}), "
    text += f"{escape(found.metric)} {best.value:.4f}"
    if found.is_baseline(best):
        text += ": the baseline itself"
    elif found.baseline is not None and (reference := last_value(found.baseline)) is not None:
        text += f", {abs(reference - (best.value or 0)):.4f} better than the baseline ({reference:.4f})"
    hours = found.full_hours(best)
    text += f". At its speed the full run takes about {format_hours(hours)}." if hours else "."
    if is_rising(best):
        text += (
            "\n\n**d was still rising at its end**: the short run is too short for this d\\_coef. The order of the "
            "trials may change in a longer one; give `[trial]` more samples, or confirm before the full run."
        )
    return text


def _leaderboard(found: Findings) -> str:
    """The best trials, and the baseline in any case."""
    if not found.ranked:
        return "empty"
    names = list(found.spec["search"])
    rows = list(enumerate(found.ranked, 1))
    shown = rows[:MAX_RANKED]
    if len(rows) > MAX_RANKED and not any(found.is_baseline(trial) for _, trial in shown):
        baseline = [row for row in rows if found.is_baseline(row[1])]
        shown = shown[: MAX_RANKED - len(baseline)] + baseline
    heads = ["", "trial", *(_short(name) for name in names), found.metric, "against baseline", "full run", "remarks"]
    lines = [_row(heads), _row(["---:", "---:"] + ["---:"] * len(names) + ["---:", "---:", "---:", ":---"], raw=True)]
    for rank, trial in shown:
        values = [format_value(trial.params.get(name, "")) for name in names]
        lines.append(_row([rank, trial.number, *values, f"{trial.value:.4f}", *_comparison(found, trial)]))
    left = len(rows) - len(shown)
    return "\n".join(lines) + (f"\n\n{left} more complete trials are in leaderboard.csv." if left else "")


def _comparison(found: Findings, trial: FrozenTrial) -> list[str]:
    """The leaderboard's last columns: against the baseline, hours of a full run, remarks."""
    reference = None if found.baseline is None else last_value(found.baseline)
    own = found.is_baseline(trial) or reference is None
    hours = found.full_hours(trial)
    remarks = ["best"] * found.is_best(trial) + ["baseline"] * bool(trial.user_attrs.get(BASELINE))
    remarks += ["d still rising"] * is_rising(trial)
    remarks += _micro_batches(found, trial)
    return [
        "" if own else f"{(trial.value or 0.0) - (reference or 0.0):+.4f}",
        format_hours(hours) if hours else "",
        ", ".join(remarks),
    ]


def _micro_batches(found: Findings, trial: FrozenTrial) -> list[str]:
    """That a batch goes through the model in parts, where it does."""
    micro = trial.user_attrs.get("micro_batch_size")
    batch = trial.params.get("train.batch_size", found.spec["train"].get("batch_size"))
    return [f"in micro-batches of {micro}"] if micro and batch and micro != batch else []


def _confirmation(found: Findings) -> str:
    """What longer runs on several seeds said."""
    confirmed = found.confirmation
    if confirmed is None:
        return ""
    heads = ["trial", "parameters", "mean", "over seeds", "over the baseline", "remarks"]
    lines = [_row(heads), _row(["---:", ":---", "---:", "---:", "---:", ":---"], raw=True)]
    for one in confirmed.trials:
        values, margin = one.values.values(), confirmed.margin(one)
        remarks = ["winner"] * (one is confirmed.winner) + ["baseline"] * (one.number == confirmed.baseline)
        told = ["", ""] if one.failed else [f"{one.mean:.4f}", f"{min(values):.4f} to {max(values):.4f}"]
        compared = "" if margin is None or one.number == confirmed.baseline else f"{margin:+.4f}"
        lines.append(_row([one.number, format_params(one.params), *told, compared, ", ".join(remarks) or one.failed]))
    length = f"Over {confirmed.rung:,} {confirmed.unit}: {confirmed.verdict}."
    return f"### Confirmation\n\n{escape(length)}\n\n" + "\n".join(lines)


def _infeasible(found: Findings) -> str:
    trials = [trial for trial in found.trials if state_of(trial) == "infeasible"]
    lines = []
    for trial in trials[-MAX_INFEASIBLE:]:
        marked = " (baseline)" if found.is_baseline(trial) else ""
        reason = textwrap.shorten(trial.user_attrs[INFEASIBLE], MAX_REASON, placeholder=" ...")
        lines.append(f"- trial {trial.number}{marked}, {escape(format_params(trial.params))}: {escape(reason)}")
    left = len(trials) - len(lines)
    lines += [f"- and {left} earlier ones, in leaderboard.csv"] if left else []
    return "### Infeasible\n\n" + "\n".join(lines) if lines else ""


def _full_runs(found: Findings) -> str:
    if not found.full_runs:
        return ""
    shown = found.full_runs[-MAX_FULL_RUNS:]
    # A run that ends before its speed is measured has no hours.
    timed = ["in all"] if any(FULL_HOURS in run.user_attrs for run in shown) else []
    lines = [
        _row(["of trial", "state", "step", "of", found.metric, *timed, "folder"]),
        _row(["---:", ":---"] + ["---:"] * (3 + len(timed)) + [":---"], raw=True),
    ]
    for run in shown:
        attrs = run.user_attrs
        steps, value = attrs.get("steps"), attrs.get("metrics", {}).get(found.metric, last_value(run))
        told = "" if value is None else f"{value:.4f}"
        total = f"{steps:,}" if steps else ""
        hours = [format_hours(attrs[FULL_HOURS]) if FULL_HOURS in attrs else ""] if timed else []
        step = f"{attrs.get('step', 0):,}"
        lines.append(_row([attrs["trial"], run_state(run), step, total, told, *hours, attrs["run_dir"]]))
    left = len(found.full_runs) - MAX_FULL_RUNS
    return "### Full runs\n\n" + "\n".join(lines) + (f"\n\n{left} earlier ones are not listed." if left > 0 else "")


def _promotion(found: Findings, promote: str) -> str:
    if found.full_runs:
        return f"{_again(found)}\n\n{_code(promote)}"
    if found.best is None:
        return "Once a trial is complete:\n\n" + _code(promote)
    return f"The full run with trial {_next(found)}, from its checkpoint:\n\n" + _code(promote)


def _next(found: Findings) -> str:
    """Whom the command would promote."""
    assert found.best is not None
    won = found.confirmation and found.confirmation.winner.number
    return f"{found.best.number}" if won is None else f"{won}, which won the confirmation"


def _again(found: Findings) -> str:
    unfinished = [run.user_attrs["trial"] for run in found.full_runs if run_state(run) != "finished"]
    return f"To continue the full run of trial {unfinished[-1]}:" if unfinished else "The full run has finished; again:"


def _address(found: Findings) -> str:
    return f"/dashboard/studies/{found.study_id}"


def _code(command: str) -> str:
    """An indented block: nothing in it needs to be escaped."""
    return textwrap.indent(command, "    ")


def _row(cells: Sequence[object] | Iterable[object], *, raw: bool = False) -> str:
    """A line of a table. The dashboard's tables have no space between columns, so each cell brings its own."""
    return "| " + " | ".join(str(cell) if raw else f"\u00a0\u00a0{escape(cell)}" for cell in cells) + " |"


def _short(name: str) -> str:
    return name.rpartition(".")[2]
