"""The training function: `train(workload, config, run_dir=...)`. Knows nothing of studies and trials."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import Role, TrainConfig
    from trainer.errors import DamagedSample, UserError
    from trainer.evaluation import Evaluation
    from trainer.loop import Diverged, TrainResult, train
    from trainer.workload import Batch, DataPath, Dataset, Workload

# Imported on first use: the command line must not wait for torch to print its help.
_MODULES = {
    "Batch": "workload",
    "DamagedSample": "errors",
    "DataPath": "workload",
    "Dataset": "workload",
    "Diverged": "loop",
    "Evaluation": "evaluation",
    "Role": "config",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "UserError": "errors",
    "Workload": "workload",
    "train": "loop",
}

__all__ = [
    "Batch",
    "DamagedSample",
    "DataPath",
    "Dataset",
    "Diverged",
    "Evaluation",
    "Role",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "Workload",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(f"trainer.{_MODULES[name]}"), name)
