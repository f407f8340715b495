from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.studies_for_tests import TOML, build, values, write
from trainer import UserError
from tuner.search_space import baseline, full_setup, suggest, trial_setup
from tuner.spec import StudySpec, parse_override


def test_both_spellings_of_a_searched_field_are_the_same(tmp_path: Path) -> None:
    spec = StudySpec.load(write(tmp_path))
    assert list(spec.search) == ["train.batch_size", "train.d_coef"]
    assert baseline(spec) == {"train.batch_size": 8, "train.d_coef": 1.0}


def test_a_spec_survives_being_stored() -> None:
    spec = build()
    stored = StudySpec.build(spec.to_dict(), base_dir=spec.base_dir)
    assert spec.differences(stored) == []
    assert stored.trial == spec.trial and stored.full == spec.full


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.d_coeff": 1.0}, r"unknown key train\.d_coeff; did you mean train\.d_coef\?"),
        ({"workload.widht": 1}, r"unknown key workload\.widht; did you mean workload\.width\?"),
        ({"study.nam": "x"}, r"unknown key study\.nam; did you mean study\.name\?"),
        ({"trial.sample": 5}, r"unknown key trial\.sample; did you mean trial\.samples\?"),
        ({"trial.steps": 5}, r"trial: give exactly one of samples, steps and seconds"),
        ({"full.steps": 5}, r"full: give exactly one of steps and samples"),
        ({"train.steps": 5}, r"train\.steps: the length .* set in \[trial\] and \[full\]"),
        ({"train.eval_every": 5}, r"train\.eval_every: .*remove it from \[train\]"),
        ({"train.batch_size": 0}, r"train\.batch_size 0: "),
        ({"train.d_coef": 20.0}, r"train\.d_coef = 20\.0 lies outside its search space"),
        ({"train.batch_size": 5}, r"train\.batch_size = 5 lies outside its search space"),
        ({"search.train.samples": {"low": 1, "high": 9}}, r"decides the budget"),
        ({"search.train.val_samples": {"low": 1, "high": 9}}, r"decides what is measured"),
        ({"search.train.seed": {"low": 0, "high": 9}}, r"decides what is measured"),
        ({"search.train.batch_sise": {"low": 1, "high": 9}}, r"did you mean train\.batch_size\?"),
        ({"search.other.x": {"low": 1, "high": 9}}, r"only train\.\* and workload\.\* fields"),
        ({"search.train.d_coef": {"low": 5, "high": 1}}, r"low 5 is above high 1"),
        ({"search.train.d_coef": {"low": 0, "high": 1, "log": True}}, r"log = true needs low above 0"),
        (
            {"search.train.d_coef": {"low": 0.1, "hihg": 1}},
            r"unknown key search\.train\.d_coef\.hihg; did you mean search\.train\.d_coef\.high\?",
        ),
        ({"search.train.d_coef": {"low": 0.1, "high": float("inf")}}, r"must be finite"),
        ({"search.train.d_coef": {"low": 0.1, "high": 1, "step": 0}}, r"step 0 must be above 0"),
        ({"search.train.batch_size": {"low": 4.5, "high": 16}}, r"takes whole numbers"),
        ({"search.train.batch_size": {"choices": [8, -2]}}, r"train\.batch_size -2"),
        ({"trial.samples": 3}, r"4 evaluations in 3 samples: use fewer"),
        ({"study.metric": "loss"}, r"study\.metric"),
        ({"study.workload": "tests.toy:Toys"}, r"no class Toys"),
        ({"study.workload": "tests.toyy:Toy"}, r"no module tests\.toyy"),
        ({"study.name": "../up"}, r"study\.name"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[study", "not valid TOML"),
        (TOML.replace("[search]", "[serach]"), "search is missing|unknown key serach"),
        (TOML + '\n[sampler]\nname = "tpe"\n[prunner]\nname = "x"', r"unknown key prunner; did you mean pruner\?"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        StudySpec.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study spec"):
        StudySpec.load(tmp_path / "none.toml")


def test_a_field_that_takes_fractions_is_searched_in_fractions(tmp_path: Path) -> None:
    spec = build(**{"train.d_coef": 1.5, "search.train.d_coef": {"low": 1, "high": 10}})
    trial = optuna.create_study().ask()
    suggest(trial, spec)
    assert isinstance(trial.distributions["train.d_coef"], optuna.distributions.FloatDistribution)
    whole = build(**{"search.train.batch_size": {"low": 4.0, "high": 16.0}})
    assert isinstance(suggest(optuna.create_study().ask(), whole)["train.batch_size"], int)


def test_overrides_replace_values_and_lengths(tmp_path: Path) -> None:
    overrides = dict(map(parse_override, ["train.batch_size=16", "full.steps=1_000", "workload.digest=other"]))
    spec = StudySpec.load(write(tmp_path), overrides)
    setup = full_setup(spec, {})
    assert setup.config.batch_size == 16 and setup.config.num_steps == 1000
    assert setup.workload.model_dump()["digest"] == "other"


@pytest.mark.parametrize("text", ["batch_size=8", "train.batch_size"])
def test_an_override_needs_section_key_and_value(text: str) -> None:
    with pytest.raises(UserError, match=r"section\.key=value"):
        parse_override(text)


def test_a_trial_is_a_prefix_of_its_full_run() -> None:
    spec = build(**{"train.schedule": "cosine"})
    params = {"train.batch_size": 16, "train.d_coef": 0.5}
    trial, full = trial_setup(spec, params).config, full_setup(spec, params).config
    assert trial.identity() == full.identity()
    assert (trial.samples, full.samples) == (160, 480)
    assert trial.schedule_steps == full.num_steps == 30


@pytest.mark.parametrize("unit", ["samples", "steps", "seconds"])
def test_the_grid_is_the_same_for_all_batch_sizes(unit: str) -> None:
    changed = values()
    changed["trial"] = {unit: 160, "evaluations": 4}
    spec = StudySpec.build(changed, base_dir=Path.cwd())
    for batch_size in (4, 16):
        config = trial_setup(spec, {"train.batch_size": batch_size}).config
        assert (config.eval_every, config.eval_unit) == (40, unit)


def test_validation_costs_at_most_a_tenth_of_a_trial() -> None:
    config = trial_setup(build(**{"trial.samples": 16_000, "trial.evaluations": 8}), {}).config
    assert config.val_samples is not None
    assert 8 * config.val_samples / 3 <= 0.1 * 16_000
    assert trial_setup(build(**{"train.val_samples": 7}), {}).config.val_samples == 7


WORKLOAD = """
from pathlib import Path
from trainer import DataPath
from tests.toy import Toy

class Mine(Toy):
    corpus: DataPath
"""


def test_a_workload_is_found_beside_its_spec_and_its_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "workload_beside.py").write_text(WORKLOAD)
    text = TOML.replace("tests.toy:Toy", "workload_beside:Mine").replace("num_train = 128", 'corpus = "data/x"')
    spec = StudySpec.load(write(tmp_path, text))
    assert spec.to_dict()["workload"] == {"corpus": str(tmp_path / "data/x")}
