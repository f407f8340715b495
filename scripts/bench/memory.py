"""The memory estimate (`trainer.memory`) against measured peaks, and the needs of the real model on a 24 GB card.

    python -m scripts.bench.memory [--cases N] [--json scripts/records/memory_cpu.json]

Each size is measured in a new process: two optimizer steps in float32 on a batch of equally long utterances and one
validation, and the peak of resident memory (VmHWM of /proc/self/status, reset through /proc/self/clear_refs) above
the process's memory after training a first tiny model, so that libraries and kernels are loaded. glibc returns every
block of 64 KB or more at once (MALLOC_MMAP_THRESHOLD_=65536), so that resident memory is that of the tensors. The
estimate is made in this process, without allocating. Memory does not depend on speed: other load changes nothing.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.bench.common import Record, build_parser, read_memory, run_benchmark, run_child, summarize
from studies.indextts2.dataset import Utterance, utterance_length
from studies.indextts2.model import NUM_CONDITION
from studies.indextts2.workload import IndexTTS2
from trainer.config import TrainConfig
from trainer.evaluation import evaluate
from trainer.memory import MemoryEstimate, Probe
from trainer.optimizers import build_optimizer, update

GB = 1e9
CARD = 23.6 * 2**30
"""Bytes that an RTX 4090 reports of its 24 GB."""
SIZES = ((256, 6), (384, 8), (512, 8))
BATCH_SIZES = (4, 8, 16)
PIECES = 2_000


class LikeUtterances(IndexTTS2):
    """The model on random utterances of one length."""

    text_length: int
    code_length: int
    num_train: int = 64
    num_val: int = 16

    def train_data(self) -> "Utterances":
        return Utterances(self, self.num_train)

    def val_data(self) -> "Utterances":
        return Utterances(self, self.num_val)


class Utterances:
    def __init__(self, workload: LikeUtterances, number: int) -> None:
        self.workload = workload
        self.lengths = np.full(number, utterance_length(workload.text_length, workload.code_length))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Utterance:
        work, random = self.workload, np.random.default_rng(index)
        config = work.gpt_config
        return Utterance(
            random.integers(2, config.number_text_tokens, work.text_length, np.int32),
            random.integers(0, config.num_codes, work.code_length, np.int32),
            random.standard_normal((NUM_CONDITION, config.model_dim), np.float32),
            random.standard_normal(config.model_dim, np.float32),
        )


def build_case(
    width: int, layers: int, *, batch_size: int, checkpointing: bool, slice_p: int = 1, optimizer: str = "prodigy",
    dropout: float = 0.0, heads: int | None = None, pieces: int = PIECES, text: int = 40, codes: int = 160,
) -> dict[str, Any]:  # fmt: skip
    """A workload's options and a configuration, as plain values for the child process."""
    gpt = {"model_dim": width, "layers": layers, "heads": heads or width // 64, "number_text_tokens": pieces}
    return {
        "workload": {
            "train_manifests": ["none"], "val_manifests": ["none"], "gpt": gpt, "dropout": dropout,
            "gradient_checkpointing": checkpointing, "text_length": text, "code_length": codes,
        },
        "config": {"steps": 2, "batch_size": batch_size, "slice_p": slice_p, "optimizer": optimizer},
    }  # fmt: skip


def build_cases() -> list[dict[str, Any]]:
    every = itertools.product(SIZES, BATCH_SIZES, (False, True))
    rows = [build_case(*size, batch_size=n, checkpointing=c) for size, n, c in every]
    rows += [build_case(*size, batch_size=8, checkpointing=c, slice_p=11) for size in SIZES for c in (False, True)]
    rows += [build_case(384, 8, batch_size=8, checkpointing=c, dropout=0.1) for c in (False, True)]
    rows += [build_case(384, 8, batch_size=8, checkpointing=c, optimizer="adamw") for c in (False, True)]
    return rows


def build(values: dict[str, Any]) -> tuple[LikeUtterances, TrainConfig]:
    return LikeUtterances.model_validate(values["workload"]), TrainConfig.model_validate(values["config"])


def train_and_evaluate(values: dict[str, Any]) -> tuple[int, int]:
    """Two steps and a validation, as the training loop runs them: peak bytes of each."""
    reset_peak()
    workload, config = build(values)
    model = workload.build_model().train()
    optimizer = build_optimizer(model, config)
    data = workload.train_data()
    for step in range(2):
        batch = workload.collate([data[step * config.batch_size + i] for i in range(config.batch_size)])
        sums = workload.loss_sums(model, batch.inputs)
        terms = [weight * sums[name] / batch.counts[name] for name, weight in workload.loss_weights.items()]
        torch.autograd.backward(torch.stack(terms).sum())
        update(optimizer, lr=config.base_lr, max_grad_norm=config.max_grad_norm)
        optimizer.zero_grad()
        del batch, sums, terms
    training = read_memory("VmHWM")
    reset_peak()
    val_data = workload.val_data()
    batches = [workload.collate([val_data[i] for i in range(len(val_data))])]
    evaluate(workload, model, batches, device=torch.device("cpu"), precision="fp32")
    return training, read_memory("VmHWM")


def reset_peak() -> None:
    """Reset VmHWM to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_case(values: dict[str, Any]) -> tuple[int, int]:
    """In this process: bytes of the two peaks above its memory before."""
    train_and_evaluate(build_case(64, 1, batch_size=1, checkpointing=values["workload"]["gradient_checkpointing"]))
    before = read_memory("VmRSS")
    training, evaluation = train_and_evaluate(values)
    return training - before, evaluation - before


def compare(values: dict[str, Any]) -> dict[str, Any]:
    workload, config = build(values)
    estimated = Probe(workload, config, device="cpu", precision="fp32").estimate()
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    training, evaluation = run_child(measure_case, values, environment=environment)
    estimated_training = max(estimated.training_peak, estimated.step_peak)
    gpt = values["workload"]["gpt"]
    row = {
        "width": gpt["model_dim"],
        "layers": gpt["layers"],
        **values["config"],
        "gradient_checkpointing": values["workload"]["gradient_checkpointing"],
        "dropout": values["workload"]["dropout"],
        **describe_estimate(estimated),
        "measured_training": training,
        "measured_evaluation": evaluation,
        "training_ratio": estimated_training / training,
        "evaluation_ratio": estimated.evaluation_peak / evaluation,
    }
    print(
        f"{row['width']:6}{row['layers']:4}{row['batch_size']:5}{row['slice_p']:4} {row['optimizer']:8}"
        f"{'ckpt' if row['gradient_checkpointing'] else '-':5}{row['dropout']:5}{estimated_training / 1e6:10.0f}"
        f"{training / 1e6:10.0f}{row['training_ratio']:8.3f}{estimated.evaluation_peak / 1e6:10.0f}"
        f"{evaluation / 1e6:10.0f}{row['evaluation_ratio']:8.3f}",
        flush=True,
    )
    return row


def describe_estimate(estimate: MemoryEstimate) -> dict[str, int]:
    return {**vars(estimate), "peak": estimate.peak, "total": estimate.total, "checkpoint": estimate.checkpoint}


def estimate_full_size() -> list[dict[str, Any]]:
    """The published model, its longest utterances, bf16 on a 24 GB card: estimates only."""
    rows = []
    for checkpointing, slice_p in itertools.product((False, True), (1, 11)):
        values = build_case(
            1280, 24, batch_size=8, checkpointing=checkpointing, slice_p=slice_p, dropout=0.1, heads=20, pieces=16_000,
            text=600, codes=1815,
        )  # fmt: skip
        workload, config = build(values)
        probe = Probe(workload, config, device="cuda", precision="bf16")
        estimates = [probe.estimate(batch_size) for batch_size in (4, 8, 16, 32)]
        largest = probe.largest_batch_size(CARD)
        rows += [
            {
                "gradient_checkpointing": checkpointing, "slice_p": slice_p, "fits": e.fits(CARD),
                "largest_batch_size": largest, **describe_estimate(e),
            }
            for e in estimates
        ]  # fmt: skip
        for row in rows[-4:]:
            print(
                f"{'ckpt' if checkpointing else '-':6}slice_p {slice_p:2}  batch {row['batch_size']:2}"
                f"{row['total'] / GB:8.1f} GB {'fits' if row['fits'] else 'does not fit'}; parameters"
                f" {row['parameters'] / GB:.2f}, gradients {row['gradients'] / GB:.2f}, optimizer"
                f" {row['optimizer_state'] / GB:.2f}, activations {row['activations'] / GB:.2f}, validation"
                f" {row['evaluation_peak'] / GB:.2f}; largest batch {row['largest_batch_size']}",
                flush=True,
            )
    return rows


def measure(arguments: argparse.Namespace) -> Record:
    print("\nfull size, bf16 on a card of 24 GB")
    card = estimate_full_size()
    print("\nestimated against measured, MB; training, then validation")
    print(
        f"{'width':>6}{'lay':>4}{'batch':>5}{'p':>4} {'':13}{'drop':>5}" + f"{'est.':>10}{'meas.':>10}{'ratio':>8}" * 2
    )
    rows = [compare(values) for values in build_cases()[: arguments.cases]]
    ratios = {name: summarize([row[name] for row in rows]) for name in ("training_ratio", "evaluation_ratio")}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['min']:.3f} to {ratio['max']:.3f}, median {ratio['median']:.3f}")
    return {
        "estimate_over_measured": ratios,
        "measured_cpu_fp32": rows,
        "estimated_full_size_cuda_bf16": {"card_bytes": int(CARD), "rows": card},
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--cases", type=int, help="measure only the first N cases")
    run_benchmark(parser, measure, packages=("torch", "prodigyopt"))


if __name__ == "__main__":
    main()
