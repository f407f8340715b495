"""The two scripts of the Korean fine-tuning, from start to resumption, on a tiny corpus."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from studies.indextts2.weights import count_pieces
from tests.commands import Command
from tests.studies.test_weights import published, tokenizers  # noqa: F401
from tests.studies.test_workload import CONFIG_YAML
from tests.studies.tiny_corpus import write_tiny_corpus
from trainer.checkpoint import read_checkpoint, write_checkpoint
from tuner.spec.overrides import parse_override

ROOT = Path(__file__).parents[2]

GIVEN = {
    "TRAIN_MANIFEST": "data/train_pairs.jsonl::ko",
    "VAL_MANIFEST": "data/val_pairs.jsonl",
    "TOKENIZER_MODEL": "ko.model",
    "BASE_TOKENIZER_MODEL": "base.model",
    "CONFIG_PATH": "config.yaml",
    "BASE_CHECKPOINT": "gpt.pth",
    "OUTPUT_DIR": "out",
    "BATCH_SIZE": "2",
    "GRAD_ACC": "3",
    "MAX_STEPS": "4",
    "VAL_INTERVAL": "2",
    "LOG_INTERVAL": "1",
    "AMP": "0",
}


@pytest.fixture
def folder(tmp_path: Path, tokenizers: tuple[Path, Path]) -> Path:  # noqa: F811
    """A corpus, a config, a base checkpoint and its tokenizers, and the command `tuner` of this checkout."""
    write_tiny_corpus(tmp_path / "data", num_train=12, num_val=4, num_text_tokens=20)
    (tmp_path / "config.yaml").write_text(CONFIG_YAML)
    torch.save(published(layers=3, number_text_tokens=count_pieces(tokenizers[0])), tmp_path / "gpt.pth")
    for name, path in zip(("base.model", "ko.model"), tokenizers, strict=True):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tuner").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tuner "$@"\n')
    (tmp_path / "bin/tuner").chmod(0o755)
    return tmp_path


def script(folder: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME_ko_prodigy.sh in `folder`."""
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    return subprocess.run(
        ["bash", str(ROOT / f"scripts/{name}_ko_prodigy.sh"), "--no-track", *arguments],
        cwd=folder,
        env=environment | GIVEN | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def arguments(folder: Path, name: str, *given: str, **variables: str) -> list[str]:
    """The script's arguments to `tuner`."""
    (folder / "bin/tuner").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    result = script(folder, name, *given, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\0")[:-1]


def settings(given: list[str]) -> dict[str, Any]:
    return dict(parse_override(value) for option, value in pairwise(given) if option == "--set")


def test_run_is_trained_and_resumed(folder: Path, run_command: Command) -> None:
    trained = script(folder, "train", TRAIN_MANIFEST="data/train_pairs.jsonl::ko,data/val_pairs.jsonl")
    assert trained.returncode == 0, trained.stderr
    assert "[Step 1] Loss: " in trained.stdout and "[Step 2] validation after 12 samples" in trained.stdout
    state = read_checkpoint(folder / "out/latest.pth")
    assert state["step"] == 4
    config = state["config"]
    assert (config["batch_size"], config["grad_accumulation"], config["eval_every"]) == (2, 3, 12)
    assert (config["optimizer"], config["precision"], config["seed"]) == ("prodigy", "fp32", 1234)
    assert (config["log_every"], config["num_workers"]) == (1, 32)
    options = state["lineage"]["workload"]["options"]
    assert options["train_manifests"] == [f"{folder}/data/train_pairs.jsonl::ko", f"{folder}/data/val_pairs.jsonl"]
    assert options["base_checkpoint"] == f"{folder}/gpt.pth"

    # Again in this process: the script replaces itself by the command.
    manifests = "data/train_pairs.jsonl::ko data/val_pairs.jsonl"
    again = run_command(*arguments(folder, "train", TRAIN_MANIFEST=manifests))
    assert again.returncode == 2 and "holds a run at step 4" in again.stderr
    here = ("--set", "full.steps=5", "--set", "train.num_workers=0")
    resumed = run_command(*arguments(folder, "resume", *here, TRAIN_MANIFEST=manifests))
    assert resumed.returncode == 0 and "at step 4" in resumed.stdout, resumed.stderr
    assert read_checkpoint(folder / "out/latest.pth")["step"] == 5
    new = {"RESUME": "out/latest.pth", "OUTPUT_DIR": "new", "MAX_STEPS": "6", "NUM_WORKERS": "0"}
    elsewhere = run_command(*arguments(folder, "resume", TRAIN_MANIFEST=manifests, **new))
    assert elsewhere.returncode == 0 and "at step 5" in elsewhere.stdout, elsewhere.stderr
    assert read_checkpoint(folder / "new/latest.pth")["step"] == 6


def test_resuming_names_the_newest_checkpoint_or_the_given_one(folder: Path) -> None:
    for name in ("out", "old"):
        (folder / name).mkdir()
        (folder / name / "latest.pth").touch()
    for given, resume in (
        ("", "auto"),
        ("auto", "auto"),
        ("out/latest.pth", "auto"),
        ("old/latest.pth", f"{folder}/old/latest.pth"),
    ):
        found = arguments(folder, "resume", RESUME=given)
        assert [value for option, value in pairwise(found) if option == "--resume"][-1] == resume


@pytest.mark.parametrize("separator", [",", " ", ", ", "\n"])
def test_manifests_are_separated_by_commas_or_blanks(folder: Path, separator: str) -> None:
    names = separator.join(["data/train_pairs.jsonl::ko", "b.jsonl::en", str(folder / "c.jsonl")])
    assert settings(arguments(folder, "train", TRAIN_MANIFEST=names))["workload.train_manifests"] == [
        f"{folder}/data/train_pairs.jsonl::ko",
        f"{folder}/b.jsonl::en",
        f"{folder}/c.jsonl",
    ]


def test_names_may_hold_blanks_and_quotes(folder: Path) -> None:
    (folder / 'my "data", old').symlink_to("data")
    manifest = 'my "data", old/train_pairs.jsonl::ko'
    found = settings(arguments(folder, "train", TRAIN_MANIFEST=manifest, BASE_CHECKPOINT="g\\p t.pth"))
    assert found["workload.train_manifests"] == [f"{folder}/{manifest}"]
    assert found["workload.base_checkpoint"] == f"{folder}/g\\p t.pth"


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("train", {"BATCH_SIZE": "many"}, "BATCH_SIZE=many: give a whole number from 1 on"),
        ("train", {"MAX_STEPS": "0"}, "MAX_STEPS=0: give a whole number from 1 on"),
        ("train", {"SEED": "08"}, "SEED=08: give a whole number from 0 on"),
        ("train", {"AMP": "yes"}, "AMP=yes: give 1"),
        ("train", {"LR": "2e-5"}, "LR=2e-5: Prodigy finds its rate"),
        ("train", {"WARMUP_STEPS": "500"}, "WARMUP_STEPS=500: Prodigy's step size grows from small by itself"),
        ("train", {"SCHEDULER": "cosine"}, "SCHEDULER=cosine is AdamW's: give wsd"),
        ("train", {"SCHEDULER": "linear"}, "SCHEDULER=linear: give wsd, none"),
        ("train", {"WSD_STABLE_RATIO": "80"}, "WSD_STABLE_RATIO=80: give the share of the run"),
        ("train", {"WSD_STABLE_RATIO": "0.8", "SCHEDULER": "none"}, "WSD_STABLE_RATIO=0.8 is for SCHEDULER=wsd"),
        ("train", {"WSD_MIN_LR_RATIO": "0.1"}, "WSD_MIN_LR_RATIO=0.1: the rate falls to zero"),
        ("train", {"GRAD_CLIP": "one"}, "GRAD_CLIP=one: give a number"),
        ("train", {"GRAD_CLIP": "0"}, "train.max_grad_norm 0"),
        ("train", {"EPOCHS": "10"}, "EPOCHS=10: the length is in steps: leave it out and set MAX_STEPS"),
        ("train", {"TIMEOUT_SECS": "3600"}, "`timeout -s INT 3600 bash scripts/train_ko_prodigy.sh`"),
        ("train", {"BEST_STEP_ROUND": "1000"}, "BEST_STEP_ROUND=1000: best weights are kept"),
        ("resume", {"RESUME": "adamw.pth", "LR": "2e-5"}, "LR=2e-5: Prodigy finds its rate"),
        ("train", {"RESUME": "auto"}, "use scripts/resume_ko_prodigy.sh"),
        ("resume", {}, "out has no checkpoint to continue from: start with scripts/train_ko_prodigy.sh"),
        ("resume", {"RESUME": "none.pth"}, "RESUME=none.pth: no such checkpoint"),
        ("resume", {"OPTIMIZER": "adamw"}, "this script resumes only Prodigy runs"),
        ("resume", {"RESUME": "adamw.pth"}, "adamw.pth is a checkpoint of adamw and this run uses prodigy"),
    ],
)
def test_mistake_is_one_line(folder: Path, name: str, variables: dict[str, str], message: str) -> None:
    state: dict[str, Any] = {"model": {}, "optimizer": {}, "optimizer_type": "adamw", "step": 3}
    write_checkpoint(state, folder / "adamw.pth")
    result = script(folder, name, **variables)
    assert result.returncode == 2
    # The tiny corpus has random ids, of which one is the unknown token.
    errors = [line for line in result.stderr.splitlines() if not line.startswith("tuner: warning: unknown tokens ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert not (folder / "out/latest.pth").exists()


def test_variables_of_the_original_training_are_settings(folder: Path) -> None:
    given = {"WEIGHT_DECAY": ".05", "GRAD_CLIP": "1", "TEXT_LOSS_WEIGHT": "0.1", "MEL_LOSS_WEIGHT": "0.9"}
    mapped = {"train.weight_decay": 0.05, "train.max_grad_norm": 1, "workload.text_loss_weight": 0.1}
    mapped |= {"workload.mel_loss_weight": 0.9}
    prodigy = given | {"WARMUP_STEPS": "0", "SCHEDULER": "wsd", "WSD_STABLE_RATIO": "0.9", "WSD_MIN_LR_RATIO": "0.0"}
    adamw = given | {"OPTIMIZER": "adamw", "LR": "2e-5", "WARMUP_STEPS": "500", "SCHEDULER": "cosine"}
    for variables, own in (
        (prodigy, {"train.warmup_steps": 0, "full.schedule": "wsd", "full.decay_fraction": 0.1}),
        (adamw, {"train.lr": 2e-5, "train.warmup_steps": 500, "full.schedule": "cosine"}),
    ):
        found = settings(arguments(folder, "train", **variables))
        usual = settings(arguments(folder, "train", OPTIMIZER=variables.get("OPTIMIZER", "")))
        assert {key: value for key, value in found.items() if key not in usual} == mapped | own


def test_defaults_are_those_of_the_original_training(folder: Path) -> None:
    found = arguments(folder, "train", **dict.fromkeys(GIVEN, ""))
    assert found[:4] == ["train", f"{ROOT}/studies/indextts2/study.toml", "--run-dir", f"{folder}/runs/ko_prodigy"]
    assert settings(found) == {
        "train.optimizer": "prodigy",
        "train.batch_size": 8,
        "train.grad_accumulation": 1,
        "train.num_workers": 32,
        "train.log_every": 200,
        "train.precision": "auto",
        "train.seed": 1234,
        "full.steps": 240_000,
        "full.eval_every": 80_000,
    }
