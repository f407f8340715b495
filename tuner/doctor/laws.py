"""Whether a workload keeps the three laws that make its trials comparable."""

from __future__ import annotations

from trainer.errors import DamagedSample
from trainer.laws import check_workload
from trainer.units import format_bytes
from trainer.workload import Workload
from tuner.doctor.check import Check

MAX_WEIGHTS = 1e9
"""Bytes of the model up to which it is built on the CPU for this."""


def check_laws(workload: Workload, weights: float) -> Check:
    """The check of the laws, on a few samples.

    Args:
        weights: Bytes of the model. Above `MAX_WEIGHTS` nothing is checked.
    """
    if weights > MAX_WEIGHTS:
        command = "call trainer.laws.check_workload with a smaller model"
        return Check("laws", "ok", f"not checked: the model has {format_bytes(weights)}; {command}")
    try:
        check_workload(workload)
    except AssertionError as error:
        return Check("laws", "fail", str(error), "correct the workload: its trials would not compare")
    except DamagedSample as error:
        return Check("laws", "warn", f"not checked: {error}", "repair or remove the sample")
    return Check("laws", "ok", "sums over samples, a fixed validation set, a fixed order of batches")
