"""`tuner bench`: every row trains the same thing, and the figures follow from the rounds."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from studies.indextts2 import IndexTTS2
from studies.indextts2.dataset import PairedUtterances
from studies.indextts2.model import GPTConfig
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from tests.toy import Toy
from tests.tuner.studies_for_tests import build, write
from trainer import TrainConfig, UserError
from trainer.acceleration import Capabilities
from trainer.data.batching import BatchOrder
from tuner.bench.baseline import ADDED, REQUESTED
from tuner.bench.measurement import Measurement, answer, measure, measure_trainer
from tuner.bench.report import COLOURS, check_chart_path, print_table, write_chart
from tuner.bench.table import Bench, Row, build_rows, error_line, rotate, run_child, select
from tuner.cli import main
from tuner.spec.study_toml import StudySpec

CPU = Capabilities("cpu", "CPU", cores=2, memory=1 << 34)
H100 = Capabilities("cuda", "H100", cores=8, memory=1 << 36, compute_capability=(9, 0))
STEPS = 8

FAKE = """
import json, sys
request = json.load(sys.stdin)
on, number = request["optimizations"], request["round"]
{special}
rate = (100 if not on else 100 + 50 * len(on)) * (1 + number)
print("a workload that prints")
measurement = {{"steps": 2, "seconds": 2.0, "tokens": 2.0 * rate, "real_token_share": 0.5, "loss": 3.0,
               "peak_memory_bytes": 10**9, "note": ""}}
