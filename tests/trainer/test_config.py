import pytest
from pydantic import ValidationError

from trainer import TrainConfig
from trainer.config import differences, identity_fields
from trainer.optimizers import has_same_rates, schedule_factor


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


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 60, 1000])
def test_decay_starts_at_the_first_lowered_rate(steps: int, fraction: float) -> None:
    config = TrainConfig(steps=steps, schedule="wsd", decay_fraction=fraction)
    lowered = [step for step in range(steps + 1) if schedule_factor(config, step) < 1]
    assert config.decay_start == lowered[0]


def test_schedules_with_the_same_rates_so_far() -> None:
    constant, short = TrainConfig(steps=100), TrainConfig(steps=100, schedule="wsd")
    long, cosine = TrainConfig(steps=200, schedule="wsd"), TrainConfig(steps=100, schedule="cosine")
    start = short.decay_start
    assert start == 81
    for other in (constant, long, TrainConfig(seconds=5)):
        assert has_same_rates(short, other, start) and not has_same_rates(short, other, start + 1)
    assert not has_same_rates(cosine, constant, 2) and has_same_rates(cosine, cosine, 100)


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
