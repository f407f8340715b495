"""Imports the workload that a spec names, and locates errors in its code."""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import trainer
from trainer.errors import UserError
from trainer.workload import Workload

LIBRARY_FOLDERS = [Path(__file__).parent.parent, Path(trainer.__path__[0])]
"""Folders without code of the user."""
LIBRARY_FOLDERS += [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def load_workload_class(name: str, base_dir: Path) -> type[Workload]:
    """Import "module:Class" from the folder of the study.toml, or from an installed package.

    Raises:
        UserError: The module or class does not exist, can't be imported or is no Workload, or its name is taken.
    """
    module_name, _, class_name = name.partition(":")
    # At the end: a file of the study must not shadow an installed module.
    if str(base_dir) not in sys.path:
        sys.path.append(str(base_dir))
    module = _import(name, module_name, base_dir)
    beside = base_dir / f"{module_name.partition('.')[0]}.py"
    origin = Path(getattr(module, "__file__", None) or "")  # a notebook's __main__ has none
    # A copied or moved study has the same files: either may be used.
    is_copy = origin.is_file() and folder_digest(origin.parent) == folder_digest(base_dir)
    if beside.exists() and origin.parent != base_dir and not is_copy:
        raise UserError(
            f"study.workload {name}: {origin} has the same name as {beside}, and they or the files beside them differ: "
            "rename the latter, or remove it if the study has moved."
        )
    workload_class = getattr(module, class_name, None)
    if not (isinstance(workload_class, type) and issubclass(workload_class, Workload)):
        raise UserError(f"study.workload {name}: {origin} has no class {class_name} that is a trainer.Workload.")
    return workload_class


def _import(name: str, module_name: str, base_dir: Path) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"study.workload {name}: it needs the package {error.name} ({locate_error(error)}): install it."
            ) from error
        moved = "if the study has moved, run tuner launch with its study.toml, which stores the new folder"
        remedy = f"correct the name; or, {moved}" if base_dir.is_dir() else f"that folder does not exist: {moved}"
        raise UserError(
            f"study.workload {name}: no module {module_name} in {base_dir} or in an installed package: {remedy}."
        ) from error
    except UserError:
        raise
    except Exception as error:
        # Importing runs the user's file, which may raise anything.
        raise UserError(f"study.workload {name}: {describe_error(error)}: correct it there.") from error


def folder_digest(folder: Path) -> str:
    """Digest of the Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("[!.]*.py")):
        # An unreadable entry (a folder, a dangling link) is not imported either.
        with suppress(OSError):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe_error(error: BaseException) -> str:
    """An exception in one line: type, message and location."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(message.split())
    return f"{type(error).__name__}{f': {text}' if text else ''} ({locate_error(error)})"


def locate_error(error: BaseException) -> str:
    """`file, line N: source` of the innermost line of the user's code in the traceback, else of its innermost line."""
    if isinstance(error, SyntaxError) and error.filename:
        return _place(error.filename, error.lineno, error.text)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(map(Path(frame.filename).is_relative_to, LIBRARY_FOLDERS))]
    frame = (own or frames)[-1]
    return _place(frame.filename, frame.lineno, frame.line)


def _place(file: str, line: int | None, text: str | None) -> str:
    return f"{file}, line {line}" + (f": {text.strip()}" if text else "")
