"""`tuner export`: the choice of the checkpoint, the errors, and the workload recorded in the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from trainer.checkpoint import read_checkpoint, write_checkpoint
from tuner.cli import main
from tuner.promotion.export import describe, export, find_checkpoint
from tuner.spec.setups import full_setup
from tuner.study.tracked_run import Runtime, describe_workload, tracked_train


class FirstToken(Toy):
    def best_checkpoints(self) -> dict[str, str]:
        return {"val/token": "best_token_model.pth", "val/other": "best_other_model.pth"}


@pytest.fixture
def run_dir(runtime: Runtime) -> Path:
    setup = full_setup(build(**{"workload.width": 8, "full.samples": 40, "full.schedule": "none"}), {})
    tracked_train(setup, runtime.run_root / "it", runtime, experiment="it", lineage={"spec": "none"})
    return runtime.run_root / "it"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["tuner", "export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_run_records_its_workload(run_dir: Path) -> None:
    for name in ("latest.pth", "best_token_model.pth"):
        record = read_checkpoint(run_dir / name)["lineage"]["workload"]
        assert record["class"] == "tests.toy:Toy"
        assert record["folder"] == str(Path(__file__).parents[3])
        assert Toy.model_validate(record["options"]) == Toy(width=8, num_train=128)


def test_import_name_is_that_of_the_package_that_offers_the_class() -> None:
    from studies.indextts2 import IndexTTS2

    work = IndexTTS2(train_manifests=["a"], val_manifests=["b"], config="c")
    assert describe_workload(work)["class"] == "studies.indextts2:IndexTTS2"
    assert describe_workload(work)["folder"] == str(Path(__file__).parents[3])


def test_workload_beside_its_study_is_found(tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "beside_study.py").write_text(
        "from tests.toy import Toy\n"
        "class Beside(Toy):\n"
        "    def export_weights(self, state, path, *, format='pth'):\n"
        "        path.write_text(f'{len(state)} tensors, width {self.width}')\n"
    )
    sys.path.append(str(tmp_path))
    setup = full_setup(
        build(**{"study.workload": "beside_study:Beside", "full.samples": 16, "full.schedule": "none"}), {}
    )
    sys.path.remove(str(tmp_path))
    tracked_train(setup, runtime.run_root / "it", runtime, experiment="it", lineage={})
    del sys.modules["beside_study"]
    export(runtime.run_root / "it", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "5 tensors, width 16"


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out.bin"])
def test_state_dict_is_what_a_plain_workload_exports(run_dir: Path, tmp_path: Path, name: str) -> None:
    done = export(run_dir, tmp_path / name, checkpoint="latest")
    assert (done.checkpoint, done.step) == (run_dir / "latest.pth", 5)
    load = safetensors.torch.load_file if name.endswith("safetensors") else torch.load
    found, expected = load(tmp_path / name), read_checkpoint(run_dir / "latest.pth")["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tied_weights_go_into_safetensors_once_a_name(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    Toy().export_weights({"a": weight, "b": weight, "c": weight.T}, tmp_path / "out", format="safetensors")
    found = safetensors.torch.load_file(tmp_path / "out")
    assert torch.equal(found["a"], weight) and torch.equal(found["b"], weight) and torch.equal(found["c"], weight.T)


@pytest.mark.parametrize(
    ("files", "name", "chosen"),
    [
        (["best_other_model", "best_token_model", "latest"], None, "best_token_model"),
        (["best_text_model", "best_other_model", "latest"], None, "latest"),
        (["best_model", "latest"], None, "best_model"),
        (["best_mel_model", "best_text_model"], "best_text", "best_text_model"),
        (["best_mel_model", "latest"], "latest", "latest"),
        (["best_mel_model", "step_000000500"], "500", "step_000000500"),
        (["best_mel_model", "step_000000500"], "step_000000500.pth", "step_000000500"),
    ],
)
def test_checkpoint_is_found_by_name(tmp_path: Path, files: list[str], name: str | None, chosen: str) -> None:
    for file in files:
        (tmp_path / f"{file}.pth").touch()
    assert find_checkpoint(tmp_path, name, FirstToken()) == tmp_path / f"{chosen}.pth"


def test_workload_of_the_run_decides_which_of_its_best_checkpoints_is_exported(run_dir: Path, tmp_path: Path) -> None:
    best = run_dir / "best_token_model.pth"
    for other in ("best_a_model.pth", "best_b_model.pth"):
        write_checkpoint({**read_checkpoint(best), "step": 3}, run_dir / other)
    assert export(run_dir, tmp_path / "best.pth").checkpoint == best
    best.unlink()
    assert export(run_dir, tmp_path / "latest.pth").checkpoint == run_dir / "latest.pth"


def test_checkpoint_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "kept.pth").touch()
    (tmp_path / "run").mkdir()
    assert find_checkpoint(tmp_path / "run", str(tmp_path / "kept.pth")) == tmp_path / "kept.pth"


def test_export_command_prints_its_source_and_force_replaces(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.pth"
    assert command(monkeypatch, str(run_dir), "--to", str(target)) == 0
    assert f"from {run_dir}/best_token_model.pth, step 5" in capsys.readouterr().out
    target.write_text("old")
    assert command(monkeypatch, str(run_dir), "--to", str(target)) == 2
    assert target.read_text() == "old"
    assert command(monkeypatch, str(run_dir), "--to", str(target), "--force") == 0
    assert torch.load(target).keys() == Toy().build_model().state_dict().keys()


def test_folder_has_weights_and_a_readme_with_lineage(run_dir: Path, tmp_path: Path) -> None:
    done = export(run_dir, tmp_path / "ko-v1.2", checkpoint="latest")
    assert sorted(path.name for path in done.path.iterdir()) == ["README.txt", "weights.pth"]
    assert done.num_bytes == sum(path.stat().st_size for path in done.path.iterdir())
    state = read_checkpoint(run_dir / "latest.pth")
    readme = (done.path / "README.txt").read_text()
    for line in (
        f"checkpoint: {run_dir}/latest.pth",
        "steps: 5",
        "spec: none",
        f"data digest: {state['identity']['data']['contents']}",
        "workload: tests.toy:Toy",
        "batch_size: 8",
        f"val/loss: {state['progress']['metrics']['val/loss']:.4f}",
    ):
        assert f"  {line}\n" in readme
    (done.path / "notes.md").write_text("mine")
    (done.path / "weights.pth").write_text("old")
    with pytest.raises(UserError, match=r"weights.pth exists: choose another name, or replace it with --force"):
        export(run_dir, done.path)
    assert (done.path / "weights.pth").read_text() == "old"
    export(run_dir, done.path, force=True)
    assert torch.load(done.path / "weights.pth").keys() == state["model"].keys()
    assert (done.path / "notes.md").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_trial_and_its_parameters_are_in_the_readme() -> None:
    lineage = {"study": "ko", "trial": 7, "params": {"train.d_coef": 0.5}, "continued_from": None}
    text = describe({"step": 5, "lineage": lineage, "metrics": {"val/loss": 2.0}}, Path("/run/best.pth"), {})
    assert "  study: ko\n  trial: 7\n\nparameters of the trial\n  train.d_coef: 0.5\n" in text
    assert "metrics of step 5\n  val/loss: 2.0000\n" in text


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-100])


def without_lineage(run_dir: Path) -> None:
    state = read_checkpoint(run_dir / "latest.pth")
    del state["lineage"]["workload"]
    write_checkpoint(state, run_dir / "old.pth")


def record(key: str, value: Any) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        state = read_checkpoint(run_dir / "latest.pth")
        state["lineage"]["workload"][key] = value
        write_checkpoint(state, run_dir / "old.pth")

    return change


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["none", "--to", "out.pth"], "none: no such run directory"),
        (None, [".", "--to", "out.pth"], "it holds no checkpoint"),
        (
            None,
            ["it", "--to", "out.pth", "--checkpoint", "best_mel"],
            "choose from best, best_token_model, latest, step_000000005",
        ),
        (None, ["it", "--to", "out.pth", "--checkpoint", "7"], "no checkpoint 7"),
        (None, ["it", "--to", "out.onnx"], "out.onnx: weights are written as pth or safetensors: name it so"),
        (None, ["it", "--to", "out.pth", "--format", "onnx"], "--format onnx: use pth or safetensors"),
        (None, ["it", "--to", "none/out.pth"], "there is no folder none"),
        (None, ["it", "--to", "it"], "it is a run directory"),
        (None, ["it", "--to", "it/latest.pth", "--force"], "is a checkpoint of a run: export to another file"),
        (None, ["it", "--to", "/proc/out.pth"], "/proc/out.pth could not be written"),
        (None, ["it", "--to", "/proc/out"], "/proc/out could not be written"),
        (lambda run: (run.parent / "out").touch(), ["it", "--to", "out"], "out is a file: name a folder"),
        (
            lambda run: truncate(run / "latest.pth"),
            ["it", "--to", "out.pth", "--checkpoint", "latest"],
            "latest.pth is damaged",
        ),
        (
            lambda run: torch.save({"weight": torch.zeros(2)}, run / "gpt.pth"),
            ["it", "--to", "out.pth", "--checkpoint", "gpt"],
            "gpt.pth is no checkpoint of a run",
        ),
        (without_lineage, ["it", "--to", "out.pth", "--checkpoint", "old"], "name the study.toml with --spec"),
        (
            record("class", "no_such_module:Toy"),
            ["it", "--to", "out.pth", "--checkpoint", "old"],
            "no module no_such_module",
        ),
        (
            record("options", {"widht": 3}),
            ["it", "--to", "out.pth", "--checkpoint", "old"],
            "did you mean workload.width?; name the study.toml with --spec",
        ),
    ],
)
def test_mistake_is_one_line_and_nothing_is_written(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], object] | None,
    arguments: list[str],
    message: str,
) -> None:
    if prepare:
        prepare(run_dir)
    before = sorted(run_dir.parent.rglob("*"))
    monkeypatch.chdir(run_dir.parent)
    assert command(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert sorted(run_dir.parent.rglob("*")) == before


def test_run_of_an_earlier_version_is_exported_with_its_spec(run_dir: Path, tmp_path: Path) -> None:
    without_lineage(run_dir)
    write(tmp_path, TOML.replace("num_train = 128", "num_train = 128\nwidth = 8"))
    with pytest.raises(UserError, match="does not name the workload that made it"):
        export(run_dir, tmp_path / "out.pth", checkpoint="old")
    export(run_dir, tmp_path / "out.pth", checkpoint="old", spec=tmp_path / "study.toml")
    assert torch.load(tmp_path / "out.pth")["hidden.weight"].shape == (8, 8)
