"""Samples a second that the loader alone delivers: .npy files with 0, 2 and 8 workers against the packed store.

    python scripts/bench_loader.py [--rounds 8] [--batches 200] [--json scripts/records/loader_cpu.json]

Reads the Korean demo corpus (`python -m studies.korean_demo.corpus` makes it) as training does: `train_batches` over a
`BatchOrder`, batches of 8, no model. The four ways take turns in every round, so that a busy machine slows all of
them; speed-ups are medians over rounds. All files are in the page cache after the first round. Before the clock
starts, more batches are taken than workers can have read ahead; what starting them costs is the first batch's time.
Packing is timed too, into a temporary folder.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import tomllib
import warnings
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies.indextts2 import IndexTTS2
from studies.indextts2.dataset import Utterance
from trainer.batching import BatchOrder
from trainer.errors import UserError
from trainer.loader import train_batches
from trainer.packed import packed

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 8
PREFETCHED = 4  # batches a worker, in `train_batches`
WAYS = {
    "npy, 0 workers": (False, 0),
    "npy, 2 workers": (False, 2),
    "npy, 8 workers": (False, 8),
    "packed, 0 workers": (True, 0),
}


def workload(corpus: Path, pack: bool) -> IndexTTS2:
    """The demo study's, on the corpus in that folder."""
    study = ROOT / "studies/korean_demo/study.toml"
    options = tomllib.loads(study.read_text(encoding="utf-8"))["workload"]
    for split in ("train", "val"):
        options[f"{split}_manifests"] = [f"{corpus.resolve()}/{split}_pairs.jsonl::ko"]
    options["tokenizer"] = corpus.resolve() / "tokenizer.model"
    return IndexTTS2.model_validate(options | {"pack": pack}, context={"base_dir": study.parent})


def one_round(work: IndexTTS2, num_workers: int, num_batches: int, seed: int) -> tuple[float, float]:
    """(samples a second, seconds until the first batch)."""
    data = work.train_data()
    order = BatchOrder(data.lengths, BATCH_SIZE, seed=seed)
    started = time.perf_counter()
    batches = train_batches(work, data, order, start=(0, 0), num_workers=num_workers, device=torch.device("cpu"))
    next(batches)
    first = time.perf_counter() - started
    for _ in islice(batches, num_workers * PREFETCHED + 8):
        pass
    started = time.perf_counter()
    num_samples = sum(batch.num_samples for batch in islice(batches, num_batches))
    return num_samples / (time.perf_counter() - started), first


def pack_once(work: IndexTTS2) -> float:
    """Samples a second, flushed to the disk."""
    data = work.train_data()
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        started = time.perf_counter()
        packed(data, Path(folder) / "store", digest="", build=Utterance._make, mode=True)
        return len(data) / (time.perf_counter() - started)


def summary(values: list[float]) -> dict[str, float]:
    low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2
    return {"median": statistics.median(values), "min": min(values), "q1": low, "q3": high, "runs": len(values)}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Of what was measured in the same round, so that a busy machine slows both."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def measure(corpus: Path, rounds: int, num_batches: int) -> dict[str, object]:
    works = {pack: workload(corpus, pack) for pack in (False, True)}
    before = os.getloadavg()
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    firsts: dict[str, list[float]] = {name: [] for name in WAYS}
    packing = []
    one_round(works[False], 0, num_batches, seed=0)  # into the page cache
    for number in range(rounds):
        for name, (pack, num_workers) in WAYS.items():
            speed, first = one_round(works[pack], num_workers, num_batches, seed=number)
            speeds[name].append(speed)
            firsts[name].append(first)
        packing.append(pack_once(works[False]))
    ours = speeds["packed, 0 workers"]
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "numpy")} | {"python": platform.python_version()},
        "device": describe(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "corpus": {"num_samples": len(works[True].train_data()), "width": works[True].gpt_config.model_dim},
        "batch_size": BATCH_SIZE,
        "batches_a_round": num_batches,
        "packing_samples_a_second": summary(packing),
        "ways": {
            name: {
                "samples_a_second": summary(speeds[name]),
                "first_batch_s": summary(firsts[name]),
                "speedup_of_packed": ratio(ours, speeds[name]),
            }
            for name in WAYS
        },
    }


def describe() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def table(record: dict) -> str:
    packing = record["packing_samples_a_second"]
    lines = [
        f"{record['corpus']['num_samples']:,} samples, {record['device']}; packing {packing['median']:,.0f} samples/s",
        f"{'':19}{'samples/s':>11}{'quartiles':>19}{'packed is':>11}{'first batch ms':>16}",
    ]
    for name, row in record["ways"].items():
        speed = row["samples_a_second"]
        spread = f"{speed['q1']:,.0f}-{speed['q3']:,.0f}"
        faster = f"{row['speedup_of_packed']['median']:.1f}x"
        lines.append(
            f"{name:19}{speed['median']:11,.0f}{spread:>19}{faster:>11}{1e3 * row['first_batch_s']['median']:16.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/korean_demo")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=200, help="timed in each round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # 8 workers on fewer cores are part of what is measured.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    try:
        record = measure(arguments.corpus, arguments.rounds, arguments.batches)
    except UserError as error:
        sys.exit(f"{error} (python -m studies.korean_demo.corpus makes the corpus)")
    print(table(record))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
