"""Errors of a launch about data and losses that do not fit, before it creates a study."""

from __future__ import annotations

import optuna
import pytest

from tests.tuner.studies_for_tests import build
from trainer import UserError
from tuner.study.launch import open_study
from tuner.study.record import StudyRecord


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ("FewLengths", "Sized has 39 samples, and its lengths are 40"),
        ("EmptyValidation", "the validation split has no samples: name data"),
        ("UnknownLoss", "UnknownLoss.loss_weights names mel_loss, and its batches count token_loss"),
    ],
)
def test_bad_data_is_refused_before_a_study_is_created(workload: str, message: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    spec = build(**{"study.workload": f"tests.tuner.doctor.test_examine:{workload}"})
    with pytest.raises(UserError, match=message):
        open_study(spec, storage)
    assert not optuna.get_all_study_names(storage)


def test_study_stores_the_number_of_training_samples() -> None:
    study = open_study(build(), optuna.storages.InMemoryStorage())
    assert StudyRecord.read(study).num_samples == 128
