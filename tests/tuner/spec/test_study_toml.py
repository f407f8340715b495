from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.studies_for_tests import TOML, build, values, write
from trainer import UserError
from trainer.optimizers import has_same_rates
from tuner.spec.comparison import compare_specs
from tuner.spec.overrides import parse_override
from tuner.spec.setups import baseline_params, full_setup, suggest, trial_setup, try_params
from tuner.spec.study_toml import StudySpec


def test_both_spellings_of_a_searched_field_are_the_same(tmp_path: Path) -> None:
    spec = StudySpec.load(write(tmp_path))
    assert list(spec.search) == ["train.batch_size", "train.d_coef"]
    assert baseline_params(spec) == {"train.batch_size": 8, "train.d_coef": 1.0}


TRIES = """
[[search.try]]
"train.batch_size" = 16
"train.d_coef" = 0.3
[[search.try]]
train.d_coef = 2
"""


def test_settings_to_try_take_the_rest_from_the_baseline(tmp_path: Path) -> None:
    path = write(tmp_path, TOML.replace("[trial]", f"{TRIES}[trial]"))
    spec = StudySpec.load(path)
    assert list(spec.search) == ["train.batch_size", "train.d_coef"]
    expected = [{"train.batch_size": 16, "train.d_coef": 0.3}, {"train.batch_size": 8, "train.d_coef": 2}]
    assert try_params(spec) == expected
    assert try_params(StudySpec.build(spec.to_dict(), base_dir=spec.base_dir)) == expected
    assert compare_specs(spec, StudySpec.load(write(tmp_path))) == []
    assert StudySpec.load(write(tmp_path, path.read_text() + TRIES), search=False).tries == ()


