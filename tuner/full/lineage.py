"""What a study remembers of its promotions: which trial, from where, when, after which confirmation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer.checkpoint import holds_state
from tuner.full.confirmed import Confirmation
from tuner.full.runs import CONTINUED_FROM
from tuner.run import code_version
from tuner.trials import ranking

PROMOTIONS = "promotions"
"""Attribute of a study: a record of each promotion, the newest last."""
CONTINUED_AT = "continued_at"
"""In a record: the step that the run went on from."""


def promotion_of(study: optuna.Study, run_dir: Path) -> dict[str, Any]:
    """What the study remembers of a promotion; nothing where there was none."""
    records: list[dict[str, Any]] = study.user_attrs.get(PROMOTIONS, [])
    found = [record for record in records if record["run_dir"] == str(run_dir)]
    if not found and holds_state(run_dir):
        # The folder of runs was moved.
        found = [record for record in records if Path(record["run_dir"]).name == run_dir.name]
    return found[-1] if found else {}


def remember(
    study: optuna.Study,
    chosen: FrozenTrial,
    run_dir: Path,
    start: tuple[Path | None, int],
    begun: bool,
    confirmed: Confirmation | None,
) -> dict[str, Any]:
    """A finished trial can't be written to, so its promotion is recorded with the study, once."""
    before = promotion_of(study, run_dir)
    if before and begun:
        return before
    origin, step = start
    others = [one for one in study.user_attrs.get(PROMOTIONS, []) if one["run_dir"] != str(run_dir)]
    record = {
        "trial": chosen.number,
        "value": chosen.value,
        "params": chosen.params,
        "best": ranking(study)[0].number,
        "run_dir": str(run_dir),
        CONTINUED_FROM: None if origin is None else str(origin),
        CONTINUED_AT: step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }
    if confirmed is not None:
        record["confirmation"] = {**asdict(confirmed), "verdict": confirmed.verdict}
    elif "confirmation" in before:
        record["confirmation"] = before["confirmation"]
    study.set_user_attr(PROMOTIONS, [*others, record])
    return record


def lineage_of(study: optuna.Study, chosen: FrozenTrial, record: Mapping[str, Any]) -> dict[str, Any]:
    """Where a full run comes from: the same whenever it goes on."""
    origin = record[CONTINUED_FROM]
    return {
        "study": study.study_name,
        "trial": chosen.number,
        "params": chosen.params,
        # A record of before the step was kept has none.
        CONTINUED_FROM: None if origin is None else {"run_dir": origin, "step": record.get(CONTINUED_AT)},
    }
