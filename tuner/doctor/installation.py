"""The installation: Python, packages, compilers, and the clock."""

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
"""Another version of these may break a page or a chart, but no run."""
THIS_PACKAGE_IS_OF = 2025
CLOCK_SKEW_S = 300.0


def check_python(running: tuple[int, ...] = sys.version_info[:3]) -> Check:
    name = ".".join(map(str, running))
    if (3, 11) <= running[:2] <= (3, 14):
        return Check("python", "ok", name)
    return Check("python", "fail", f"{name} is not supported", "use Python 3.11 to 3.14")


def check_own() -> Check:
    """The version of this package."""
    return Check("prodigy-tuner", "ok", version("prodigy-tuner"))


def check_trainer(trainer_file: str | None = trainer.__file__, own_file: str = __file__) -> Check:
    """Whether the imported package `trainer` is this project's: another distribution has the same name."""
    if trainer_file is not None and Path(trainer_file).parents[1] == Path(own_file).parents[2]:
        return Check("trainer", "ok", str(Path(trainer_file).parent))
    remedy = "pip uninstall coqui-tts-trainer, or use a fresh environment"
    return Check("trainer", "fail", f"{trainer_file} is imported, which belongs to another distribution", remedy)


def check_packages(needed: Iterable[str] | None = None) -> Iterator[Check]:
    """Whether the versions meet this package's requirements: one check each.

    Args:
        needed: Requirements such as "torch~=2.13.0". Default: this package's.
    """
    lines = needed if needed is not None else requires("prodigy-tuner") or []
    for requirement in map(Requirement, lines):
        if requirement.name not in PACKAGES or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        name, remedy = requirement.name, f"pip install '{requirement}'"
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Check(name, "fail", "not installed", remedy)
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Check(name, "ok", installed)
        else:
            state: State = "warn" if name in OPTIONAL else "fail"
            yield Check(name, state, f"{installed}; this package needs {requirement.specifier}", remedy)


def check_compiler(environment: Mapping[str, str] | None = None) -> Check:
    """Whether there is a C compiler; the Prodigy kernels search for it in the same way."""
    environment = os.environ if environment is None else environment
    path = environment.get("PATH", "")
    chosen = shlex.split(environment.get("CC", ""))[:1]
    for name in chosen or ["cc", "gcc", "clang"]:
        if compiler := shutil.which(name, path=path):
            return Check("compiler", "ok", compiler)
    problem = f"$CC names {chosen[0]}, which does not exist" if chosen else "no C compiler (cc, gcc or clang)"
    return Check(
        "compiler",
        "warn",
        f"{problem}: no torch.compile, and Prodigy's step takes several times as long",
        "correct $CC" if chosen else "install gcc",
    )


def check_compile(
    kind: str, environment: Mapping[str, str] | None = None, *, triton: bool | None = None, headers: Path | None = None
) -> Check:
    """Whether torch.compile finds its compiler and headers.

    Args:
        kind: "cuda" or "cpu".
        triton, headers: Default: those of this machine.
    """
    environment = os.environ if environment is None else environment
    headers = headers or Path(sysconfig.get_path("include"))
    triton = importlib.util.find_spec("triton") is not None if triton is None else triton
    path = environment.get("PATH", "")
    if kind == "cuda":
        if not triton:
            return _no_compile("Triton is not installed", "install torch's CUDA build, which includes it")
        names, remedy, prefix = ["cc", "gcc", "clang"], "install gcc", "Triton and "
    else:
        names, remedy, prefix = [environment.get("CXX", "g++"), "clang++"], "install g++", ""
    compiler = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if compiler is None:
        return _no_compile(f"no compiler ({' or '.join(names)})", remedy)
    # Its generated C code includes Python.h.
    if not (headers / "Python.h").is_file():
        return _no_compile(f"{headers} has no Python.h", "install Python's headers (the package python3-dev)")
    return Check("torch.compile", "ok", f"{prefix}{compiler}")


def _no_compile(reason: str, remedy: str) -> Check:
    return Check("torch.compile", "warn", f"{reason}: runs are not compiled", remedy)


def check_clock(run_root: Path, now: float | None = None) -> Check:
    """Whether the clock is behind the times of existing files: times of trials and runs would be out of order."""
    now = time.time() if now is None else now
    here = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    remedy = "set the system's clock (timedatectl set-ntp true)"
    if time.gmtime(now).tm_year < THIS_PACKAGE_IS_OF:
        return Check("clock", "warn", f"this machine's clock shows {here}", remedy)
    # Two levels only, studies and runs: below may be millions of files.
    newest = max(((_mtime(path), path) for path in (*run_root.glob("*"), *run_root.glob("*/*"))), default=None)
    if newest is not None and newest[0] > now + CLOCK_SKEW_S:
        hours = (newest[0] - now) / 3600
        return Check("clock", "warn", f"it shows {here}, and {newest[1]} was written {hours:.1f} h later", remedy)
    return Check("clock", "ok", here)


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # deleted in the meantime, or not readable
        return 0.0