@pytest.mark.parametrize(
    ("tries", "message"),
    [
        ({"train.d_coef": 0.3}, r"search\.try: write each entry under a heading \[\[search\.try\]\]"),
        ([3], r"search\.try: write each entry"),
        ([{"train.d_coeff": 0.3}], r"search\.try 1: unknown key train\.d_coeff; did you mean train\.d_coef\?"),
        ([{"train.lr": 0.3}], r"search\.try 1: unknown key train\.lr"),
        ([{"train.d_coef": 0.3}, {"train.d_coef": 20}], r"search\.try 2: train\.d_coef = 20 is outside .* widen"),
        ([{"train.d_coef": "0.3"}], r"search\.try 1: train\.d_coef = '0\.3' is outside"),
        ([{"train.batch_size": 5}], r"search\.try 1: train\.batch_size = 5 is outside its search space"),
        ([{"train.batch_size": True}], r"search\.try 1: train\.batch_size = True is outside"),
        ([{"train": {"batch_size": {"choices": 4}}}], r"search\.try 1: unknown key train\.batch_size\.choices"),
        ([{"train.batch_size": 8}], r"search\.try 1: it is the same as the baseline; remove it, or change a value"),
        ([{}], r"search\.try 1: it is the same as the baseline"),
        ([{"train.d_coef": 2}, {"train.batch_size": 8, "train.d_coef": 2.0}], r"2: it is the same as search\.try 1"),
    ],
)
def test_mistake_in_a_setting_to_try_is_one_line(tries: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(**{"search.try": tries})
    assert "\n" not in str(error.value)


def test_whole_number_to_try_is_one() -> None:
    search = {"search.train.batch_size": {"low": 4, "high": 16}, "trial.samples": 800, "full.samples": 4000}
    (params,) = try_params(build(**search, **{"search.try": [{"train.batch_size": 4.0}]}))
    assert repr(params["train.batch_size"]) == "4"
    with pytest.raises(UserError, match=r"batch_size = 4\.5 is outside"):
        build(**search, **{"search.try": [{"train.batch_size": 4.5}]})


def test_tries_are_written_below_search(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key tries; write its entries as \[\[search\.try\]\]"):
        StudySpec.load(write(tmp_path, TOML + "[[tries]]\ntrain.d_coef = 2\n"))


def test_spec_survives_a_round_trip_through_the_storage() -> None:
    spec = build()
    stored = StudySpec.build(spec.to_dict(), base_dir=spec.base_dir)
    assert compare_specs(spec, stored) == []
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
        ({"train.steps": 5}, r"train\.steps: the length, .* set in \[trial\] and \[full\]"),
        ({"train.eval_every": 5}, r"train\.eval_every: .*remove it from \[train\]"),
        ({"train.batch_size": 0}, r"train\.batch_size 0: input should be greater than 0"),
        ({"train.d_coef": 20.0}, r"train\.d_coef = 20\.0 is outside its search space"),
        ({"train.batch_size": 5}, r"train\.batch_size = 5 is outside its search space"),
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
        (
            {"search.train.d_coef": {"low": 0.1, "high": 10, "loog": True}},
            r"unknown key search\.train\.d_coef\.loog; did you mean search\.train\.d_coef\.log\?",
        ),
        (
            {"search.train.d_coef": {"choices": [1.0, 2.0], "log": True}},
            r"search\.train\.d_coef\.log: choices can.t be combined",
        ),
        ({"search.train.d_coef": {"choises": [1.0, 2.0]}}, r"did you mean search\.train\.d_coef\.choices\?"),
        ({"search.train.d_coef": [1.0, 2.0]}, r"search\.train\.d_coef \[1\.0, 2\.0\]: write it as \{ choices = "),
        ({"search.train.d_coef": {}}, r"search\.train\.d_coef\.low is missing"),
        ({"search.train.d_coef": {"low": 0.1, "high": float("inf")}}, r"d_coef\.high inf: input should be a finite"),
        ({"search.train.d_coef": {"low": 0.1, "high": 10**400}}, r"numbers end at 2\*\*63"),
        ({"search.train.d_coef": {"low": 1.0, "high": 1.0}}, r"low and high are both 1\.0: .*outside \[search\]"),
        ({"search.train.d_coef": {"choices": [1.0]}}, r"nothing to choose: .*outside \[search\]"),
        ({"search.train.d_coef": {"choices": []}}, r"nothing to choose"),
        ({"search.train.d_coef": {"choices": [1, 2, 1.0]}}, r"1\.0 is there twice; remove one"),
        ({"search.train.d_coef": {"choices": [1.0, float("inf")]}}, r"inf is not finite"),
        ({"search.train.d_coef": {"choices": [[1.0], 2.0]}}, r"\[1\.0\] is no number, text, true or false"),
        ({"search.train.d_coef": {"choices": "12"}}, r"choices \"12\": give a list"),
        ({"search.train.d_coef": {"low": "0.1", "high": 1}}, r"low \"0\.1\": a number is needed, without quotes"),
        ({"search.train.d_coef": {"low": True, "high": 5}}, r"low true: a number is needed"),
        ({"search.train.d_coef": {"low": 0.25, "high": 2.0, "step": 0.5}}, r"miss high 2\.0; use 1\.75 or 2\.25"),
        (
            {"search.train.d_coef": {"low": 0.25, "high": 2.25, "step": 0.5}},
            r"d_coef = 1\.0 is outside its search space",
        ),
        ({"search.train.lr": {"low": 0.1, "high": 1.0}}, r"train\.lr is not set: the baseline needs a value"),
        ({"search.train.use_bias_correction": {"low": 0, "high": 1}}, r"true or false.*use choices = \[true, false\]"),
        ({"search.train.optimizer": {"low": 0, "high": 1}}, r"not a number.*use choices = "),
        (
            {"search.train.optimizer": {"choices": ["prodigy", "sgd"]}},
            r"train\.optimizer \"sgd\": input should be 'prodigy'",
        ),
        ({"search.train.beta1": {"low": 0.5, "high": 1.0}}, r"beta1 1\.0 must be .*below 1"),
        ({"search.train.d_coef": {"low": 0.1, "high": 1, "step": 0}}, r"step 0 must be above 0"),
        ({"search.train.batch_size": {"low": 4.5, "high": 16}}, r"takes whole numbers"),
        ({"search.train.batch_size": {"low": 4, "high": 16, "step": 0.5}}, r"takes whole numbers, not step 0\.5"),
        (
            {"search.train.batch_size": {"low": 3, "high": 23, "step": 10}},
            r"batch_size = 8 is outside its search space",
        ),
        ({"search.train.batch_size": {"low": 0, "high": 16}}, r"train\.batch_size 0: input should be greater than 0"),
        ({"search.train.batch_size": {"low": 4, "high": 10**12}}, r"with a batch of 1000000000000 a trial sees"),
        ({"search.train.batch_size": {"choices": [8, 16.5]}}, r"train\.batch_size 16\.5"),
        ({"search.train.batch_size": {"choices": [8, "16"]}}, r"train\.batch_size \"16\": a number is needed"),
        ({"search.train.batch_size": {"choices": [8, True]}}, r"train\.batch_size true: a number is needed"),
        (
            {"search.train.batch_size": {"choices": [8, 32]}, "trial.samples": 40},
            r"trial\.samples 40: with a batch of 32 a trial sees 64, 60\.0% more; use samples = 128",
        ),
        (
            {"search.train.grad_accumulation": {"choices": [1, 3]}, "trial.samples": 240},
            r"with a batch of 48 \(batch_size x grad_accumulation\) the point of 60 samples is validated at 96",
        ),
        ({"train.d_coef": float("inf")}, r"train\.d_coef inf: input should be a finite number"),
        ({"train.batch_size": True}, r"train\.batch_size true: a number is needed"),
        ({"train.batch_size": "16"}, r"train\.batch_size \"16\": a number is needed, without quotes"),
        (
            {"train.micro_batch_size": "4"},
            r"train\.micro_batch_size \"4\": a number is needed.*, or input should be 'auto'",
        ),
        ({"trial.samples": 3}, r"4 evaluations in 3 samples: use fewer"),
        ({"study.metric": "loss"}, r"study\.metric"),
        ({"study.workload": "tests.toy:Toys"}, r"no class Toys"),
        ({"study.workload": "tests.toyy:Toy"}, r"no module tests\.toyy"),
        ({"study.name": "../up"}, r"study\.name"),
        ({"study.name": "a" * 101}, r"study\.name \"aaa.*\.\.\.: string should have at most 100 characters"),
        (
            {"study.name": "toy.full"},
            r"study\.name \"toy\.full\": .*reserved for the full runs of a study",
        ),
    ],
)
def test_mistake_is_one_line_with_its_key(changes: dict[str, Any], message: str) -> None:
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
def test_broken_file_is_one_line_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        StudySpec.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study spec"):
        StudySpec.load(tmp_path / "none.toml")


