"""Finding the workload that a spec names, and the place in its code where an exception comes from."""

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

NOT_THE_USERS = [Path(__file__).parent.parent, Path(trainer.__path__[0])]
"""Folders of code that no user of this package wrote."""
NOT_THE_USERS += [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def load_workload_class(name: str, base_dir: Path) -> type[Workload]:
    """Import "module:Class" from the folder of the study.toml or from what is installed.

    Raises:
        UserError: There is no such module or class, it can't be imported, its name is taken, or it is no Workload.
    """
    module_name, _, class_name = name.partition(":")
    # At the end: a file of the study must not stand in for somebody else's module of the same name.
    if str(base_dir) not in sys.path:
        sys.path.append(str(base_dir))
    module = _import(name, module_name, base_dir)
    beside = base_dir / f"{module_name.partition('.')[0]}.py"
    origin = Path(getattr(module, "__file__", None) or "")  # a notebook's __main__ has none
    # A copy of the study, or one that goes on in another folder, has the same files: either may be used.
    is_copy = origin.is_file() and folder_digest(origin.parent) == folder_digest(base_dir)
    if beside.exists() and origin.parent != base_dir and not is_copy:
        raise UserError(
            f"study.workload {name}: {origin} has the same name as {beside}, and they or the files beside them differ: "
            "rename the latter, or remove it where the study has moved away from there."
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
                f"study.workload {name}: it needs the package {error.name} ({raised_at(error)}): install it."
            ) from error
        moved = "where the study has moved, run tuner launch with its study.toml, which stores the new place"
        remedy = f"correct the name; or, {moved}" if base_dir.is_dir() else f"that folder is gone: {moved}"
        raise UserError(
            f"study.workload {name}: no module {module_name} in {base_dir} or among the installed: {remedy}."
        ) from error
    except UserError:
        raise
    except Exception as error:
        # The user's file runs here for the first time: whatever it raises is his to mend, and our code is not in it.
        raise UserError(f"study.workload {name}: {described(error)}: correct it there.") from error


def folder_digest(folder: Path) -> str:
    """Of the Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("[!.]*.py")):
        # What can't be read is not imported either: a folder, a dangling link.
        with suppress(OSError):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def described(error: BaseException) -> str:
    """An exception in one line: its type, its message, and where it comes from."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    what = " ".join(message.split())
    return f"{type(error).__name__}{f': {what}' if what else ''} ({raised_at(error)})"


def raised_at(error: BaseException) -> str:
    """`file, line N: what stands there` of the innermost of the user's own lines that an exception passed through, or
    of the innermost line of all where it passed through none."""
    if isinstance(error, SyntaxError) and error.filename:
        return _place(error.filename, error.lineno, error.text)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(map(Path(frame.filename).is_relative_to, NOT_THE_USERS))]
    frame = (own or frames)[-1]
    return _place(frame.filename, frame.lineno, frame.line)


def _place(file: str, line: int | None, text: str | None) -> str:
    return f"{file}, line {line}" + (f": {text.strip()}" if text else "")
