"""The tuning service: `launch` a study, look at it, `promote` its best trial to the full run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.api import confirm, launch, promote
    from tuner.spec.study_toml import StudySpec
    from tuner.study.launch import open_study
    from tuner.study.tracked_run import Runtime

# Imported on first use: the command line prints its help without importing torch.
_MODULES = {
    "Runtime": "study.tracked_run",
    "StudySpec": "spec.study_toml",
    "confirm": "api",
    "launch": "api",
    "open_study": "study.launch",
    "promote": "api",
}

__all__ = ["Runtime", "StudySpec", "confirm", "launch", "open_study", "promote"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(f"tuner.{_MODULES[name]}"), name)
