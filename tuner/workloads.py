"""Finding the workload that a spec names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.workload import Workload


def load_workload_class(name: str, base_dir: Path) -> type[Workload]:
    """Import "module:Class" from the folder of the study.toml or from what is installed.

    Raises:
        UserError: There is no such module or class, its name is taken, or it is no Workload.
    """
    module_name, _, class_name = name.partition(":")
    # At the end: a file of the study must not stand in for somebody else's module of the same name.
    if str(base_dir) not in sys.path:
        sys.path.append(str(base_dir))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"study.workload {name}: it needs the package {error.name}: install it.") from error
        raise UserError(
            f"study.workload {name}: no module {module_name} in {base_dir} or among the installed."
        ) from error
    beside = base_dir / f"{module_name.partition('.')[0]}.py"
    origin = Path(getattr(module, "__file__", None) or "")  # a notebook's __main__ has none
    if beside.exists() and origin.parent != base_dir:
        raise UserError(f"study.workload {name}: {origin} has the same name as {beside}: rename the latter.")
    workload_class = getattr(module, class_name, None)
    if not (isinstance(workload_class, type) and issubclass(workload_class, Workload)):
        raise UserError(f"study.workload {name}: {origin} has no class {class_name} that is a trainer.Workload.")
    return workload_class
