"""Records the learning curves that the strategies are judged on: every configuration of a grid, at full length.

    python -m scripts.bench.search.record [--grid demo] [--workers 2]

The IndexTTS-2 GPT of the Korean demo, narrower, so that a grid takes about an hour on 2 cores: batch size x d_coef x
training seed, each trained over `LENGTH` samples as `tuner promote` would train it and validated every `EVERY`
samples. Writes scripts/records/curves_GRID.json after each curve and continues it when run again. One thread a curve:
losses do not depend on other load; the seconds do, and are for orientation only.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scripts.bench.common import DEMO_STUDY, ROOT, build_parser, describe_command, read_demo_study, write_record
from scripts.bench.search.curves import find_curves
from studies.korean_demo.corpus import make_corpus
from trainer import Diverged, Evaluation, train
from tuner.spec.setups import full_setup
from tuner.spec.study_toml import StudySpec

BATCH_SIZES = (4, 8, 16, 32)
LENGTH, EVERY = 6_400, 200
VAL_SAMPLES = 100


@dataclass(frozen=True)
class Grid:
    """The model's size, the split of the corpus, the configurations and the training seeds."""

    model_dim: int
    layers: int
    d_coefs: tuple[float, ...]
    seeds: tuple[int, ...]
    exchanged: bool = False
    """Another split of the corpus: every fifth utterance of the training set is for validation."""

    def configurations(self) -> list[tuple[int, float, int]]:
        """(batch size, d_coef, seed), the coarse half of the grid first."""
        return [(b, d, s) for s in self.seeds for d in self.d_coefs for b in BATCH_SIZES]


GRIDS = {
    "demo": Grid(64, 3, (0.1, 0.18, 0.32, 0.56, 1.0, 1.8, 3.2, 5.6, 10.0), (0, 1)),
    "other": Grid(48, 2, (0.1, 0.32, 1.0, 3.2, 10.0), (2, 3), exchanged=True),
}


def build_spec(grid: Grid) -> StudySpec:
    """The Korean demo's study at the grid's size, over its corpus, with a full run of `LENGTH` samples."""
    folder = ROOT / f"data/korean_demo_{grid.model_dim}"
    make_corpus(folder, width=grid.model_dim)
    values = read_demo_study(folder)
    if grid.exchanged:
        for split, manifest in zip(("train", "val"), write_other_split(folder / "train_pairs.jsonl"), strict=True):
            values["workload"][f"{split}_manifests"] = [f"{manifest}::ko"]
    values["workload"]["gpt"] |= {"model_dim": grid.model_dim, "layers": grid.layers, "heads": 4}
    values["train"] |= {"val_samples": VAL_SAMPLES, "save_every": LENGTH}
    values["full"] = {"samples": LENGTH, "eval_every": EVERY}
    return StudySpec.build(values, base_dir=DEMO_STUDY.parent)


def write_other_split(manifest: Path) -> tuple[Path, Path]:
    """Write two manifests beside one: every fifth of its speakers' utterances for validation, none in both."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    targets = sorted({json.loads(line)["target_id"] for line in lines})
    held_out = set(targets[::5])
    parts: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        parts[json.loads(line)["target_id"] in held_out].append(line)
    paths = manifest.with_name("other_train_pairs.jsonl"), manifest.with_name("other_val_pairs.jsonl")
    for path, part in zip(paths, parts, strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def record_curve(task: tuple[StudySpec, tuple[int, float, int]]) -> dict[str, Any]:
    """Train one configuration over the whole length; its losses and d at each point of the grid.

    A run that diverges has a shorter curve, and the reason in `diverged`.
    """
    spec, (batch_size, d_coef, seed) = task
    torch.set_num_threads(1)
    losses: list[float] = []
    steps_d: list[float] = []
    end: dict[str, Any] = {}

    def on_eval(evaluation: Evaluation) -> None:
        losses.append(round(evaluation.metrics["val/loss"], 5))
        steps_d.append(float(f"{evaluation.d:.4g}"))
        end["seconds"] = round(evaluation.seconds, 2)

    params = {"train.batch_size": batch_size, "train.d_coef": d_coef}
    setup = full_setup(spec, params, seed=seed)
    with tempfile.TemporaryDirectory() as run_dir:
        try:
            train(setup.workload, setup.config, run_dir=run_dir, on_eval=on_eval)
        except Diverged as error:
            end["diverged"] = str(error)
    return {"batch_size": batch_size, "d_coef": d_coef, "seed": seed, "loss": losses, "d": steps_d, **end}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--grid", choices=GRIDS, default="demo")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="curves at a time")
    args = parser.parse_args()
    grid, path = GRIDS[args.grid], find_curves(args.grid)
    head = {
        "command": describe_command(),
        "torch": version("torch"),
        "metric": "val/loss",
        "length": LENGTH,
        "every": EVERY,
        "grid": {"batch_sizes": BATCH_SIZES, **asdict(grid)},
        "curves": [],
    }
    head = json.loads(json.dumps(head))
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else head
    # The command may have had another name or number of workers.
    if changed := [key for key in head if key not in ("command", "curves") and record.get(key) != head[key]]:
        sys.exit(f"{path} was recorded with another {', '.join(changed)}: move it away to record it again.")
    done = {(c["batch_size"], c["d_coef"], c["seed"]) for c in record["curves"]}
    missing = [configuration for configuration in grid.configurations() if configuration not in done]
    if not missing:
        print(f"{path}: all {len(done)} curves are recorded")
        return
    spec, started = build_spec(grid), time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for curve in pool.imap_unordered(record_curve, [(spec, configuration) for configuration in missing]):
            record["curves"].append(curve)
            record["curves"].sort(key=lambda each: (each["seed"], each["batch_size"], each["d_coef"]))
            write_record(path, record, rows="curves")
            name = f"batch size {curve['batch_size']}, d_coef {curve['d_coef']:g}, seed {curve['seed']}"
            value, total = (curve["loss"] or [float("nan")])[-1], len(done) + len(missing)
            seconds = time.monotonic() - started
            print(f"{len(record['curves'])} of {total}: {name}: {value:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
