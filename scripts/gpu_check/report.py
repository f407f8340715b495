"""From the records of the stages to verdicts and one page. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scripts.bench.roofline import Batch, Model, find_gpu, step_ms

Record = Mapping[str, Any]
Goal = dict[str, Any]
MFU = {"H100": 0.45, "H200": 0.45}
"""Goal by name of the device; 0.55 for all others."""
OVER_BOUND, FIRST_STEP_S, STALL_SHARE, SAVE_EVERY = 1.2, 60.0, 0.01, 1000
KERNEL_ERROR = 1e-4
LEFT_BYTES = 50e6


def judge(stages: Mapping[str, Record]) -> list[Goal]:
    """Each goal: `goal`, `wanted`, `found`, and whether it `held`; None where it was not measured."""
    goals: list[Goal] = []
    device = stages.get("ceilings", {}).get("device", {}).get("name", "")

    def add(goal: str, stage: str, wanted: str, judged: Any) -> None:
        record = stages.get(stage, {})
        try:
            found, held = judged(record) if "failed" not in record and record else (record.get("failed", ""), None)
        except (LookupError, ValueError):  # the record lacks what the goal needs
            found, held = "", None
        goals.append({"goal": goal, "wanted": wanted, "found": found or "not measured", "held": held})

    share = next((share for name, share in MFU.items() if name in device), 0.55)
    add("Prodigy's kernels equal PyTorch's operations", "kernels", f"within {KERNEL_ERROR:g}, NaN skipped", _kernels)
    for name in ("eager", "compiled"):
        add(f"waits between log lines, {name}", name, "0", lambda r: (str(sum(r["waits"].values())), not r["waits"]))
    add("compilations of a run", "compiled", "1, no break", _graphs)
    add("MFU on real tokens, batch 8", "compiled", f"{share:.0%}", lambda r: (f"{r['mfu']:.1%}", r["mfu"] >= share))
    add("first step with a warm cache", "warm", f"under {FIRST_STEP_S:.0f} s", _first_step)
    add("Prodigy's update while d rests, over its bound", "optimizer", f"{OVER_BOUND}", lambda r: _bound(r, stages))
    add(f"stall by checkpoints, every {SAVE_EVERY:,} steps", "checkpoint", "under 1%", lambda r: _stall(r, stages))
    add("first loss after a continuation", "checkpoint", "equal", _continuation)
    add("left after an out-of-memory error", "out_of_memory", f"under {LEFT_BYTES / 1e6:.0f} MB", _left)
    add("memory estimate over the peak, batch 8", "out_of_memory", "at least 1", lambda r: _estimate(r, stages))
    return goals


def _kernels(record: Record) -> tuple[str, bool]:
    rows = list(record["slices"].values())
    worst = max(max(row["parameters_differ_by"], row["d_differs_by"]) for row in rows)
    skipped = all(row["nan_skipped"] for row in rows)
    return f"{worst:.1e}{'' if skipped else ', NaN not skipped'}", worst < KERNEL_ERROR and skipped


def _graphs(record: Record) -> tuple[str, bool]:
    graphs, breaks = record["graphs"], record["graph_breaks"]
    return f"{graphs}, {breaks} breaks", (graphs, breaks) == (1, 0)


def _first_step(record: Record) -> tuple[str, bool]:
    return f"{record['first_step_s']:.0f} s", record["first_step_s"] < FIRST_STEP_S


def _bound(record: Record, stages: Mapping[str, Record]) -> tuple[str, bool]:
    bound = 1e3 * record["bytes"]["rests"] / stages["ceilings"]["copy_bytes_a_second"]
    ratio = record["rests_ms, slice_p 1"] / bound
    return f"{ratio:.2f}", ratio <= OVER_BOUND


def _stall(record: Record, stages: Mapping[str, Record]) -> tuple[str, bool]:
    ms = next(stages[name]["ms_a_step"] for name in ("compiled", "eager") if "ms_a_step" in stages.get(name, {}))
    # The first one also page-locks its buffers.
    share = 1e3 * record["stalls_s"][-1] / (SAVE_EVERY * ms)
    return f"{share:.2%}", share < STALL_SHARE


def _continuation(record: Record) -> tuple[str, bool]:
    difference = record["first_loss_differs_by"]
    return f"differs by {difference:.1e}; later ones by {record['losses_differ_by']:.1e}", difference == 0


def _left(record: Record) -> tuple[str, bool]:
    left = record["left_bytes"]["allocated"]
    return f"{left / 1e6:.0f} MB", bool(record["recognized"] and left < LEFT_BYTES and record["losses_after"])


def _estimate(record: Record, stages: Mapping[str, Record]) -> tuple[str, bool]:
    # JSON's keys are text.
    estimates = {str(size): total for size, total in record["estimated_bytes"].items()}
    ratio = estimates["8"] / stages["eager"]["peak_bytes"]["reserved"]
    return f"{ratio:.2f}", ratio >= 1


def format_page(stages: Mapping[str, Record], head: Record) -> Iterator[str]:
    """The page: verdicts, speeds, where the time went, and what failed."""
    yield "# GPU check"
    yield ""
    yield f"`{head.get('command', '')}`: {head.get('device', '')}; torch {head.get('versions', {}).get('torch', '')}."
    yield ""
    yield "| goal | wanted | found | |"
    yield "|---|---|---|---|"
    for goal in judge(stages):
        verdict = {True: "held", False: "**missed**", None: ""}[goal["held"]]
        yield f"| {goal['goal']} | {goal['wanted']} | {goal['found']} | {verdict} |"
    yield from _speeds(stages)
    yield from _parts(stages)
    yield from _table(stages.get("table", {}))
    for name, record in stages.items():
        if "failed" in record:
            yield ""
            yield f"## {name}: {record['failed']}"
            yield ""
            yield "```"
            yield from str(record.get("tail", "")).splitlines()[-15:]
            yield "```"


def _speeds(stages: Mapping[str, Record]) -> Iterator[str]:
    if not any("first_step_s" in record for record in stages.values()):
        return
    yield ""
    yield "| run | ms a step | MFU | TFLOP/s | graphs | first step, s | kernels a step | busy | peak, GB |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, record in stages.items():
        if "first_step_s" not in record:
            continue
        profile, peak = record.get("profile", {}), record.get("peak_bytes", {}).get("reserved")
        cells = [
            f"{record['ms_a_step']:.1f}" if "ms_a_step" in record else "",
            f"{record['mfu']:.1%}" if "mfu" in record else "",
            f"{record['flops_a_second'] / 1e12:.1f}" if "flops_a_second" in record else "",
            str(record["graphs"]),
            f"{record['first_step_s']:.1f}",
            str(profile.get("kernels_a_step", "")),
            f"{profile['busy_share']:.0%}" if profile else "",
            f"{peak / 1e9:.1f}" if peak else "",
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def _parts(stages: Mapping[str, Record]) -> Iterator[str]:
    """Where the time went, beside the least by arithmetic."""
    gpu = find_gpu(stages.get("ceilings", {}).get("device", {}).get("name", ""))
    if gpu:
        least = ", ".join(f"{part} {ms:.1f}" for part, ms in step_ms(Model(), Batch(), gpu).items())
        yield ""
        yield f"Least ms of a compiled step at batch 8 by arithmetic: {least}."
    for name, record in stages.items():
        if profile := record.get("profile"):
            kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in profile["ms_by_kind"].items())
            longest = "; ".join(f"{kernel[:60]} x{count} {ms:.2f}" for kernel, count, ms in profile["longest"][:5])
            yield ""
            yield f"{name}, ms a step by kind: {kinds}. Longest kernels: {longest}."


def _table(record: Record) -> Iterator[str]:
    if rows := record.get("rows"):
        yield ""
        yield "| tuner bench | real tokens/s | speed-up | |"
        yield "|---|---:|---:|---|"
        for row in rows:
            rate, gain = row["tokens_per_second"], row["speedup"]
            figures = f"{rate:,.0f} | {gain:.2f}" if rate and gain else " | "
            yield f"| {row['name']} | {figures} | {row['note'].partition(':')[0]} |"
