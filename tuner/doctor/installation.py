"""What is installed: Python, the packages that runs depend on, compilers, and the clock."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import trainer
from tuner.doctor.check import Check, State

PACKAGES = ("torch", "optuna", "prodigyopt", "optuna-dashboard", "aim")
OPTIONAL = {"optuna-dashboard", "aim"}
"""Another version of them may cost a page or a chart, never a run."""
THIS_PACKAGE_IS_OF = 2025
CLOCK_SKEW_S = 300.0


def check_python(found: tuple[int, ...] = sys.version_info[:3]) -> Check:
    name = ".".join(map(str, found))
    if found[:2] in ((3, 11), (3, 12)):
        return Check("python", "ok", name)
    return Check("python", "fail", f"{name}: Aim has no package for it", "use Python 3.11 or 3.12")


def check_own() -> Check:
    """Which version of this package looks."""
    return Check("prodigy-tuner", "ok", version("prodigy-tuner"))


def check_trainer(trainer_file: str | None = trainer.__file__, own_file: str = __file__) -> Check:
    """Whether the imported package `trainer` is the one beside `tuner`: another distribution has one of that name."""
    if trainer_file is not None and Path(trainer_file).parents[1] == Path(own_file).parents[2]:
        return Check("trainer", "ok", str(Path(trainer_file).parent))
    remedy = "pip uninstall coqui-tts-trainer, or use a fresh environment"
    return Check("trainer", "fail", f"{trainer_file} is imported, which is of another distribution", remedy)


def check_packages(needed: Iterable[str] | None = None) -> Iterator[Check]:
    """Whether the versions are those that this package was made for: one check each.

    Args:
        needed: Requirements such as "torch~=2.13.0". Default: those that this package was installed with.
    """
    lines = needed if needed is not None else requires("prodigy-tuner") or []
    for requirement in map(Requirement, lines):
        if requirement.name not in PACKAGES or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        name, remedy = requirement.name, f"pip install '{requirement}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, "fail", "not installed", remedy)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check(name, "ok", found)
        else:
            state: State = "warn" if name in OPTIONAL else "fail"
            yield Check(name, state, f"{found}; made for {requirement.specifier}", remedy)


def check_compiler(environment: Mapping[str, str] | None = None) -> Check:
    """Whether there is a C compiler, found as the Prodigy kernels find theirs."""
    environment = os.environ if environment is None else environment
    path = environment.get("PATH", "")
    chosen = shlex.split(environment.get("CC", ""))[:1]
    for name in chosen or ["cc", "gcc", "clang"]:
        if found := shutil.which(name, path=path):
            return Check("compiler", "ok", found)
    what = f"$CC names {chosen[0]}, which is not there" if chosen else "no C compiler (cc, gcc or clang)"
    return Check(
        "compiler",
        "warn",
        f"{what}: no torch.compile, and Prodigy's step takes several times as long",
        "correct $CC" if chosen else "install gcc",
    )


def check_compile(
    kind: str, environment: Mapping[str, str] | None = None, *, triton: bool | None = None, headers: Path | None = None
) -> Check:
    """Whether torch.compile finds what it needs.

    Args:
        kind: "cuda" or "cpu".
        triton, headers: What is installed, in place of what is found here.
    """
    environment = os.environ if environment is None else environment
    headers = headers or Path(sysconfig.get_path("include"))
    triton = importlib.util.find_spec("triton") is not None if triton is None else triton
    path = environment.get("PATH", "")
    if kind == "cuda":
        if not triton:
            return _no_compile("Triton is not installed", "install torch's CUDA build, which brings it")
        names, remedy, what = ["cc", "gcc", "clang"], "install gcc", "Triton and "
    else:
        names, remedy, what = [environment.get("CXX", "g++"), "clang++"], "install g++", ""
    compiler = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if compiler is None:
        return _no_compile(f"no compiler ({' or '.join(names)})", remedy)
    # What it writes for Python is C code that includes them.
    if not (headers / "Python.h").is_file():
        return _no_compile(f"{headers} has no Python.h", "install Python's headers (the package python3-dev)")
    return Check("torch.compile", "ok", f"{what}{compiler}")


def _no_compile(what: str, remedy: str) -> Check:
    return Check("torch.compile", "warn", f"{what}: runs are not compiled", remedy)


def check_clock(run_root: Path, now: float | None = None) -> Check:
    """Whether the clock stands behind what it has written: times of trials and runs would be in disorder."""
    now = time.time() if now is None else now
    here = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    remedy = "set the system's clock (timedatectl set-ntp true)"
    if time.gmtime(now).tm_year < THIS_PACKAGE_IS_OF:
        return Check("clock", "warn", f"it is {here} by this machine's clock", remedy)
    # Two levels: studies and their runs. Millions of files below would take their time.
    newest = max(((_mtime(path), path) for path in (*run_root.glob("*"), *run_root.glob("*/*"))), default=None)
    if newest is not None and newest[0] > now + CLOCK_SKEW_S:
        hours = (newest[0] - now) / 3600
        return Check("clock", "warn", f"it is {here}, and {newest[1]} was written {hours:.1f} h later", remedy)
    return Check("clock", "ok", here)


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # gone meanwhile, or not to be looked at
        return 0.0
