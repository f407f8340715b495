"""Samples a second that the loader alone delivers: .npy files with 0, 2 and 8 workers against the packed store.

    python -m scripts.bench.loader [--rounds 8] [--batches 200] [--json scripts/records/loader_cpu.json]

Reads the Korean demo corpus (`python -m studies.korean_demo.corpus` makes it) as training does: `train_batches` over a
`BatchOrder`, batches of 8, no model. The four ways are interleaved in every round, so that other load slows all of
them; speed-ups are medians over rounds. All files are in the page cache after the first round. Before the clock
starts, more batches are read than the workers prefetch; the cost of starting the workers is the first batch's time.
Packing is timed too, into a temporary folder.
"""

import argparse
import logging
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path

import torch

from scripts.bench.common import (
    DEMO_CORPUS,
    DEMO_STUDY,
    ROOT,
    Record,
    build_parser,
    read_demo_study,
    run_benchmark,
    summarize,
    summarize_ratio,
)
from studies.indextts2 import IndexTTS2
from studies.indextts2.dataset import Utterance
from trainer.data.batching import BatchOrder
from trainer.data.loader import train_batches
from trainer.data.packed import open_packed
from trainer.errors import UserError

BATCH_SIZE = 8
PREFETCHED = 4  # batches a worker, in `train_batches`
WAYS = {
    "npy, 0 workers": (False, 0),
    "npy, 2 workers": (False, 2),
    "npy, 8 workers": (False, 8),
    "packed, 0 workers": (True, 0),
}


def build_workload(corpus: Path, pack: bool) -> IndexTTS2:
    """The demo study's, on the corpus in that folder."""
    options = read_demo_study(corpus)["workload"]
    return IndexTTS2.model_validate(options | {"pack": pack}, context={"base_dir": DEMO_STUDY.parent})


def measure_round(work: IndexTTS2, num_workers: int, num_batches: int, seed: int) -> tuple[float, float]:
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


def measure_packing(work: IndexTTS2) -> float:
    """Samples a second, flushed to the disk."""
    data = work.train_data()
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        started = time.perf_counter()
        open_packed(data, Path(folder) / "store", digest="", build=Utterance._make, mode=True)
        return len(data) / (time.perf_counter() - started)


def measure(arguments: argparse.Namespace) -> Record:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # 8 workers on fewer cores are part of what is measured.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    works = {pack: build_workload(arguments.corpus, pack) for pack in (False, True)}
    try:
        num_samples = len(works[True].train_data())
    except UserError as error:
        raise UserError(f"{error} (python -m studies.korean_demo.corpus makes the corpus)") from None
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    firsts: dict[str, list[float]] = {name: [] for name in WAYS}
    packing = []
    measure_round(works[False], 0, arguments.batches, seed=0)  # into the page cache
    for number in range(arguments.rounds):
        for name, (pack, num_workers) in WAYS.items():
            speed, first = measure_round(works[pack], num_workers, arguments.batches, seed=number)
            speeds[name].append(speed)
            firsts[name].append(first)
        packing.append(measure_packing(works[False]))
    ours = speeds["packed, 0 workers"]
    return {
        "corpus": {"num_samples": num_samples, "width": works[True].gpt_config.model_dim},
        "batch_size": BATCH_SIZE,
        "batches_a_round": arguments.batches,
        "packing_samples_a_second": summarize(packing),
        "ways": {
            name: {
                "samples_a_second": summarize(speeds[name]),
                "first_batch_s": summarize(firsts[name]),
                "speedup_of_packed": summarize_ratio(ours, speeds[name]),
            }
            for name in WAYS
        },
    }


def format_table(record: Record) -> str:
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
    parser = build_parser(__doc__)
    parser.add_argument("--corpus", type=Path, default=DEMO_CORPUS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=200, help="timed in each round")
    run_benchmark(parser, measure, packages=("torch", "numpy"), format_table=format_table)


if __name__ == "__main__":
    main()
