"""NePS's PriorBand, its default where a prior and a fidelity are given; the prior is the baseline.

    python -m venv data/environments/neps
    data/environments/neps/bin/pip install torch==2.13.0 neural-pipeline-search==0.17.0

Its ifBO downloads a model, and is not run.
"""

from __future__ import annotations

import logging
import sys

import neps
import numpy as np
import torch

from scripts.bench.search.external import client


def search(method: str) -> None:
    """Fidelities are in units of the first point, batch sizes by their order."""
    described, incumbent = client.read_line(), client.Incumbent()
    np.random.seed(described["seed"])  # NePS draws from the global generators
    torch.manual_seed(described["seed"])
    sizes, unit, baseline = described["batch_sizes"], described["points"][0], described["baseline"]

    class Space(neps.PipelineSpace):
        size = neps.Integer(0, len(sizes) - 1, prior=sizes.index(baseline["batch_size"]), prior_confidence="medium")
        d_coef = neps.Float(*described["d_coefs"], log=True, prior=baseline["d_coef"], prior_confidence="medium")
        level = neps.IntegerFidelity(1, described["longest"] // unit)

    optimizer = neps.AskAndTell(getattr(neps.algorithms, method)(Space(), sample_prior_first=True))
    while True:
        trial = optimizer.ask()
        config = {"batch_size": sizes[trial.config["size"]], "d_coef": trial.config["d_coef"]}
        optimizer.tell(trial, incumbent.train(config, trial.config["level"] * unit))


if __name__ == "__main__":
    logging.disable()
    search(sys.argv[1])
