"""A small study of the toy workload, as a dictionary to vary and as a file to launch."""

from __future__ import annotations

import copy
import math
import wave
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from optuna_dashboard import save_note

from tuner.show.note import FENCE
from tuner.spec.study_toml import StudySpec
from tuner.study.keys import write_study

HTML = "</script><img src=x onerror=document.title='injected'>"
KINDS: dict[str, Any] = {"choices": ["plain", HTML]}

VALUES: dict[str, Any] = {
    "study": {"name": "toy", "workload": "tests.toy:Toy"},
    "workload": {"num_train": 128},
    "train": {"batch_size": 8, "d_coef": 1.0, "log_every": 5, "precision": "fp32"},
    "search": {
        "train.batch_size": {"choices": [4, 8, 16]},
        "train.d_coef": {"low": 0.1, "high": 10.0, "log": True},
    },
    "trial": {"samples": 160, "evaluations": 4, "num_trials": 4},
    "full": {"samples": 480},
}

TOML = """
[study]
name = "toy"
workload = "tests.toy:Toy"
[workload]
num_train = 128
[train]
batch_size = 8
log_every = 5
precision = "fp32"
[search]
train.batch_size = { choices = [4, 8, 16] }
"train.d_coef" = { low = 0.1, high = 10.0, log = true }
[trial]
samples = 160
evaluations = 4
num_trials = 3
[full]
samples = 480
"""


def values(**changes: Any) -> dict[str, Any]:
    """VALUES with some of their dotted keys replaced: values(**{"trial.num_trials": 2})."""
    result = copy.deepcopy(VALUES)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        result[section][name] = value
    return result


def build(*, without: str = "", **changes: Any) -> StudySpec:
    """A spec of `values`; without one of their dotted keys, if one is named."""
    given = values(**changes)
    if without:
        section, _, name = without.partition(".")
        del given[section][name]
    return StudySpec.build(given, base_dir=Path.cwd())


def write(folder: Path, text: str = TOML) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def finished_study(folder: Path) -> optuna.Study:
    """A study of 12 trials, with a full run that left a sample: all written at once, nothing is trained.

    The value depends on d_coef alone. Parameter, reason, note and sample's name have HTML in them.
    """
    spec = build(**{"trial.num_trials": 12})
    study = optuna.create_study(study_name="toy", storage=f"sqlite:///{folder}/tuner.db")
    write_study(study, spec={**spec.to_dict(), "search": {**spec.to_dict()["search"], "workload.kind": KINDS}})
    space: dict[str, BaseDistribution] = {
        "train.batch_size": IntDistribution(4, 16),
        "train.d_coef": FloatDistribution(0.1, 10.0, log=True),
        "workload.kind": CategoricalDistribution(KINDS["choices"]),
    }
    for number in range(12):
        # Every parameter has each of its values equally often at each d_coef's rank.
        d_coef = 10 ** ((number * 5 % 12) / 6 - 1)
        params = {"train.batch_size": 4 * 2 ** (number % 3), "train.d_coef": d_coef}
        params["workload.kind"] = KINDS["choices"][number // 6]
        value = 1 + abs(math.log10(d_coef / 0.3))
        curve = {point: value + 40 / point for point in (40, 80, 120, 160)}
        attrs: dict[str, Any] = {"baseline": number == 0, "full_hours": 2.0, "d": [1e-5, 1e-3, 0.01, 0.01]}
        state = TrialState.COMPLETE
        if number == 11:
            state, attrs = TrialState.PRUNED, {"infeasible": HTML}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=params,
                distributions=space,
                value=value if state == TrialState.COMPLETE else None,
                intermediate_values=curve,
                user_attrs=attrs,
            )
        )
    run_dir = folder / "full-trial-00003"
    sound = run_dir / "samples" / "step_000000060" / f"{HTML.replace('/', '_')}.wav"
    sound.parent.mkdir(parents=True)
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16_000))
    full = optuna.create_study(study_name="toy.full", storage=study._storage)
    curve = {point: 1.2 + 40 / point for point in (40, 80, 160, 320, 480)}
    keys = {"run_dir": str(run_dir), "trial": 3, "steps": 60, "step": 60, "metrics": {"val/loss": 1.28}}
    full.add_trial(optuna.trial.create_trial(value=1.28, intermediate_values=curve, user_attrs=keys))
    write_study(
        study,
        promotions=[{"trial": 3, "params": {"train.d_coef": 0.3}, "continued_from": HTML, "started": "2026-01-01"}],
    )
    save_note(study, f"{FENCE}\n\nHeard by *ear*: fine. {HTML} ![x](http://example.com/x.png)")
    return study