print(json.dumps({{"measurement": measurement}}))
"""


def fake(special: str = "") -> tuple[str, ...]:
    """A process that measures nothing: each optimization adds 50 tokens a second, each round is faster."""
    return (sys.executable, "-c", FAKE.format(special=special))


def bench(special: str = "", **changes: Any) -> Bench:
    options = {"rounds": 2, "steps": 2, "only": ["sdpa", "loader", "trainer"], "command": fake(special), **changes}
    return Bench(build(), **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_corpus(folder)
    return folder


def measured(corpus: Path, *on: str, steps: int = STEPS, **changes: Any) -> Measurement:
    workload = IndexTTS2(
        train_manifests=[f"{corpus}/train_pairs.jsonl::ko"],
        val_manifests=[f"{corpus}/val_pairs.jsonl::ko"],
        gpt=TINY_GPT,
        dropout=0.0,
        pack="packed data" in on,
    )
    config = TrainConfig(steps=100, batch_size=8, **{"optimizer": "adamw", "lr": 3e-3, **changes})
    return measure(workload, config, frozenset(on), steps=steps, warmup=2)


@pytest.fixture(scope="module")
def baseline(corpus: Path) -> Measurement:
    return measured(corpus)


@pytest.mark.parametrize(
    "on",
    [
        ("sdpa",),
        ("loader",),
        ("packed data",),
        ("no waiting",),
        ("sdpa", "loader", "no waiting", "packed data"),
    ],
    ids="+".join,
)
def test_speed_optimizations_keep_every_loss(corpus: Path, baseline: Measurement, on: tuple[str, ...]) -> None:
    assert len(baseline.losses) == STEPS + 2
    found = measured(corpus, *on)
    assert found.losses == pytest.approx(baseline.losses, abs=1e-5)
    assert (found.tokens, found.real_token_share) == (baseline.tokens, baseline.real_token_share)


@pytest.mark.parametrize("changes", [{"max_grad_norm": 0.05}, {"max_grad_norm": None}, {"grad_accumulation": 2}])
def test_clipping_and_accumulation_on_the_host_are_those_on_the_device(corpus: Path, changes: dict[str, Any]) -> None:
    host, device = measured(corpus, **changes), measured(corpus, "no waiting", **changes)
    assert device.losses == pytest.approx(host.losses, abs=1e-5)


def test_our_prodigy_trains_as_prodigyopt_does(corpus: Path, baseline: Measurement) -> None:
    settings = {"d0": 1e-3, "max_grad_norm": 0.5}
    theirs = measured(corpus, "prodigy", **settings)
    assert theirs.losses[-1] < theirs.losses[0] and theirs.losses != baseline.losses
    for on in (("prodigy", "no waiting"), ("prodigy", "no waiting", "our prodigy")):
        assert measured(corpus, *on, **settings).losses == pytest.approx(theirs.losses, abs=1e-4)


def test_bf16_and_buckets_train_too(corpus: Path, baseline: Measurement) -> None:
    found = measured(corpus, "bf16", "buckets")
    assert sum(found.losses[-3:]) < sum(found.losses[:3])
    assert found.losses != baseline.losses
    assert found.real_token_share > baseline.real_token_share + 0.05


def test_first_loss_is_the_trainers(corpus: Path) -> None:
    config = TrainConfig(steps=100, batch_size=8, grad_accumulation=2, precision="fp32")
    ours = measure(Toy(dropout=0.0), config, frozenset({"buckets"}), steps=1, warmup=0)
    assert ours.loss == pytest.approx(measure_trainer(Toy(dropout=0.0), config, steps=1).loss, abs=1e-6)


@pytest.mark.slow
def test_compiled_row_takes_the_steps_of_the_others(corpus: Path, baseline: Measurement) -> None:
    found = measured(corpus, "compile")
    assert found.losses == pytest.approx(baseline.losses, abs=1e-4)
    assert "graphs compiled in" in found.note


def test_measurement_has_its_figures(corpus: Path, baseline: Measurement) -> None:
    assert baseline.steps == STEPS and baseline.seconds > 0
    assert baseline.loss == pytest.approx(sum(baseline.losses[:STEPS]) / STEPS)
    lengths = PairedUtterances([f"{corpus}/train_pairs.jsonl::ko"], GPTConfig(**TINY_GPT)).lengths
    batches = BatchOrder(lengths, 8, bucket_samples=1).from_position(0, 2)
    timed = [lengths[next(batches)] for _ in range(STEPS)]
    assert baseline.tokens == sum(batch.sum() for batch in timed)
    assert baseline.real_token_share == baseline.tokens / sum(8 * batch.max() for batch in timed)
    # Python with torch in it, in bytes.
    assert 100e6 < baseline.peak_memory_bytes < 20e9


def test_trainer_is_measured_after_a_warm_up_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Of a large model it would take minutes.
    monkeypatch.setattr("trainer.checkpoint.Checkpoints.save", lambda *_: pytest.fail("a checkpoint is written"))
    config = TrainConfig(samples=10_000, batch_size=8, precision="fp32")
    found = measure_trainer(Toy(), config, steps=STEPS)
    assert list(tmp_path.iterdir()) == []
    assert found.steps == STEPS and found.seconds > 0 and 0.9 < found.real_token_share <= 1
    assert STEPS * 8 * 3 <= found.tokens <= STEPS * 8 * 39
    assert "precision: fp32: as set" in found.note and "device" not in found.note
    short = measure_trainer(Toy(), TrainConfig(steps=3, batch_size=8), steps=STEPS)
    assert short.steps == STEPS


def packing_workload() -> IndexTTS2:
    return IndexTTS2.model_validate({"train_manifests": ["a"], "val_manifests": ["b"], "gpt": TINY_GPT})


def test_rows_in_the_order_of_the_request() -> None:
    rows = build_rows(H100, packing_workload())
    names = [*REQUESTED, *ADDED]
    assert names[:3] == ["prodigy", "compile", "sdpa"] and names[-1] == "packed data"
    assert [(row.group, row.name) for row in rows] == [
        ("baseline", "baseline"),
        *(("alone", name) for name in REQUESTED),
        *(("cumulative", name) for name in names),
        ("trainer", "trainer"),
    ]
    assert not any(row.left_out for row in rows)
    together = [row.optimizations for row in rows if row.group == "cumulative"]
    assert together == [tuple(names[: count + 1]) for count in range(len(names))]


def test_rows_without_effect_on_the_device_are_not_measured() -> None:
    rows = build_rows(CPU, Toy())
    left_out = {row.name: row.note for row in rows if row.left_out}
    assert left_out.keys() == {"cudnn", "tf32", "bf16", "packed data"}
    assert left_out["tf32"] == "no effect on a CPU: not measured"
    last = next(row for row in rows if row.name == "our prodigy")
    assert last.optimizations is not None and not set(last.optimizations) & left_out.keys()


def test_only_takes_rows_and_groups_and_always_the_baseline() -> None:
    rows = build_rows(H100, packing_workload())
    assert [(row.group, row.name) for row in select(rows, ["sdpa"])] == [
        ("baseline", "baseline"),
        ("alone", "sdpa"),
        ("cumulative", "sdpa"),
    ]
    assert [row.name for row in select(rows, ["no-waiting", "trainer"])] == ["baseline", "no waiting", "trainer"]
    assert {row.group for row in select(rows, ["alone"])} == {"baseline", "alone"}
    assert select(rows, []) == rows
    with pytest.raises(UserError, match=r"--only: unknown row compiled; did you mean compile\?"):
        select(rows, ["compiled"])


def test_speed_ups_are_ratios_inside_a_round() -> None:
    baseline, row = Row("baseline", "baseline", ()), Row("sdpa", "alone", ("sdpa",))
    for number, (slow, fast) in enumerate([(100, 200), (10, 30), (1000, 1500)]):
        for each, rate in ((baseline, slow), (row, fast)):
            each.measurements[number] = {
                "steps": 2,
                "seconds": 4.0,
                "tokens": 4.0 * rate,
                "peak_memory_bytes": number,
                "real_token_share": 0.5,
                "loss": 1.0,
            }
    figures = row.figures(baseline)
    assert figures["speedup"] == 2.0 and figures["spread"]["speedup"] == [1.5, 3.0]
    assert figures["tokens_per_second"] == 200 and figures["spread"]["tokens_per_second"] == [30, 1500]
    assert figures["step_seconds"] == 2.0 and figures["peak_memory_bytes"] == 2


def test_rounds_are_interleaved_and_each_begins_elsewhere() -> None:
    lines: list[str] = []
    bench(rounds=3, report=lines.append).run()
    jobs = [line.partition("] ")[2].partition(": ")[0] for line in lines]
    one = ["baseline", "sdpa", "loader", "... + sdpa", "... + loader", "trainer"]
    assert jobs == [f"round {n + 1}, {name}" for n in range(3) for name in rotate(one, n, 3)]
    assert rotate(one, 1, 3)[0] == "loader"
    assert lines[0].startswith("[1/18]") and " left" in lines[0] and " left" not in lines[-1]


def test_rows_with_the_same_optimizations_are_measured_once() -> None:
    lines: list[str] = []
    measurement = bench(only=["prodigy"], rounds=1, report=lines.append)
    measurement.run()
    assert len(lines) == 2
    _, alone, cumulative = measurement.result()["rows"]
    assert alone["group"] == "alone" and cumulative["group"] == "cumulative"
    assert alone["speedup"] == cumulative["speedup"] == 1.5


def test_json_holds_what_a_record_needs() -> None:
    measurement = bench()
    measurement.run()
    result = json.loads(json.dumps(measurement.result()))
    assert result.keys() >= {"command", "versions", "device", "load_average", "rounds", "steps", "rows"}
    assert result["versions"].keys() >= {"torch", "prodigyopt", "python", "prodigy-tuner"}
    assert (result["rounds"], result["steps"], result["batch_size"]) == (2, 2, 8)
    first, sdpa = result["rows"][:2]
    assert (first["name"], first["group"], first["speedup"]) == ("baseline", "baseline", 1.0)
    assert (sdpa["name"], sdpa["group"], sdpa["speedup"], sdpa["tokens_per_second"]) == ("sdpa", "alone", 1.5, 225)
    assert sdpa["step_seconds"] == 1.0 and sdpa["peak_memory_bytes"] == 10**9 and sdpa["note"] == ""
    assert [row["group"] for row in result["rows"]][-1] == "trainer"


def test_row_out_of_memory_has_its_reason_and_others_continue() -> None:
    explode = 'if on == ["sdpa"]: print(json.dumps({"out_of_memory": "20 GiB"})), sys.exit()'
    killed = 'if on == ["loader"]: import os; os.kill(os.getpid(), 9)'
    lines: list[str] = []
    measurement = bench(explode + "\n" + killed, report=lines.append)
    measurement.run()
    rows = {(row["group"], row["name"]): row for row in measurement.result()["rows"]}
    for name in ("sdpa", "loader"):
        assert rows["alone", name]["note"] == "out of memory" and rows["alone", name]["speedup"] is None
        assert rows["cumulative", name]["speedup"] is not None
    # Not tried again in the second round.
    assert sum("out of memory" in line for line in lines) == 2
    assert not measurement.failed


def test_failed_row_has_its_reason_and_others_continue() -> None:
    measurement = bench('if on == ["sdpa"]: raise ValueError("no such kernel")')
    measurement.run()
    rows = {(row["group"], row["name"]): row for row in measurement.result()["rows"]}
    assert rows["alone", "sdpa"]["note"] == "failed: ValueError: no such kernel"
    assert rows["trainer", "trainer"]["speedup"] is not None
    assert measurement.failed


def test_without_a_baseline_nothing_else_is_measured() -> None:
    lines: list[str] = []
    measurement = bench("if on == []: 1 / 0", report=lines.append)
    measurement.run()
    assert measurement.failed and len(lines) == 1 and "ZeroDivisionError" in lines[0]


def test_user_error_is_raised_for_the_baseline_and_kept_in_the_row_for_others() -> None:
    with pytest.raises(UserError, match="too few samples"):
        bench('print(json.dumps({"user_error": "too few samples"})); sys.exit()').run()
    measurement = bench('if on is None: print(json.dumps({"user_error": "no compiler"})); sys.exit()')
    measurement.run()
    assert measurement.failed and measurement.rows[-1].note == "failed: no compiler"


def test_error_line_of_a_long_explanation() -> None:
    named = "torch._inductor.exc.InductorError: CppCompileError: no g++"
    assert error_line(f"Traceback (most recent call last):\n  x\n{named}\n\nSet X=1 for more\n", 1) == named
    assert error_line("just this\n", 1) == "just this"
    assert error_line("", 3) == "exit code 3, without a message"


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"workload.num_train": 4}, "user_error", "4 training samples do not fill one step of 8"),
        ({"workload.explode_at_batch_size": 8}, "out_of_memory", "CUDA out of memory"),
    ],
)
def test_user_error_and_out_of_memory_are_answers(changes: dict[str, Any], key: str, message: str) -> None:
    request = {"spec": build(**changes).to_dict(), "optimizations": [], "steps": 2, "round": 0}
    assert message in answer(request)[key]


def test_each_round_draws_batches_of_its_own_and_all_rows_the_same() -> None:
    def loss(number: int, on: list[str]) -> float:
        request = {"spec": build().to_dict(), "optimizations": on, "steps": 4, "round": number}
        return float(answer(request)["measurement"]["loss"])

    assert loss(0, []) == pytest.approx(loss(0, ["no waiting"]), abs=1e-5)
    assert loss(0, []) != pytest.approx(loss(1, []), abs=1e-5)


def test_baseline_reads_unpacked_files(monkeypatch: pytest.MonkeyPatch) -> None:
    values = build().model_dump(exclude={"base_dir"})
    values["study"]["workload"] = "studies.indextts2:IndexTTS2"
    values["workload"] = {"train_manifests": ["a"], "val_manifests": ["b"], "gpt": TINY_GPT}
    spec = StudySpec.build(values, base_dir=Path.cwd())
    modes = []

    def measure(workload: IndexTTS2, *_: Any, **__: Any) -> Measurement:
        modes.append(workload.pack)
        raise UserError("enough")

    monkeypatch.setattr("tuner.bench.measurement.measure", measure)
    for on in ([], ["packed data"]):
        answer({"spec": spec.to_dict(), "optimizations": on, "steps": 1, "round": 0})
    assert modes == [False, "auto"]


def test_interrupt_ends_the_process_and_its_children(tmp_path: Path) -> None:
    # The one that it starts does not go by itself: only SIGKILL ends it.
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}], stdout=subprocess.PIPE)
child.stdout.readline()
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(60)
"""

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            waiting.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    waiting = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_child((sys.executable, "-c", code), "")
    thread.join()
    state = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    until = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < until, "it is still running"
        time.sleep(0.02)


