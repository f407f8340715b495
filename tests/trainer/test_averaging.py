from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Toy
from trainer import TrainConfig, UserError, train
from trainer.averaging import average_checkpoints
from trainer.checkpoint import read_checkpoint, write_checkpoint


def write(path: Path, **weights: Any) -> Path:
    write_checkpoint({"model": weights, "step": int(path.stem), "lineage": {"trial": 3}}, path)
    return path


def test_mean_is_computed_in_float32_and_integers_are_those_of_the_first(tmp_path: Path) -> None:
    # In bfloat16, where these are neighbours, the mean would never leave the first.
    values = [256.0, *[258.0] * 4]
    sources = [
        write(tmp_path / f"{i}.pth", half=torch.tensor([value], dtype=torch.bfloat16), count=torch.tensor([i]))
        for i, value in enumerate(values, 1)
    ]
    average_checkpoints(sources, tmp_path / "mean.pth")
    mean = read_checkpoint(tmp_path / "mean.pth")
    exact = torch.tensor([v.item() for v in (read_checkpoint(s)["model"]["half"] for s in sources)]).mean()
    assert mean["model"]["half"] == exact.to(torch.bfloat16) and mean["model"]["half"].dtype == torch.bfloat16
    assert mean["model"]["count"] == 1 and mean["step"] == 1
    assert mean["lineage"] == {"trial": 3, "averaged": [str(source) for source in sources]}


def test_mean_of_equal_weights_is_these(tmp_path: Path) -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    sources = [write(tmp_path / f"{i}.pth", weights=weights) for i in (1, 2, 3)]
    average_checkpoints(sources, tmp_path / "mean.pth")
    assert torch.equal(read_checkpoint(tmp_path / "mean.pth")["model"]["weights"], weights)


def test_average_starts_another_run(tmp_path: Path) -> None:
    train(Toy(), TrainConfig(steps=6, keep_every=2), run_dir=tmp_path / "run")
    average_checkpoints(sorted((tmp_path / "run").glob("milestone_*.pth")), tmp_path / "mean.pth")
    assert train(Toy(), TrainConfig(steps=2), run_dir=tmp_path / "other", init=tmp_path / "mean.pth").finished


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"b": torch.ones(2)}, "2.pth is of another model than .*1.pth: a is in .*1.pth only"),
        ({"a": torch.ones(3)}, r"2.pth is of another model than .*1.pth: a has the shapes \[2\] and \[3\]"),
        ({"a": 1}, "2.pth holds no weights by name"),
        ({"a": torch.tensor([1.0, torch.nan])}, "a is not finite in one of the checkpoints"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, weights: dict[str, Any], message: str) -> None:
    sources = [write(tmp_path / "1.pth", a=torch.ones(2)), write(tmp_path / "2.pth", **weights)]
    with pytest.raises(UserError, match=message):
        average_checkpoints(sources, tmp_path / "mean.pth")
    assert not (tmp_path / "mean.pth").exists()


def test_nothing_is_replaced_and_one_checkpoint_is_no_average(tmp_path: Path) -> None:
    one = write(tmp_path / "1.pth", a=torch.ones(2))
    with pytest.raises(UserError, match="at least two"):
        average_checkpoints([one], tmp_path / "mean.pth")
    with pytest.raises(UserError, match=r"1\.pth exists: choose another name"):
        average_checkpoints([one, one], one)
    with pytest.raises(UserError, match=r"mean\.safetensors: an average is a \.pth file"):
        average_checkpoints([one, one], tmp_path / "mean.safetensors")
    with pytest.raises(UserError, match="no folder"):
        average_checkpoints([one, one], tmp_path / "none" / "mean.pth")


def test_two_names_of_a_file_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint({"model": {"w": torch.tensor([0.0])}}, tmp_path / "a.pth")
    write_checkpoint({"model": {"w": torch.tensor([1.0])}}, tmp_path / "b.pth")
    (tmp_path / "c.pth").hardlink_to(tmp_path / "a.pth")
    assert average_checkpoints([tmp_path / f"{name}.pth" for name in "abc"], tmp_path / "mean.pth") == 2
    assert read_checkpoint(tmp_path / "mean.pth")["model"]["w"] == 0.5
    assert "c.pth is another name of" in caplog.text