def test_fractional_field_is_searched_in_fractions(tmp_path: Path) -> None:
    fractions = {"train.d_coef": 1.5, "search.train.d_coef": {"low": 1, "high": 10}}
    spec = build(without="search.train.batch_size", **fractions)
    trial = optuna.create_study().ask()
    suggest(trial, spec)
    assert isinstance(trial.distributions["train.d_coef"], optuna.distributions.FloatDistribution)
    whole = build(**{"search.train.batch_size": {"low": 4.0, "high": 16.0}, "trial.samples": 800, "full.samples": 8000})
    assert isinstance(suggest(optuna.create_study().ask(), whole)["train.batch_size"], int)


def test_optional_whole_number_is_searched_in_whole_numbers() -> None:
    changes = {"search.train.slice_p": {"low": 1, "high": 11, "step": 5}}
    spec = build(without="search.train.batch_size", **changes)
    assert suggest(optuna.create_study().ask(), spec)["train.slice_p"] in (1, 6, 11)


def test_whole_numbers_do_where_fractions_are_expected_and_floats_that_are_whole() -> None:
    spec = build(**{"train.d_coef": 1, "trial.samples": 1.6e2})
    assert trial_setup(spec, {}).config.d_coef == 1.0 and spec.trial.samples == 160


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("pruner", {"name": "hyperband", "min_resource": 161}, r"min_resource 161 is beyond a trial's 160 samples"),
        ("pruner", {"name": "percentile", "percentile": float("nan")}, r"pruner: percentile nan: .*a finite number"),
        ("sampler", {"name": 3}, r"sampler\.name 3: input should be a valid string"),
    ],
)
def test_impossible_sampler_or_pruner_option_is_one_line(section: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        StudySpec.build({**values(), section: options}, base_dir=Path.cwd())
    assert "\n" not in str(error.value)


def test_empty_search_is_an_error_for_a_study_but_not_for_a_run(tmp_path: Path) -> None:
    path = write(
        tmp_path, "".join(line for line in TOML.splitlines(True) if "choices" not in line and "low" not in line)
    )
    with pytest.raises(UserError, match=r"\[search\] is empty"):
        StudySpec.load(path)
    assert StudySpec.load(path, search=False).search == {}


STUDIES = Path(__file__).parents[3] / "studies"


@pytest.mark.parametrize("name", ["indextts2", "korean_chars", "korean_demo"])
def test_studies_of_the_repository_are_without_mistake(name: str) -> None:
    assert StudySpec.load(STUDIES / name / "study.toml").search


def test_overrides_replace_values_and_lengths(tmp_path: Path) -> None:
    overrides = dict(map(parse_override, ["train.batch_size=16", "full.steps=1_000", "workload.digest=other"]))
    spec = StudySpec.load(write(tmp_path), overrides)
    setup = full_setup(spec, {})
    assert setup.config.batch_size == 16 and setup.config.num_steps == 1000
    assert setup.workload.model_dump()["digest"] == "other"
    words = dict(map(parse_override, ["train.precision=bf16", "train.tf32=off", "train.micro_batch_size=auto"]))
    config = full_setup(StudySpec.load(write(tmp_path), words), {}).config
    assert (config.precision, config.tf32, config.micro_batch_size) == ("bf16", False, "auto")


@pytest.mark.parametrize("text", ["batch_size=8", "train.batch_size"])
def test_override_needs_section_key_and_value(text: str) -> None:
    with pytest.raises(UserError, match=r"section\.key=value"):
        parse_override(text)


@pytest.mark.parametrize("schedule", ["none", "wsd", "cosine"])
def test_trial_is_a_prefix_of_its_full_run(schedule: str) -> None:
    spec = build(**{"full.schedule": schedule})
    params = {"train.batch_size": 16, "train.d_coef": 0.5}
    trial, full = trial_setup(spec, params).config, full_setup(spec, params).config
    assert trial.identity() == full.identity()
    assert (trial.samples, full.samples) == (160, 480)
    assert trial.schedule_steps == full.num_steps == 30
    assert has_same_rates(trial, full, 10)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"trial.samples": 400}, "with a batch of 8 a trial has 50 steps, and its full run decays from step 49 of 60"),
        ({"trial.samples": 400}, 'use at most 392 samples, a longer [full], or full.schedule = "none"'),
        ({"trial.samples": 424, "full.decay_fraction": 0.15}, "decays from step 52 of 60"),
    ],
)
def test_trial_that_reaches_into_the_decay_is_refused(changes: dict[str, Any], remedy: str) -> None:
    one_size: dict[str, Any] = {"without": "search.train.batch_size", "trial.evaluations": 1}
    with pytest.raises(UserError, match=re.escape(remedy)):
        build(**one_size, **changes)
    build(**one_size, **{**changes, "trial.samples": 392})
    build(**one_size, **{**changes, "full.schedule": "none"})


