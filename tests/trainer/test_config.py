import pytest
from pydantic import ValidationError

from trainer import TrainConfig
from trainer.config import differences, identity_fields


def test_unknown_key_is_an_error() -> None:
    with pytest.raises(ValidationError, match="d_coeff"):
        TrainConfig(steps=1, d_coeff=1.0)


@pytest.mark.parametrize("length", [{}, {"steps": 1, "samples": 8}, {"samples": 8, "seconds": 1.0}])
def test_length_is_exactly_one_of_three(length: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="exactly one of steps, samples and seconds"):
        TrainConfig(**length)


def test_samples_are_rounded_up_to_whole_steps() -> None:
    assert TrainConfig(samples=100, batch_size=8, grad_accumulation=3).num_steps == 5


def test_schedule_in_seconds_needs_a_horizon() -> None:
    with pytest.raises(ValidationError, match="schedule_steps"):
        TrainConfig(seconds=5, schedule="cosine")
    assert TrainConfig(seconds=5, schedule="cosine", schedule_steps=10).horizon == 10


def test_identity_ignores_length_and_cadences_and_keeps_what_is_computed() -> None:
    config = TrainConfig(steps=10)
    same = TrainConfig(samples=99, log_every=1, save_every=7, num_workers=3, eval_every=5)
    assert config.identity() == same.identity()
    assert differences("train", config.identity(), TrainConfig(steps=10, d_coef=2).identity()) == [
        "train.d_coef was 1.0 and is now 2.0"
    ]


def test_identity_holds_the_schedule_only_where_there_is_one() -> None:
    short, long = (TrainConfig(steps=steps, schedule="wsd").identity() for steps in (10, 20))
    assert short["schedule_steps"] == 10 and long["schedule_steps"] == 20
    assert TrainConfig(steps=10).identity()["schedule_steps"] is None


def test_every_field_has_a_decided_role() -> None:
    identity = set(identity_fields(TrainConfig))
    assert {"seed", "batch_size", "d_coef", "slice_p", "val_samples", "precision"} <= identity
    assert not identity & {"steps", "samples", "seconds", "log_every", "save_every", "num_workers", "device"}


@pytest.mark.parametrize(("name", "value"), [("d_coef", float("inf")), ("batch_size", True), ("warmup_steps", "2")])
def test_number_must_be_finite_and_unquoted(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        TrainConfig(steps=1, **{name: value})


def test_whole_number_keeps_its_type() -> None:
    config = TrainConfig(steps=2e5, d_coef=1, micro_batch_size="auto")
    assert config.steps == 200_000 and isinstance(config.steps, int)
    assert config.d_coef == 1.0 and isinstance(config.d_coef, float)
    with pytest.raises(ValidationError, match=r"2\*\*63"):
        TrainConfig(steps=10**400)
