"""Malformed specs, manifests and command lines: one line each, or they are right."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path

from studies.indextts2.manifest import open_manifest
from tests.attacks.full.common import Job, Result
from tests.tuner.studies_for_tests import TOML
from trainer import UserError
from tuner.cli import main
from tuner.spec.study_toml import StudySpec

VALUES = [
    "1",
    "-1",
    "0",
    "1e400",
    "nan",
    "9" * 30,
    '"text"',
    "[]",
    "{}",
    "[[1]]",
    "true",
    '""',
    '"\\u0000"',
    "1_0",
    "}",
    "=",
]
RECORD = {"id": "a", "text_ids": "a.npy", "codes": "b.npy", "speaker": "c.npy", "emotion": "d.npy", "text_len": 3}
COMMANDS = [
    "status",
    "report",
    "average",
    "export",
    "new",
    "promote",
    "evaluate",
    "notify",
    "worker",
    "storage",
    "doctr",
]
ARGUMENTS = [
    "",
    "toy",
    "none.toml",
    "study.toml",
    ".",
    "/",
    "--to",
    "--json",
    "--storage",
    "sqlite:///none.db",
    "--all",
    "--steps",
    "-1",
    "9" * 30,
    "--trial",
    "--set",
    "=",
    "a.b=c",
    "--by",
    "한국어",
    "\udcff",
    "--checkpoint",
    "x" * 300,
]


def mutate(text: str, generator: random.Random) -> str:
    """Change a value, a line, or some characters of a text."""
    lines = text.splitlines()
    for _ in range(generator.choice([1, 1, 2, 5])):
        at = generator.randrange(len(lines))
        kind = generator.randrange(4)
        if kind == 0:
            lines[at] = f"{lines[at].partition('=')[0]}= {generator.choice(VALUES)}"
        elif kind == 1:
            lines[at] = ""
        elif kind == 2:
            lines.insert(at, lines[generator.randrange(len(lines))])
        elif lines[at]:
            place = generator.randrange(len(lines[at]))
            lines[at] = (
                lines[at][:place] + chr(generator.choice([0, 34, 91, 123, 0x1F600, 44])) + lines[at][place + 1 :]
            )
    return "\n".join(lines)


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    output, errors, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    try:
        sys.argv = ["tuner", *arguments]
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = before
    return code, output.getvalue(), errors.getvalue()


def wrong_input(job: Job) -> Result:
    result, generator = Result(), random.Random(0)
    os.chdir(job.folder)
    place = Path("study.toml")
    manifest = "\n".join(json.dumps({**RECORD, "id": str(number)}) for number in range(4))
    for number in range(job.size):
        if not job.in_time:
            break
        kind, text, arguments = number % 3, "", []
        try:
            if kind == 0:
                text = mutate(TOML, generator)
                place.write_text(text, errors="surrogatepass")
                StudySpec.load(place)
            elif kind == 1:
                text = mutate(manifest, generator)
                (job.folder / f"m{number}.jsonl").write_text(text)
                open_manifest(f"m{number}.jsonl")
            else:
                arguments = [generator.choice(COMMANDS), *generator.choices(ARGUMENTS, k=generator.randrange(5))]
                code, output, errors = call(arguments)
                # A group of commands without one of them prints its help.
                is_short = len(errors.strip().splitlines()) == 1 or (arguments == ["storage"] and "Usage: " in output)
                result.check(code == 0 or (code == 2 and is_short), f"{arguments}: {code}, {errors[:200]}")
        except UserError as error:
            result.count("refused in one line")
            result.check("\n" not in str(error), f"{text[:200]}: {error}")
        except Exception as error:
            result.failures.append(f"{type(error).__name__} {str(error)[:100]}: {arguments or text[:400]!r}")
        result.attempts += 1
    os.chdir("/")
    return result