def test_table_and_chart_show_every_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    measurement = bench('if on == ["sdpa"]: raise ValueError("no <such> kernel & more")', only=[])
    measurement.run()
    result = measurement.result()
    print_table(result, Console(file=sys.stdout))
    shown = capsys.readouterr().out
    assert "1.50x" in shown and "not measured" in shown
    assert "+ sdpa (alone): failed: ValueError: no <such> kernel & more" in shown
    assert "+ tf32 (alone, cumulative): no effect on a CPU: not measured" in shown
    assert "not measured" in next(line for line in shown.splitlines() if line.strip().startswith("+ cudnn"))
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    write_chart(result, first)
    write_chart(result, second)
    assert first.read_bytes() == second.read_bytes()
    elements = list(ElementTree.parse(first).iter())
    texts = [element.text or "" for element in elements if element.tag.endswith("text")]
    for row in result["rows"]:
        assert (row["name"] if row["group"] in ("baseline", "trainer") else f"+ {row['name']}") in texts
    assert "failed: ValueError: no <such> kernel & more" in texts
    bars = [e for e in elements if any(colour.lower() in e.get("style", "") for colour in COLOURS.values())]
    assert len(bars) == sum(row["tokens_per_second"] is not None for row in result["rows"])


def test_chart_without_measurements_is_still_an_svg(tmp_path: Path) -> None:
    measurement = bench("1 / 0")
    measurement.run()
    write_chart(measurement.result(), tmp_path / "none.svg")
    assert ElementTree.parse(tmp_path / "none.svg").getroot().get("width")


