"""Attacks with whole checkpoints of an odd content: every key is left out, or has a value of another type."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Toy
from trainer import Diverged, TrainConfig, UserError, train
from trainer.averaging import average_checkpoints
from trainer.checkpoint import read_checkpoint, write_checkpoint
from tuner.promotion.evaluate import evaluate_all
from tuner.promotion.export import export
from tuner.promotion.link_checkpoint import link_checkpoints
from tuner.study.tracked_run import WORKLOAD, describe_workload

MISSING = object()
ODD = [MISSING, None, "text", [1], {}, {"a": {"b": [None]}}, 10**30, -1, True, float("nan")]
ODD += [torch.ones(3), torch.ones(())]


def config(steps: int, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"save_every": 2, "eval_every": 16, "on_decline": "warn", "precision": "fp32"}
    return TrainConfig(**{**values, "batch_size": 8, "device": "cpu", "val_samples": 4, "steps": steps, **changes})


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All keys in nested dictionaries and lists, outer ones too."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from paths(value, (*at, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at a path."""
    key, *rest = path
    copy = dict(tree) if isinstance(tree, Mapping) else list(tree)
    if rest:
        copy[key] = changed(tree[key], tuple(rest), value)
    elif value is MISSING:
        del copy[key]
    else:
        copy[key] = value
    return copy


@pytest.fixture(scope="module", params=["prodigy", "adamw"])
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    lineage = {WORKLOAD: describe_workload(Toy())}
    train(Toy(), config(4, optimizer=request.param), run_dir=folder, lineage=lineage)
    return folder


def uses(folder: Path) -> Mapping[str, Callable[[Path], object]]:
    """Everything that reads a checkpoint, by name."""
    optimizer = read_checkpoint(folder / "latest.pth")["optimizer_type"]
    more = config(6, optimizer=optimizer, schedule="wsd", schedule_steps=40)

    def go_on(path: Path) -> None:
        shutil.copy(path, path.parent / "step_000000004.pth")
        train(Toy(), more, run_dir=path.parent)

    return {
        "continue": go_on,
        "resume": lambda path: train(Toy(), more, run_dir=path.parent / "new", resume=path),
        "init": lambda path: train(Toy(), config(2), run_dir=path.parent / "new", init=path),
        "link": lambda path: link_checkpoints(path.parent, path.parent / "new", Toy()),
        "average": lambda path: average_checkpoints([path, folder / "latest.pth"], path.parent / "mean.pth"),
        "export": lambda path: export(path.parent, path.parent / "release"),
        "evaluate": lambda path: evaluate_all(path.parent, samples=4),
    }


@pytest.mark.parametrize("times", [40, pytest.param(100_000, marks=pytest.mark.slow)])
def test_odd_checkpoint_is_one_line(whole: Path, tmp_path: Path, times: int) -> None:
    state = read_checkpoint(whole / "latest.pth")
    attempts = [*itertools.product(paths(state), ODD, uses(whole))]
    for number, (path, odd, use) in enumerate(random.Random(0).sample(attempts, min(times, len(attempts)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / ".tuner-run").touch()
        write_checkpoint(changed(state, path, odd), folder / "latest.pth")
        try:
            uses(whole)[use](folder / "latest.pth")
        except (UserError, Diverged) as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{use} with {'.'.join(map(str, path))} = {odd!r}") from error
        shutil.rmtree(folder)
