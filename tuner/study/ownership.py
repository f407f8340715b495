"""Which process a trial belongs to: its owner shows that it lives, and a trial whose owner does not is taken over.

Without a lock in the storage two machines may take a trial over at once. Each writes a token of its own, and the last
one stays: the other finds a foreign token at its next sign of life, and stops.
"""

from __future__ import annotations

import logging
import math
import platform
import time
import uuid

import optuna

from tuner.study.keys import write_unopened_trial
from tuner.study.optuna_internals import storage_of, stored_trial
from tuner.study.record import TrialRecord
from tuner.study.storage import database_time

BEAT_S = 60.0
"""Seconds between two signs of life, which are given at steps and at the batches of a validation."""
LOST_AFTER_S = 900.0
"""Seconds without one after which any machine takes a trial over. Compilation and reading the data give none."""

log = logging.getLogger(__name__)


class Owner:
    """This process as the owner of an open trial."""

    def __init__(self, study: optuna.Study, number: int) -> None:
        """Take the trial."""
        self._study, self.number, self._token = study, number, uuid.uuid4().hex
        self._signed_at = time.monotonic()
        self.lost_to: str | None = None
        """The machine that has taken the trial."""
        now = database_time(storage_of(study))
        write_unopened_trial(study, number, host=platform.node(), owner=self._token, alive=now)

    def is_lost(self, *, at_once: bool = False) -> bool:
        """Whether another process has taken the trial; also shows that this one lives.

        Args:
            at_once: Ask the storage, also if it was asked less than `BEAT_S` ago.
        """
        if self.lost_to is not None or not (at_once or time.monotonic() - self._signed_at >= BEAT_S):
            return self.lost_to is not None
        self._signed_at = time.monotonic()
        trial = TrialRecord.read(stored_trial(self._study, self.number))
        if trial.owner != self._token or trial.is_finished:
            self.lost_to = trial.host or "another process"
            log.warning("trial %d was taken over by %s: it stops here", self.number, self.lost_to)
            return True
        write_unopened_trial(self._study, self.number, alive=database_time(storage_of(self._study)))
        return False


def is_abandoned(trial: TrialRecord, now: float) -> bool:
    """Whether an open trial of another machine has shown no life for too long.

    Args:
        now: Of the storage's clock.
    """
    # A trial of an early version never shows any: `tuner doctor` names those.
    silent = now - (math.inf if trial.alive is None else trial.alive)
    if trial.state != "running" or trial.host == platform.node() or silent <= LOST_AFTER_S:
        return False
    log.warning("trial %d shows no life on %s any more: it continues here", trial.number, trial.host)
    return True
