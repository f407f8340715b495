"""The model is the published function, sample by sample, whatever else is in the batch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from studies.indextts2.dataset import Utterance
from studies.indextts2.model import NO_TARGET, GPTConfig, IndexTTS2GPT
from studies.indextts2.weights import ENCODERS
from studies.indextts2.workload import collate
from trainer.workload import Batch

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "unified_voice_small.json").read_text())
CONFIG = GPTConfig(**REFERENCE["config"])
WEIGHTS = {"text": 0.2, "mel": 0.8}


def reference_model(**options: object) -> IndexTTS2GPT:
    """Eval mode, with the weights that belong to `unified_voice_small.json`."""
    model = IndexTTS2GPT(CONFIG, **options).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            random = np.random.RandomState(zlib.crc32(key.encode()))
            values = random.standard_normal(tuple(tensor.shape)).astype(np.float32) * 0.05
            if key.endswith("weight") and (".ln_" in key or "norm" in key):
                values += 1
            tensor.copy_(torch.from_numpy(values))
    return model


def reference_utterance(sample: dict) -> Utterance:
    random = np.random.RandomState(sample["seed"])
    text = random.randint(2, CONFIG.number_text_tokens, sample["text_len"])
    codes = random.randint(0, CONFIG.start_mel_token, sample["code_len"])
    condition = (random.standard_normal((32, CONFIG.model_dim)) * 0.3).astype(np.float32)
    emo_vec = (random.standard_normal(CONFIG.model_dim) * 0.3).astype(np.float32)
    return Utterance(text, codes, condition, emo_vec)


UTTERANCES = [reference_utterance(sample) for sample in REFERENCE["samples"]]


def test_condition_dropout_zeroes_speaker_and_emotion_of_a_share_of_the_training_samples() -> None:
    model = reference_model(dropout=0.0, condition_dropout=0.25)
    inputs = collate(UTTERANCES[:1] * 400, CONFIG).inputs
    with torch.no_grad():
        prefix = model.train()._embed(inputs)[:, :32]
        whole = model.eval()._embed(inputs)[:, :32]
    zeroed = (prefix == 0).all(-1).all(-1)
    assert 0.15 < zeroed.float().mean() < 0.35
    assert torch.equal(prefix[~zeroed], whole[~zeroed]) and (whole != 0).all()


def only_row(batch: Batch, row: int) -> dict[str, torch.Tensor]:
    """The batch with the targets of one row alone; everything else is unchanged."""
    length = batch.num_slots // batch.num_samples
    inputs = dict(batch.inputs)
    for kind in ("text", "mel"):
        elsewhere = inputs[f"{kind}_index"] // length != row
        inputs[f"{kind}_targets"] = inputs[f"{kind}_targets"].masked_fill(elsewhere, NO_TARGET)
    return inputs


def assert_is_reference(model: IndexTTS2GPT, inputs: dict[str, torch.Tensor], sample: dict) -> None:
    sums = model(inputs)
    losses = {kind: sums[f"{kind}_loss"] / (inputs[f"{kind}_targets"] >= 0).sum() for kind in WEIGHTS}
    for kind, loss in losses.items():
        # Rounding differs by 5e-7; GELU by erf in place of tanh, which is another function, by 1e-5.
        assert loss.item() == pytest.approx(sample[f"{kind}_loss"], abs=5e-6)
    sum(WEIGHTS[kind] * loss for kind, loss in losses.items()).backward()  # type: ignore[union-attr]
    parameters = dict(model.named_parameters())
    for name, norm in sample["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-5), name  # type: ignore[union-attr]


@pytest.mark.parametrize("row", range(3))
def test_sample_alone_has_the_reference_losses_and_gradient_norms(row: int) -> None:
    batch = collate([UTTERANCES[row]], CONFIG)
    assert batch.num_tokens == batch.num_slots == 32 + 2 + batch.counts["text_loss"] + 1 + batch.counts["mel_loss"]
    assert_is_reference(reference_model(), batch.inputs, REFERENCE["samples"][row])


@pytest.mark.parametrize("pad_multiple", [1, 64])
@pytest.mark.parametrize("row", range(3))
def test_in_a_padded_batch_each_sample_has_the_reference_losses_and_gradient_norms(row: int, pad_multiple: int) -> None:
    batch = collate(UTTERANCES, CONFIG, pad_multiple)
    assert_is_reference(reference_model(), only_row(batch, row), REFERENCE["samples"][row])


def test_length_mode_differs_from_the_reference_function() -> None:
    sums = reference_model(duration="length")(collate(UTTERANCES[:1], CONFIG).inputs)
    mean = sums["mel_loss"].item() / (REFERENCE["samples"][0]["code_len"] + 1)
    assert mean != pytest.approx(REFERENCE["samples"][0]["mel_loss"], abs=1e-4)


def test_parameters_are_those_of_the_published_checkpoint() -> None:
    rows = [line.split("\t") for line in (HERE / "gpt_pth_keys.tsv").read_text().splitlines()[1:]]
    published = {key: tuple(map(int, shape.split("x"))) for key, shape, _ in rows if not key.startswith(ENCODERS)}
    with torch.device("meta"):
        model = IndexTTS2GPT(GPTConfig())
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(527.1e6, abs=5e4)


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = IndexTTS2GPT(GPTConfig(**{**REFERENCE["config"], "layers": 8}))
    parameters = dict(model.named_parameters())
    for name in (
        "text_embedding.weight",
        "mel_head.weight",
        "gpt.h.0.attn.c_attn.weight",
        "gpt.h.0.mlp.c_fc.weight",
    ):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("gpt.h.7.attn.c_proj.weight", "gpt.h.7.mlp.c_proj.weight"):
        assert parameters[name].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert not parameter.any(), name


def test_mel_top1_counts_the_codes_ranked_first_and_only_in_eval_mode() -> None:
    model = reference_model()
    batch = collate(UTTERANCES, CONFIG, 16)
    with torch.no_grad():
        sums = model(batch.inputs)
        hits = 0
        model.mel_head.register_forward_hook(lambda _, __, logits: predictions.append(logits.argmax(-1)))
        for utterance in UTTERANCES:
            predictions: list[torch.Tensor] = []
            model(collate([utterance], CONFIG).inputs)
            hits += int((predictions[0] == torch.tensor([*utterance.codes, CONFIG.stop_mel_token])).sum())
        assert 0 < hits == sums["mel_top1"].item()
        assert "mel_top1" not in model.train()(batch.inputs)


def test_dropout_acts_in_training_only_and_can_be_off() -> None:
    batch = collate(UTTERANCES, CONFIG)
    evaluated = reference_model()(batch.inputs)["mel_loss"]
    without = reference_model(dropout=0.0).train()(batch.inputs)["mel_loss"]
    with_dropout = reference_model(dropout=0.1).train()(batch.inputs)["mel_loss"]
    torch.testing.assert_close(without, evaluated)
    assert abs(with_dropout - evaluated) > 0.1


def test_gradient_checkpointing_gives_the_same_gradients_under_dropout() -> None:
    gradients = []
    for on in (False, True):
        model = reference_model(gradient_checkpointing=on).train()
        torch.manual_seed(3)
        kept_bytes = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept_bytes
            kept_bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sums = model(collate(UTTERANCES, CONFIG).inputs)
        (sums["text_loss"] + sums["mel_loss"]).backward()
        gradients.append(({name: p.grad for name, p in model.named_parameters()}, kept_bytes))
    for name, gradient in gradients[0][0].items():
        torch.testing.assert_close(gradients[1][0][name], gradient, msg=name)
    assert gradients[1][1] < gradients[0][1] / 2


def test_length_mode_gives_the_number_of_codes_as_a_clamped_mel_position() -> None:
    model = reference_model(duration="length")
    batch = collate(UTTERANCES, CONFIG)
    model(batch.inputs)["mel_loss"].backward()
    # speed_emb[1] gives way to the position after the last that the codes use; speed_emb[0] stays.
    assert not model.speed_emb.weight.grad[1].any()  # type: ignore[index]
    assert model.speed_emb.weight.grad[0].any()  # type: ignore[index]
    for utterance in UTTERANCES:
        model.zero_grad()
        model(collate([utterance], CONFIG).inputs)["mel_loss"].backward()
        used = model.mel_pos_embedding.emb.weight.grad.any(1).nonzero().flatten().tolist()  # type: ignore[union-attr]
        assert used == list(range(len(utterance.codes) + 2))
    table = model.mel_pos_embedding.emb.weight
    model.zero_grad()
    beyond = {**batch.inputs, "code_lengths": torch.full((3,), 10**6)}
    model(beyond)["mel_loss"].backward()
    assert table.grad is not None and table.grad[-1].any() and not table.grad[-2].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("duration", ["binary", "length"])
def test_no_value_is_read_on_the_host(training: bool, duration: str) -> None:
    batch = collate(UTTERANCES, CONFIG, 8)
    with FakeTensorMode() as mode:
        model = IndexTTS2GPT(CONFIG, duration=duration).train(training)  # type: ignore[arg-type]
        sums = model({name: mode.from_tensor(tensor) for name, tensor in batch.inputs.items()})
        sum(sums.values()).backward()  # type: ignore[union-attr]
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            sums["mel_loss"].item()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_forward_and_losses_compile_as_one_graph(gradient_checkpointing: bool) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = reference_model(dropout=0.0, gradient_checkpointing=gradient_checkpointing).train()
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    # The same padded sizes are the same shapes, so the second batch compiles nothing.
    for utterances in (UTTERANCES, [UTTERANCES[0], UTTERANCES[1], UTTERANCES[1]]):
        inputs = collate(utterances, CONFIG, 64).inputs
        torch.testing.assert_close(compiled(inputs), model(inputs))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_losses_are_summed_in_float32_under_bfloat16_autocast() -> None:
    batch = collate(UTTERANCES, CONFIG)
    exact = reference_model()(batch.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        sums = reference_model()(batch.inputs)
    for name in ("text_loss", "mel_loss"):
        assert sums[name].dtype == torch.float32
        assert sums[name].item() == pytest.approx(exact[name].item(), rel=0.02)


def test_published_configs_other_keys_are_accepted() -> None:
    config = GPTConfig.model_validate(
        {"model_dim": 64, "heads": 4, "condition_type": "conformer_perceiver", "checkpointing": False,
         "condition_module": {"output_size": 512}, "train_solo_embeddings": False}
    )  # fmt: skip
    assert (config.model_dim, config.layers) == (64, 24)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"heads": 7}, "model_dim 64 is not a multiple of heads 7"),
        ({"stop_mel_token": 66}, "stop_mel_token 66 is outside its table of 66 rows"),
        ({"layers": 0}, "greater than 0"),
    ],
)
def test_impossible_config_is_refused(change: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        GPTConfig(**{**REFERENCE["config"], **change})
