"""What a hook left is in Aim, among the dashboard's files, and in the note."""

from __future__ import annotations

import json
import os
import wave
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note
from PIL import Image

from tests.trainer.test_tracking import runs, texts, tracker
from tests.tuner.show.made_studies import add_everything, new_study, read
from tests.tuner.show.test_page import served
from tuner.show.page import StudyPage
from tuner.show.samples import save_samples
from tuner.study.optuna_internals import id_of, storage_of
from tuner.study.samples import read_samples, samples_dir
from tuner.study.storage import open_storage


def leave(run_dir: Path, step: int, cer: float = 0.25) -> Path:
    """The files of a hook."""
    folder = samples_dir(run_dir, step)
    folder.mkdir(parents=True)
    with wave.open(str(folder / "generated.wav"), "wb") as file:
        file.setparams((1, 2, 22_050, 0, "NONE", ""))
        file.writeframes(bytes(100 + step))
    Image.new("L", (2, 2)).save(folder / "mel.png")
    (folder / "text.txt").write_text("안녕", encoding="utf-8")
    (folder / "hook.log").write_text("log")
    (folder / "metrics.json").write_text(json.dumps({"cer": cer, "nan": float("nan"), "voice": "ko"}))
    return folder


def test_files_and_metrics_are_read_and_others_left_out(tmp_path: Path) -> None:
    samples = read_samples(leave(tmp_path, 40))
    assert [path.name for path in samples.files] == ["generated.wav", "mel.png", "text.txt"]
    assert samples.step == 40 and samples.metrics == {"cer": 0.25}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 200_000, '{"a": 1}' + " " * 1_000_000])
def test_metrics_that_are_no_small_object_are_one_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = leave(tmp_path, 40)
    (folder / "metrics.json").write_text(text)
    assert read_samples(folder).metrics == read_samples(folder).metrics == {}
    assert caplog.text.count("metrics.json is left out: it must be one JSON object of numbers") == 1


def test_what_cannot_be_stored_is_left_out(tmp_path: Path) -> None:
    folder = leave(tmp_path, 40)
    (folder / "metrics.json").write_text(f'{{"huge": 1{"0" * 400}, "\\ud800": 1, "two\\nlines": 1, "cer": 1}}')
    Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).touch()
    (folder / "loop.txt").symlink_to("loop.txt")
    samples = read_samples(folder)
    assert samples.metrics == {"cer": 1.0}
    assert [path.name for path in samples.files] == ["generated.wav", "mel.png", "text.txt"]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    """A study whose full run is in `tmp_path`, with the samples of two steps."""
    study = add_everything(new_study(open_storage(f"sqlite:///{tmp_path}/tuner.db")))
    (run,) = read(study).full_runs
    run_dir = tmp_path / run.run_dir.name
    full = optuna.load_study(study_name="toy.full", storage=storage_of(study))
    storage_of(full).set_trial_user_attr(full.trials[0]._trial_id, "run_dir", str(run_dir))
    for step in (40, 1600):
        leave(run_dir, step)
    samples_dir(run_dir, 1700).with_suffix(".running").mkdir()
    return study


def test_note_links_the_files_which_the_dashboard_serves(stored: optuna.Study, tmp_path: Path) -> None:
    page = StudyPage(stored, tmp_path)
    page.update(now=True)
    page.update(now=True)
    known = {meta.filename: meta for meta in get_all_artifact_meta(stored, storage=storage_of(stored))}
    name = "full-trial-00001-step_000001600-generated.wav"
    assert len([each for each in known if each.startswith("full-trial")]) == 6
    assert known[name].mimetype.startswith("audio/"), "the dashboard plays it"
    address = f"/artifacts/{id_of(stored)}/{known[name].artifact_id}"
    table = get_note(stored).partition("### Samples\n\n")[2].partition("\n\n")[0].replace("\u00a0", "")
    assert table.splitlines()[0] == "| trial | step | cer | files |"
    assert table.splitlines()[2].startswith(f"| 1 | 1,600 | 0.25 | [generated.wav]({address}), [mel.png](")
    client = next(clients := served(tmp_path))
    client.log_in()
    status, body = client.request("GET", address)
    assert status == 200 and body.startswith("RIFF")
    clients.close()


def test_long_name_of_a_file_is_cut(stored: optuna.Study, tmp_path: Path) -> None:
    """Such as a sentence in Hangul: three bytes a syllable, and a file's name has 255 at most."""
    name = 80 * "가" + ".wav"
    (tmp_path / "full-trial-00001/samples/step_000000040" / name).write_bytes(b"RIFF")
    StudyPage(stored, tmp_path).update(now=True)
    assert f"[{name}](/artifacts/" in get_note(stored)


def test_samples_of_a_run_that_was_started_anew_replace_the_earlier_ones(stored: optuna.Study, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    before = save_samples(read(stored), artifacts)
    path = tmp_path / "full-trial-00001/samples/step_000000040/text.txt"
    path.write_text("new")
    os.utime(path, (2e9, 2e9))
    assert save_samples(read(stored), artifacts) == before
    assert (artifacts / before[0].links["text.txt"].rpartition("/")[2]).read_text() == "new"


@pytest.mark.filterwarnings("ignore")
def test_files_and_metrics_are_in_aim(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from aim.storage.context import Context

    samples = read_samples(leave(tmp_path / "run", 40))
    samples.files[1].write_bytes(b"no image")
    aim_tracker = tracker(tmp_path)
    aim_tracker.PATIENCE_S = 300.0
    aim_tracker.samples(samples.files, samples.metrics, step=40)
    aim_tracker.track({"train/loss": 1.0}, step=50, samples=400)
    aim_tracker.close()
    (run,) = runs(tmp_path / "repo").values()
    assert texts(run, "text", subset="samples") == [(40, "안녕")]
    audio = run.get_audio_sequence("generated", Context({"subset": "samples"}))
    _, ((sound,), *_) = audio.data.items_list()
    assert sound.get().getvalue() == samples.files[0].read_bytes()
    assert {metric.name for metric in run.metrics()} >= {"cer", "loss"}
    assert "mel.png is not shown in Aim" in caplog.text
