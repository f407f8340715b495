from __future__ import annotations

import errno
import pickle
import threading
from pathlib import Path

import pytest
import torch

from trainer import UserError
from trainer.checkpoint import Checkpoints, find_state, is_locked, lock_folder, read_checkpoint, write_checkpoint


def state(step: int) -> dict[str, object]:
    return {"step": step, "model": {"weight": torch.full((1000,), float(step))}}


def save_all(run_dir: Path, *steps: int, keep: int = 2) -> None:
    with Checkpoints(run_dir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.confirm(step)
            checkpoints.save(state(step))


def test_last_few_are_kept_and_latest_is_the_newest(tmp_path: Path) -> None:
    save_all(tmp_path, 10, 20, 30)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "latest.pth",
        "step_000000020.pth",
        "step_000000030.pth",
    ]
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 30


def test_snapshot_does_not_follow_later_changes(tmp_path: Path) -> None:
    live = state(1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        gate = threading.Event()
        checkpoints._writer.submit(gate.wait)
        checkpoints.save(live)
        live["model"]["weight"].zero_()  # type: ignore[index]
        gate.set()
    assert read_checkpoint(tmp_path / "latest.pth")["model"]["weight"][0] == 1


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_newest_checkpoint_is_replaced_by_the_previous_one(tmp_path: Path, damage: str) -> None:
    save_all(tmp_path, 10, 20)
    newest = tmp_path / "step_000000020.pth"
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    # In place, so that latest.pth, its other name, is damaged too.
    with open(newest, "r+b") as file:
        file.write(content)
        file.truncate()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        found = checkpoints.find()
    assert found is not None and found[1]["step"] == 10


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save_all(tmp_path, 10)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"nothing")
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(UserError, match=r"all states in .* are damaged"):
        checkpoints.find()


def test_failed_write_is_raised_later(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"could not be written .*free some space"),
        Checkpoints(tmp_path / "run", keep=1) as checkpoints,
    ):
        checkpoints.save(state(1))  # The folder is not there.


def test_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.pth"
    write_checkpoint(state(1), path)

    def torn(value: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(state(2), path)
    assert read_checkpoint(path)["step"] == 1


def test_two_best_files_are_one_write(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_weights(state(3), ["best_text.pth", "best_mel.pth"])
    for name in ("best_text.pth", "best_mel.pth"):
        assert read_checkpoint(tmp_path / name)["step"] == 3
    assert (tmp_path / "best_text.pth").samefile(tmp_path / "best_mel.pth")


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("owned"),)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", pickle.dumps(Malicious(), protocol=2), "zip"])
def test_other_file_than_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model": Malicious()}, path)
    with pytest.raises(UserError, match="damaged") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds no weights by name but a Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")


def test_run_directory_has_one_holder(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with lock_folder(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="in use"), lock_folder(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_empty_digest_counts_as_none(tmp_path: Path) -> None:
    write_checkpoint(state(1), tmp_path / "a.pth")
    (tmp_path / "a.pth.sha256").write_text("")
    assert read_checkpoint(tmp_path / "a.pth")["step"] == 1


def test_file_that_torch_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(1), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "a.pth")["step"] == 1


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step_000000007.pth.tmp").write_bytes(b"half")
    save_all(tmp_path, 8)
    assert not list(tmp_path.glob("*.tmp"))


def test_state_without_its_alias_gets_it(tmp_path: Path) -> None:
    """The process was killed between the two."""
    save_all(tmp_path, 10)
    write_checkpoint(state(20), tmp_path / "step_000000020.pth")
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 10
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.find() is not None
    assert read_checkpoint(tmp_path / "latest.pth")["step"] == 20


def test_run_goes_back_to_its_stable_state_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_all(tmp_path, 10, 20, 30, keep=3)
    found = find_state(tmp_path, lambda state: state["step"] < 30)
    assert found is not None and found[1]["step"] == 30, "refused by its run, and nothing is lost"
    write_checkpoint(state(15), tmp_path / "stable.pth")
    found = find_state(tmp_path, lambda state: state["step"] < 30)
    assert found is not None and found[1]["step"] == 15 and "going back to step 15" in caplog.text


def test_divergence_is_not_hidden_by_a_disk_that_refuses_to_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step))
        checkpoints.confirm(2)
        checkpoints._wait()
        monkeypatch.setattr("trainer.checkpoint.delete", refuse)
        checkpoints.return_to_good()
    assert "Input/output error" in caplog.text
