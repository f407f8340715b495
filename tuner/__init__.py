"""The tuning service: `launch` a study, look at it, `promote` its best trial to the full run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.launch import launch as launch
    from tuner.promote import promote as promote
    from tuner.run import Runtime as Runtime
    from tuner.spec import StudySpec as StudySpec
