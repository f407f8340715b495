"""`tuner new`: copies `tuner/template/`, a small study that runs at once, under the study's name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from trainer.errors import UserError

TEMPLATE = Path(__file__).parent / "template"
FILES = {
    "workload.py": "the model, its data and its loss",
    "study.toml": "the search space, and the length of the trials",
}
NAME = "my-study"
"""The study's name in the template."""


def new(folder: Path) -> str:
    """Write the template into the new folder `folder`. Returns a text: its files and the next command.

    The folder's name becomes the study's.

    Raises:
        UserError: The name can't be a study's, or the folder exists or can't be created.
    """
    name = folder.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"{folder}: the folder's name becomes the study's: use letters, digits, '.', '_' and '-', and begin with "
            "a letter or a digit."
        )
    if name.endswith(".full"):
        raise UserError(f"{folder}: the ending .full is that of a study's full runs: choose another name.")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} exists already: choose another name.") from None
    except OSError as error:
        raise UserError(f"{folder} can't be created ({error.strerror}): choose another place.") from None
    try:
        for file in FILES:
            text = (TEMPLATE / file).read_text(encoding="utf-8")
            (folder / file).write_text(text.replace(NAME, name), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder} can't be written to ({error.strerror}): choose another place.") from None
    files = "\n".join(f"{folder / file}: {content}" for file, content in FILES.items())
    return f"{files}\nNext: cd {shlex.quote(str(folder))} && tuner launch study.toml && tuner promote {name}"
