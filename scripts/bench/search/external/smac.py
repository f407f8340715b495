"""SMAC3's multi-fidelity facade: Hyperband, whose configurations a random forest proposes.

    python -m venv data/environments/smac
    data/environments/smac/bin/pip install smac==2.4.1

Set up for few trials: three random ones after the baseline, and a forest that is fitted again for each proposal.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import smac
from ConfigSpace import Configuration, ConfigurationSpace, Float, OrdinalHyperparameter
from smac.runhistory.dataclasses import TrialValue

from scripts.bench.search.external import client

NUM_RANDOM = 3
"""SMAC's default is 20, or a quarter of all: more than some searches have."""


def search(facade: str, directory: str) -> None:
    """Budgets are in units of the first point; fractions are cut off."""
    described = client.read_line()
    unit = described["points"][0]
    space = ConfigurationSpace(seed=described["seed"])
    space.add(OrdinalHyperparameter("batch_size", described["batch_sizes"]))
    space.add(Float("d_coef", tuple(described["d_coefs"]), log=True))
    scenario = smac.Scenario(
        space,
        output_directory=directory,
        deterministic=True,
        n_trials=1000,
        min_budget=1,
        max_budget=described["longest"] // unit,
        seed=described["seed"],
    )
    kind = getattr(smac, facade)
    baseline = Configuration(space, described["baseline"])
    optimizer = kind(
        scenario,
        lambda config, seed, budget: None,
        initial_design=kind.get_initial_design(scenario, n_configs=NUM_RANDOM, additional_configs=[baseline]),
        config_selector=kind.get_config_selector(scenario, retrain_after=1),
        overwrite=True,
    )
    while True:
        trial = optimizer.ask()
        config = read_config(trial.config)
        loss = client.train(config, int(trial.budget) * unit)[-1][1]
        optimizer.tell(trial, TrialValue(loss))
        if incumbent := optimizer.intensifier.get_incumbent():
            client.promote(read_config(incumbent))


def read_config(configuration: Mapping[str, Any]) -> client.Config:
    """As JSON can write it."""
    return {"batch_size": int(configuration["batch_size"]), "d_coef": float(configuration["d_coef"])}


if __name__ == "__main__":
    logging.disable()
    with TemporaryDirectory() as directory:
        search(sys.argv[1], directory)
