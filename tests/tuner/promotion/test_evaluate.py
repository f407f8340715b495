"""`tuner evaluate`: the loss that the run itself reported, and the errors."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.toy import Sequences, Toy
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import Batch, UserError
from trainer.checkpoint import read_checkpoint
from tuner.cli import main
from tuner.promotion.evaluate import evaluate_all, evaluate_checkpoint
from tuner.spec.setups import full_setup
from tuner.study.tracked_run import Runtime, tracked_train


@pytest.fixture
def run_dir(runtime: Runtime) -> Path:
    setup = full_setup(
        build(**{"full.samples": 80, "full.schedule": "none", "full.eval_every": 40, "train.val_samples": 23}), {}
    )
    tracked_train(setup, runtime.run_root / "it", runtime, experiment="it", lineage={})
    return runtime.run_root / "it"


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["tuner", "evaluate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize("name", ["latest.pth", "step_000000010.pth", "best_token_model.pth"])
def test_evaluation_equals_the_loss_of_the_run(run_dir: Path, name: str) -> None:
    spec = build(**{"train.val_samples": 23})
    found = evaluate_checkpoint(spec, run_dir / name)
    assert (found.checkpoint, found.samples) == (run_dir / name, 23)
    assert found.metrics == pytest.approx(read_checkpoint(run_dir / name)["metrics"], abs=1e-6)


def test_whole_validation_set_counts_unless_the_spec_or_the_caller_limits_it(run_dir: Path) -> None:
    assert full_setup(build(), {}).config.val_samples == 12
    whole = evaluate_checkpoint(build(), run_dir / "latest.pth")
    assert whole.samples == 40
    assert evaluate_checkpoint(build(), run_dir / "latest.pth", samples=11).samples == 11
    part = evaluate_checkpoint(build(**{"train.val_samples": 23}), run_dir / "latest.pth")
    assert part.samples == 23
    assert part.metrics != whole.metrics


def test_run_directory_means_its_exported_checkpoint(run_dir: Path) -> None:
    assert evaluate_checkpoint(build(), run_dir).checkpoint == run_dir / "best_token_model.pth"


def test_non_finite_loss_is_null_in_json(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read_checkpoint(run_dir / "latest.pth")
    state["model"]["head.bias"].fill_(torch.nan)
    torch.save(state, tmp_path / "ruined.pth")
    arguments = str(write(tmp_path, TOML)), "--checkpoint", str(tmp_path / "ruined.pth")
    assert evaluate(monkeypatch, *arguments, "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail)["metrics"]["val/loss"] is None


def test_json_is_all_that_is_printed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, TOML)
    arguments = str(tmp_path / "study.toml"), "--checkpoint", str(run_dir / "latest.pth")
    assert evaluate(monkeypatch, *arguments, "--json", "--samples", "5") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"checkpoint", "samples", "metrics"}
    assert found["samples"] == 5
    assert found["metrics"].keys() == {"val/loss", "val/token_loss"}
    assert evaluate(monkeypatch, *arguments, "--set", "train.val_samples=7") == 0
    assert "latest.pth, 7 samples: val/loss " in capsys.readouterr().out


def test_other_options_than_the_runs_are_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate_checkpoint(build(**{"workload.dropout": 0.2}), run_dir / "latest.pth")
    assert "of a run with other options: workload.dropout was 0.1 and is now 0.2" in caplog.text
    caplog.clear()
    evaluate_checkpoint(build(), run_dir / "latest.pth")
    assert "other options" not in caplog.text


def test_another_validation_set_than_the_runs_is_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate_checkpoint(build(), run_dir / "latest.pth")
    assert "the run itself was measured on 23 validation samples (seed 0): --samples 23" in caplog.text
    caplog.clear()
    evaluate_checkpoint(build(), run_dir / "latest.pth", samples=23)
    assert "the run itself" not in caplog.text


class Damaged(Toy):
    damaged_val: tuple[int, ...] = (3,)

    def val_data(self) -> Sequences:
        return Sequences(200, 2, self.damaged_val)


def test_few_damaged_samples_are_skipped_and_not_counted(run_dir: Path) -> None:
    spec = build(**{"study.workload": f"{__name__}:Damaged"})
    assert evaluate_checkpoint(spec, run_dir / "latest.pth").samples == 199
    spec = build(**{"study.workload": f"{__name__}:Damaged", "workload.damaged_val": range(9)})
    with pytest.raises(UserError, match=r"samples read are missing or damaged \(the data has 200"):
        evaluate_checkpoint(spec, run_dir / "latest.pth")


class Watched(Damaged):
    """Counts how many of its batches are held at once."""

    alive: ClassVar[list[weakref.ref[Tensor]]] = []
    counts: ClassVar[list[int]] = []

    def collate(self, samples: Sequence[Any], pad_multiple: int = 1) -> Batch:
        batch = super().collate(samples, pad_multiple)
        self.alive.append(weakref.ref(batch.inputs["tokens"]))
        self.counts.append(sum(one() is not None for one in self.alive))
        return batch


def test_batches_are_read_as_they_are_needed(run_dir: Path) -> None:
    # All of a large validation set may be larger than memory.
    evaluate_checkpoint(build(**{"study.workload": f"{__name__}:Watched"}), run_dir / "latest.pth")
    assert len(Watched.counts) == 13 and max(Watched.counts) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml", "--checkpoint", "gpt.pth"], "none.toml: no such study spec"),
        (["study.toml", "--checkpoint", "none.pth"], "none.pth does not exist"),
        (["study.toml", "--checkpoint", "."], "it holds no checkpoint"),
        (["study.toml", "--checkpoint", "text.pth"], "text.pth is damaged or no checkpoint"),
        (["study.toml", "--checkpoint", "narrow.pth"], "narrow.pth does not fit the model"),
        (["study.toml", "--checkpoint", "narrow.pth", "--set", "train.device=cuda"], "no CUDA device"),
    ],
)
def test_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write(tmp_path, TOML)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    torch.save(Toy(width=8).build_model().state_dict(), tmp_path / "narrow.pth")
    monkeypatch.chdir(tmp_path / "empty" if "." in arguments else tmp_path)
    if "." in arguments:
        arguments = ["../study.toml", *arguments[1:]]
    assert evaluate(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1, errors


def test_all_checkpoints_of_a_run_are_ranked(run_dir: Path) -> None:
    (run_dir / "damaged.pth").write_bytes(b"nothing")
    found = evaluate_all(run_dir)
    assert [one.names for one in found] == [
        ("best", "latest", "step_000000010"),
        ("best_token_model",),
        ("step_000000005",),
    ]
    for one in found:
        assert one.metrics == pytest.approx(read_checkpoint(one.checkpoint)["metrics"], abs=1e-6)


def test_checkpoints_are_ranked_by_what_a_hook_measured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, value in {5: 0.25, 10: 0.5}.items():
        (run_dir / f"samples/step_{step:09d}").mkdir(parents=True)
        (run_dir / f"samples/step_{step:09d}/metrics.json").write_text(f'{{"cer": {value}, "ctc_loss": 1}}')
    found = evaluate_all(run_dir, by="hook/cer")
    assert found[0].names == ("step_000000005",) and found[0].metrics["hook/cer"] == 0.25
    assert evaluate_all(run_dir, by="-hook/cer")[0].names == ("best", "latest", "step_000000010")
    shutil.rmtree(run_dir / "samples/step_000000010")
    assert evaluate_all(run_dir, by="-hook/cer")[0].names == ("step_000000005",)
    assert evaluate(monkeypatch, str(run_dir), "--all") == 0
    assert "hook/cer" in capsys.readouterr().out


def test_mistakes_of_evaluating_all_are_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in {
        (str(run_dir), "--all", "--checkpoint", "x"): "leave --checkpoint and --set out",
        (str(run_dir),): "name a --checkpoint, or give a run directory and --all",
        (str(run_dir / "none"), "--all"): "no such run directory",
        (str(run_dir), "--all", "--by", "cer"): "--by cer: no checkpoint has this metric; there are val/loss",
        (str(run_dir), "--checkpoint", "x", "--by", "cer"): "--by cer: it sorts the checkpoints of --all",
    }.items():
        assert evaluate(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
