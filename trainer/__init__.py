"""The training function: `train(workload, config, run_dir=...)`. Knows nothing of studies and trials."""

from trainer.config import Role, TrainConfig
from trainer.errors import DamagedSample, UserError
from trainer.evaluation import Evaluation
from trainer.loop import Diverged, TrainResult, train
from trainer.workload import Batch, DataPath, Dataset, Workload

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
