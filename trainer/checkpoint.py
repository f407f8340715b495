"""Checkpoints that survive everything but a lost disk.

A checkpoint is written from a snapshot in host memory by one background thread: to a temporary file, flushed,
with its digest beside it (`sha256sum -c` reads it), then renamed. `step_*.pth` are the last few states,
`latest.pth` is a hard link to the newest, `stable.pth` to the state before the rate decays, `best.pth` to that of the
best validation. `best_*.pth` and `milestone_*.pth` hold weights and metrics only.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.host_buffer import HostBuffer
from trainer.locks import is_locked as is_locked
from trainer.locks import lock_folder as lock_folder
from trainer.units import format_bytes

log = logging.getLogger(__name__)

KEPT_SHARE = 1 / 3
"""Share of the free host memory that may be kept for snapshots of a GPU's state."""
LATEST, STABLE, BEST = "latest.pth", "stable.pth", "best.pth"

# Errors of torch.load for files that are truncated or no checkpoints.
_DAMAGE = (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, struct.error)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dictionaries, lists and tuples."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tree))


def snapshot(tree: Any, buffer: HostBuffer | None = None) -> Any:
    """A copy of `tree` in host memory that later steps can't change.

    Args:
        buffer: Takes the tensors of a GPU; they are valid after its `wait`.
    """
    if isinstance(tree, Tensor):
        kept = None if buffer is None else buffer.copy(tree)
        return tree.detach().to("cpu", copy=True) if kept is None else kept
    if isinstance(tree, dict):
        return {key: snapshot(value, buffer) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(snapshot(value, buffer) for value in tree)
    return copy.deepcopy(tree)


def digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def write_checkpoint(state: Any, path: Path) -> None:
    """Write `state` to `path` so that at every moment `path` is absent, the old file, or the whole new one.

    Raises:
        UserError: The disk is full or can't be written to.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _replace(temporary, path, digest)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if (reason := explain_write_error(error)) is None:
            raise
        raise UserError(
            f"{path} could not be written ({reason}): it needs {format_bytes(num_bytes(state))}; free some space and "
            "start again, the run continues from its last checkpoint."
        ) from error


def explain_write_error(error: OSError | RuntimeError) -> str | None:
    """Returns why the disk refused a write; None for an error of another kind."""
    # torch.save reports a failed write as a RuntimeError of its zip writer, of two kinds.
    if isinstance(error, RuntimeError) and not re.search(r"PytorchStreamWriter|inline_container", str(error)):
        return None
    return first_line(error.__context__ if isinstance(error.__context__, OSError) else error)


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, after checking its digest, if any. Never runs code from the file.

    Args:
        mmap: Map the tensors from the file, so that they cost no memory until they are read.

    Raises:
        UserError: The file is missing, damaged, or no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path.")
    # A power cut may leave an empty digest file, which counts as none.
    written = digest_path(path).read_text(errors="replace").split() if digest_path(path).is_file() else []
    if written:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != written[0]:
            raise UserError(f"checkpoint {path} is damaged (its digest does not match).")
    # Only torch's zip format can be mapped; the older format has to be read as a whole.
    mmap = mmap and zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is damaged, or holds code or objects besides tensors; nothing in it was "
            "executed: save the state dict alone."
        ) from error
    except _DAMAGE as error:
        raise UserError(f"checkpoint {path} is damaged or no checkpoint ({first_line(error)}).") from error
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {path} holds no weights by name but a {type(state).__name__}.")
    return dict(state)


def holds_state(run_dir: Path) -> bool:
    """Whether the directory has a state to continue, damaged or not. Other files are weights, or names of a state."""
    return (run_dir / LATEST).exists() or any(run_dir.glob("step_*.pth"))


def step_file(step: int) -> str:
    """Name of the file with the state after `step` steps."""
    return f"step_{step:09d}.pth"


def milestone_file(step: int) -> str:
    """Name of the file with the weights after `step` steps that stays."""
    return f"milestone_{step:09d}.pth"


def newest_step(run_dir: Path) -> int | None:
    """Returns the step of the newest state by its file name, damaged or not; None if there is none."""
    return max((int(path.stem.removeprefix("step_")) for path in run_dir.glob(f"step_{'[0-9]' * 9}.pth")), default=None)


def delete_checkpoints(run_dir: Path) -> None:
    """Delete all checkpoints of a run directory; another process may do so too."""
    for path in run_dir.glob("*.pth"):
        _delete(path)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    digest_path(path).unlink(missing_ok=True)


def find_state(
    run_dir: Path, fits: Callable[[Mapping[str, Any]], bool] = lambda state: True
) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest undamaged checkpoint, its tensors mapped from the file. Logs and skips damaged ones.

    Args:
        fits: Whether a run may continue from a state. If the newest does not fit, `stable.pth` is returned if it does.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    candidates = [path for path in (*list_steps(run_dir)[::-1], run_dir / LATEST, run_dir / STABLE) if path.exists()]
    newest = None
    for path in candidates:
        if newest and path.name != STABLE:
            continue
        try:
            found = path, read_checkpoint(path, mmap=True)
        except UserError as error:
            log.warning("%s", error)
            continue
        if fits(found[1]):
            if newest:
                log.warning(
                    "going back to step %d: the states after it had another learning rate, and the next one replaces "
                    "them",
                    found[1]["step"],
                )
            return found
        newest = newest or found
    if candidates and newest is None:
        raise UserError(f"all {len(candidates)} checkpoints in {run_dir} are damaged: start in another folder.")
    return newest


def go_back(run_dir: Path, name: str) -> None:
    """Make a state that has another name, such as `best.pth`, the newest one: the states after it are deleted.

    Raises:
        UserError: It is missing or damaged.
    """
    path = run_dir / name
    target = run_dir / step_file(read_checkpoint(path, mmap=True)["step"])
    for alias in (target, run_dir / LATEST):
        _link_alias(path, alias)
    for later in list_steps(run_dir)[list_steps(run_dir).index(target) + 1 :]:
        _delete(later)


def list_steps(run_dir: Path) -> list[Path]:
    """The states by step, the newest last."""
    return sorted(run_dir.glob("step_*.pth"))


class Checkpoints:
    """The checkpoints of one run directory. A context manager: its exit waits for the last write.

    Args:
        keep: Number of states to keep.
        on_written: Called with path, kind ("best", "milestone" or "state") and step once a file is whole, before a
            later one may replace or delete it.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, on_written: Callable[[Path, str, int], None] = lambda path, kind, step: None
    ) -> None:
        self.run_dir, self.keep, self._on_written = run_dir, keep, on_written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._buffer = HostBuffer()
        self._buffered: Future[None] | None = None
        """The write of the snapshot in the buffer."""
        self._has_warned = False
        for incomplete in run_dir.glob("*.tmp"):
            incomplete.unlink()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.shutdown(wait=True)
        self._buffer.close()
        if kind is None:
            self._wait()

    def find(
        self, fits: Callable[[Mapping[str, Any]], bool] = lambda state: True
    ) -> tuple[Path, dict[str, Any]] | None:
        """Returns the checkpoint to continue from.

        As `find_state`. A state that was written without its alias gets it.
        """
        found = find_state(self.run_dir, fits)
        latest = self.run_dir / LATEST
        if found and found[0].name.startswith("step_") and not (latest.exists() and latest.samefile(found[0])):
            _link_alias(found[0], latest)
        return found

    def save(self, state: dict[str, Any], *, also: Sequence[str] = ()) -> None:
        """Write the state as the newest checkpoint, in the background if memory can hold a snapshot.

        Args:
            also: Further names under which it is kept: STABLE, and BEST if the disk has room for it.

        Raises:
            UserError: This write, or one before it, failed.
        """

        def write(kept: dict[str, Any]) -> None:
            self._write_step(kept, (*also, LATEST))

        if not self._submit_buffered(state, write):
            self._submit(state, write)

    def save_weights(self, state: dict[str, Any], names: Sequence[str]) -> None:
        """Write weights and metrics under each of `names` (`best_*.pth`, `milestone_*.pth`)."""

        def write(kept: dict[str, Any]) -> None:
            first, *others = (self.run_dir / name for name in names)
            write_checkpoint(kept, first)
            for other in others:
                _link_alias(first, other)
            for path in (first, *others):
                self._on_written(path, path.name.partition("_")[0], kept["step"])

        self._submit(state, write)

    def _submit(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        self._raise_failures()
        size = num_bytes(state)
        if size > psutil.virtual_memory().available / 2:
            self._wait()
        if size > psutil.virtual_memory().available / 2:
            log.info("training waits while %s are written: no memory for a snapshot", format_bytes(size))
            write(state)
        else:
            self._pending.append(self._writer.submit(write, snapshot(state)))

    def _raise_failures(self) -> None:
        """Raise the error of a write that has failed."""
        self._pending = [future for future in self._pending if not future.done() or future.result()]

    def _submit_buffered(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> bool:
        """Write a GPU's state from the kept buffer, if it is free and the host has the memory to keep it."""
        self._raise_failures()
        size = self._buffer.count(tensors_in(state))
        is_free = self._buffered is None or self._buffered.done()
        if not size or not is_free or size - self._buffer.size > psutil.virtual_memory().available * KEPT_SHARE:
            return False
        self._buffer.begin(size)
        kept = snapshot(state, self._buffer)
        self._buffer.wait()
        self._buffered = self._writer.submit(write, kept)
        self._pending.append(self._buffered)
        return True

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _write_step(self, state: dict[str, Any], aliases: Sequence[str]) -> None:
        path = self.run_dir / step_file(state["step"])
        write_checkpoint(state, path)
        for name in aliases:
            if name != BEST or self._has_room(path):
                _link_alias(path, self.run_dir / name)
        self._on_written(path, "state", state["step"])
        steps = list_steps(self.run_dir)
        # Later states are damaged, or of a decay that this run has left.
        later = steps[steps.index(path) + 1 :]
        for old in [*later, *steps[: steps.index(path) + 1][: -self.keep]]:
            _delete(old)

    def _has_room(self, path: Path) -> bool:
        """Whether `best.pth` can be kept once `path` is no longer one of the newest states. Warns once if not."""
        if (self.run_dir / BEST).exists():
            return True  # it takes the place of the file before it
        # At its peak the run has one more state than it keeps, while it writes, and this one.
        size, more = path.stat().st_size, self.keep + 2 - len(list_steps(self.run_dir))
        free = shutil.disk_usage(self.run_dir).free
        if free < more * size and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s is not kept: it needs room for %d more checkpoints of %s, and %s are free in %s; free some space",
                BEST,
                more,
                format_bytes(size),
                format_bytes(free),
                self.run_dir,
            )
        return free >= more * size


def _link_alias(path: Path, alias: Path) -> None:
    """Hard-link `alias` to `path`, or copy it if the file system has no hard links."""
    temporary = alias.with_name(alias.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    _replace(temporary, alias, digest_path(path).read_text(encoding="utf-8").split()[0])


def _replace(temporary: Path, path: Path, digest: str) -> None:
    # A file without a digest is accepted; with the digest of another file it would count as damaged.
    digest_path(path).unlink(missing_ok=True)
    os.replace(temporary, path)
    with open(digest_path(path), "w", encoding="utf-8") as file:
        file.write(f"{digest}  {path.name}\n")
        file.flush()
        os.fsync(file.fileno())
