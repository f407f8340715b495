"""A trained GPT leaves in the form of its base checkpoint, and nothing else changes on the way."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from studies.indextts2 import IndexTTS2
from studies.indextts2.weights import ENCODERS, TEXT_ROWS, count_pieces, published_name, read_weights
from tests.studies.test_weights import new_model, tokenizers, with_aliases, with_lora  # noqa: F401
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import TrainConfig, UserError
from trainer.checkpoint import read_checkpoint
from tuner.promotion.export import export
from tuner.spec.setups import Setup
from tuner.study.tracked_run import Runtime, tracked_train

KEYS = [
    line.split("\t")[:2]
    for line in (Path(__file__).parent / "gpt_pth_keys.tsv").read_text(encoding="utf-8").splitlines()[1:]
]
DTYPES = (torch.float32, torch.float16, torch.int64)


def published(**changes: int) -> dict[str, Tensor]:
    """Every key of the published `gpt.pth`, in its order, 32 wide; its encoders in several dtypes."""
    trained = new_model(seed=0, layers=24, **changes).state_dict()
    torch.manual_seed(3)
    state = {}
    for number, (key, shape) in enumerate(KEYS):
        small = [1 + int(size) % 7 for size in shape.split("x")]
        state[key] = trained[key] if key in trained else torch.randn(small).mul(9).to(DTYPES[number % len(DTYPES)])
    return state


def content_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert content_of(found[key]) == content_of(tensor), key


def workload(folder: Path, **options: Any) -> IndexTTS2:
    given = {
        "train_manifests": ["train_pairs.jsonl"],
        "val_manifests": ["val_pairs.jsonl"],
        "gpt": TINY_GPT | {"layers": 24},
        "base_checkpoint": "gpt.pth",
    }
    return IndexTTS2.model_validate(given | options, context={"base_dir": folder})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path, num_train=16, num_val=4, num_text_tokens=20)
    return tmp_path


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_keys_are_all_of_the_published_file() -> None:
    assert len(published()) == len(KEYS) == 665
    assert sum(key.startswith(ENCODERS) for key, _ in KEYS) == 665 - len(new_model(layers=24).state_dict())


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {"model": state, "step": 3},
        lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        lambda state: {"model": with_aliases(with_lora(state))},
        lambda state: {key: t.half() if t.is_floating_point() else t for key, t in state.items()},
    ],
)
def test_loading_and_exporting_changes_nothing(
    tmp_path: Path, form: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    content = form(published())
    torch.save(content, tmp_path / "gpt.pth")
    work = workload(tmp_path)
    work.export_weights(work.build_model().state_dict(), tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(found) == ["model"] if "model" in content else len(found) == 665
    expected = {
        name: tensor
        for key, tensor in content.get("model", content).items()
        if (name := published_name(key)) is not None
    }
    assert sorted(expected) == sorted(published())
    assert_same(found.get("model", found), expected)


def test_exported_run_replaces_the_trained_part_alone(
    corpus: Path,
    tokenizers: tuple[Path, Path],  # noqa: F811
) -> None:
    base = published(number_text_tokens=count_pieces(tokenizers[0]))
    torch.save(base, corpus / "gpt.pth")
    options = {"tokenizer": str(tokenizers[1]), "base_tokenizer": str(tokenizers[0]), "freeze": ["gpt.h.3."]}
    setup = Setup(workload(corpus, **options), TrainConfig(steps=2, batch_size=4, eval_every=4, precision="fp32"))
    runtime = Runtime(corpus / "runs", track=False)
    run_dir = corpus / "runs/it"
    tracked_train(setup, run_dir, runtime, experiment="it", lineage={"spec": "none"})

    done = export(run_dir, corpus / "out.pth")
    assert (done.checkpoint, done.num_bytes) == (run_dir / "best_mel_model.pth", os.path.getsize(corpus / "out.pth"))
    trained = read_checkpoint(run_dir / "best_mel_model.pth")["model"]
    found = torch.load(corpus / "out.pth", weights_only=True)
    assert_same(found, base | trained)
    changed = {key for key, tensor in base.items() if content_of(found[key]) != content_of(tensor)}
    assert changed and not any(key.startswith((*ENCODERS, "gpt.h.3.")) for key in changed)
    assert {len(found[key]) for key in TEXT_ROWS} == {count_pieces(tokenizers[1]) + 1}

    export(run_dir, corpus / "out.safetensors", checkpoint="latest")
    latest = read_checkpoint(run_dir / "latest.pth")["model"]
    assert_same(
        dict(sorted(safetensors.torch.load_file(corpus / "out.safetensors").items())),
        dict(sorted((base | latest).items())),
    )


def test_dropped_keys_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(with_aliases(with_lora(published())), tmp_path / "gpt.pth")
    work = workload(tmp_path)
    state = work.build_model().state_dict()
    caplog.clear()
    caplog.set_level(logging.INFO)
    work.export_weights(state, tmp_path / "out.pth")
    assert "dropped 4 keys: gpt.h.0.attn.c_attn.lora_A.default.weight, inference_model." in caplog.text
    assert "gpt.wte.weight" in caplog.text


@pytest.mark.parametrize("base", [None, "gpt.pth"])
def test_trained_keys_alone_are_written_without_encoders_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, base: str | None
) -> None:
    caplog.set_level(logging.INFO)
    model = new_model(layers=24)
    torch.save(model.state_dict(), tmp_path / "gpt.pth")
    state = {f"_orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    workload(tmp_path, base_checkpoint=base).export_weights(state, tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), dict(model.state_dict()))
    assert f"only the {len(state)} trained keys are written" in caplog.text


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        (lambda state: {key: t for key, t in state.items() if ".h.7." not in key}, "12 missing (gpt.h.7."),
        (lambda state: state | {"mel_head.bias": torch.zeros(3)}, "1 mis-shaped (mel_head.bias is 3"),
        (lambda state: state | {"_orig_mod.emo_layer.bias": torch.zeros(3)}, "holds emo_layer.bias twice"),
    ],
)
def test_base_checkpoint_of_another_model_is_refused(
    tmp_path: Path, base: Callable[[dict[str, Tensor]], dict[str, Tensor]], complaint: str
) -> None:
    torch.save(base(published()), tmp_path / "gpt.pth")
    with pytest.raises(UserError) as caught:
        workload(tmp_path).export_weights(new_model(layers=24).state_dict(), tmp_path / "out.pth")
    assert complaint in str(caught.value)
    assert not (tmp_path / "out.pth").exists()


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not weights of the IndexTTS-2 GPT"):
        workload(tmp_path).export_weights({"weight": torch.zeros(2)}, tmp_path / "out.pth")


@pytest.mark.parametrize("format", ["pth", "safetensors"])
@pytest.mark.parametrize("large", [False, True])
def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path, format: Any, large: bool) -> None:
    torch.save(published(), tmp_path / "gpt.pth")
    (tmp_path / "out").write_text("old")
    state = new_model(layers=24).state_dict()
    # The zip writer fails in another way where the disk fills up within one large tensor.
    work = workload(tmp_path, base_checkpoint=None) if large else workload(tmp_path)
    if large:
        state["text_head.weight"] = torch.zeros(1_000_000)
    with full_disk(200_000), pytest.raises(UserError, match=r"could not be written .*it needs \d\.\d MB") as caught:
        work.export_weights(state, tmp_path / "out", format=format)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt.pth", "out"]


def test_base_checkpoint_itself_may_be_replaced(tmp_path: Path) -> None:
    base = published()
    torch.save(base, tmp_path / "gpt.pth")
    trained = new_model(seed=5, layers=24).state_dict()
    workload(tmp_path).export_weights(trained, tmp_path / "gpt.pth")
    assert_same(torch.load(tmp_path / "gpt.pth", weights_only=True), base | dict(trained))


def test_input_file_of_the_run_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    torch.save(published(), corpus / "gpt.pth")
    runtime = Runtime(tmp_path / "runs", track=False)
    config = TrainConfig(steps=1, batch_size=2, device="cpu")
    tracked_train(Setup(workload(corpus), config), tmp_path / "run", runtime, experiment="it", lineage={})
    with pytest.raises(UserError, match="is a file that the run was made from"):
        export(tmp_path / "run", corpus / "gpt.pth", force=True)


def test_odd_missing_and_extra_encoder_keys_load_and_leave_as_they_are(tmp_path: Path) -> None:
    base = published()
    del base["emo_layer.weight"]
    base["perceiver_encoder.latents"] = torch.zeros(2, 3, 4)
    base["emo_conditioning_encoder.new.bias"] = torch.ones(5)
    torch.save(base, tmp_path / "gpt.pth")
    work = workload(tmp_path)
    work.export_weights(work.build_model().state_dict(), tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), base)


def test_best_checkpoint_counts_as_a_training_checkpoint(tmp_path: Path) -> None:
    # Its text rows have been moved already, though it holds no optimizer.
    torch.save({"model": new_model().state_dict(), "identity": {}, "metrics": {}}, tmp_path / "best_mel_model.pth")
    assert read_weights(tmp_path / "best_mel_model.pth").is_training_checkpoint