def test_schedule_belongs_to_the_full_run() -> None:
    with pytest.raises(UserError, match=r"train\.schedule: the schedule is set in \[full\]"):
        build(**{"train.schedule": "wsd"})
    with pytest.raises(UserError, match=r"a trial ends before the rate falls; set the schedule in \[full\]"):
        build(**{"search.train.decay_fraction": {"low": 0.1, "high": 0.5}})


def test_stored_spec_of_an_early_version_keeps_its_schedule() -> None:
    stored = values(**{"train.schedule": "cosine", "train.schedule_steps": 60})
    assert StudySpec.build(stored, base_dir=Path.cwd(), stored=True).full.schedule == "cosine"
    assert StudySpec.build(values(), base_dir=Path.cwd(), stored=True).full.schedule == "none"
    assert StudySpec.build(build().to_dict(), base_dir=Path.cwd(), stored=True).full.schedule == "wsd"


@pytest.mark.parametrize("unit", ["samples", "steps", "seconds"])
def test_grid_is_the_same_for_all_batch_sizes(unit: str) -> None:
    changed = values()
    changed["trial"], changed["full"]["samples"] = {unit: 160, "evaluations": 4}, 8_000
    spec = StudySpec.build(changed, base_dir=Path.cwd())
    for batch_size in (4, 16):
        config = trial_setup(spec, {"train.batch_size": batch_size}).config
        assert (config.eval_every, config.eval_unit) == (40, unit)


def test_validation_costs_at_most_a_tenth_of_a_trial() -> None:
    config = trial_setup(build(**{"trial.samples": 16_000, "trial.evaluations": 8, "full.samples": 64_000}), {}).config
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


def test_workload_is_found_beside_its_spec_and_its_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "workload_beside.py").write_text(WORKLOAD)
    text = TOML.replace("tests.toy:Toy", "workload_beside:Mine").replace("num_train = 128", 'corpus = "data/x"')
    spec = StudySpec.load(write(tmp_path, text))
    assert spec.to_dict()["workload"] == {"corpus": str(tmp_path / "data/x")}


def test_changed_copy_of_a_spec_has_its_own_baseline() -> None:
    spec = build()
    assert spec.baseline.batch_size == 8
    assert spec.model_copy(update={"train": {**spec.train, "batch_size": 16}}).baseline.batch_size == 16