def test_chart_without_matplotlib_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Bench, "run", lambda self: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["tuner", "bench", str(write(tmp_path)), "--chart", str(tmp_path / "x.svg")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "pip install 'prodigy-tuner[bench]'" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml"], "none.toml: no such study spec"),
        (["study.toml", "--only", "nonsense"], "--only: unknown row nonsense"),
        (["study.toml", "--chart", "speed.png"], "--chart speed.png: the chart is an SVG; name it speed.svg."),
        (["study.toml", "--chart", "none/speed.svg"], "there is no folder none"),
        (["study.toml", "--set", "train.device=cuda"], "no CUDA device"),
        (["study.toml", "--set", "train.batch=1"], "unknown key train.batch"),
    ],
)
def test_mistake_is_one_line_before_measuring(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tuner", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors
    assert len(errors.strip().splitlines()) == 1, errors


def test_command_exits_1_where_a_row_failed_and_shows_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tuner.bench.table.CHILD", fake('if on == ["sdpa"]: raise ValueError("no such kernel")'))
    monkeypatch.setattr(sys, "argv", ["tuner", "bench", str(write(tmp_path)), "--only", "sdpa", "--rounds", "1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, errors = capsys.readouterr()
    assert stopped.value.code == 1
    assert "round 1, sdpa: failed: ValueError: no such kernel" in errors and "Traceback" not in errors
    assert "1.00x" in out and "one after the other" in out


def test_chart_may_be_in_the_current_folder() -> None:
    check_chart_path(Path("speed.svg"))


def test_command_measures_in_processes_and_writes_table_and_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec, picture = write(tmp_path), tmp_path / "speed.svg"
    arguments = ["bench", str(spec), "--rounds", "1", "--steps", "3", "--only", "buckets", "--chart", str(picture)]
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments, "--set", "train.optimizer=adamw", "--json"])
    monkeypatch.setattr("tuner.bench.table.build_rows", lambda *_: [Row("baseline", "baseline", ()), BUCKETS])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, errors = capfd.readouterr()
    assert stopped.value.code in (None, 0), errors
    assert "[2/2] round 1, ... + buckets: " in errors
    result = json.loads(out)
    first, last = result["rows"]
    assert last["speedup"] > 0 and last["real_token_share"] > first["real_token_share"]
    assert first["first_loss"] == pytest.approx(last["first_loss"], abs=1)
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


BUCKETS = Row("buckets", "cumulative", ("buckets",))
