"""The tuning service: `launch` a study, look at it, `promote` its best trial to the full run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.full.confirmation import confirm
    from tuner.full.promotion import promote
    from tuner.launcher import launch
    from tuner.run import Runtime
    from tuner.spec import StudySpec

# Imported on first use: the command line must not wait for torch to print its help.
_HOMES = {
    "Runtime": "run",
    "StudySpec": "spec",
    "confirm": "full.confirmation",
    "launch": "launcher",
    "promote": "full.promotion",
}

__all__ = ["Runtime", "StudySpec", "confirm", "launch", "promote"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(f"tuner.{_HOMES[name]}"), name)
