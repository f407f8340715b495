"""Makes the Korean demo corpus: law texts, spoken by espeak-ng, in the form of IndexTTS-2 preprocessing.

    python -m studies.korean_demo.corpus [--folder data/korean_demo] [--width 128]

Needs the extra `demo` and no network. The same call makes the same bytes; a complete folder is left unchanged.
Its files:

    train_pairs.jsonl, val_pairs.jsonl   one prompt/target pair a line; paths relative to the manifest
    text_ids/, codes/, emo_vec/          one .npy an utterance: int32 [text], int32 [25 a second], float32 [width]
    condition/                           one .npy a speaker: float32 [32, width]
    tokenizer.model                      SentencePiece
    codebook.npy                         the log-mel frame of each code, float32 [256, 40]: see `listen`
    corpus.json                          recipe, parameters, counts and digest; written last
"""

import argparse
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from studies.korean_demo import speech
from trainer.errors import UserError

RECIPE = 3  # increase it with every change of a byte: older corpora are then made again
VOCAB_SIZE = 600
MAX_TEXT_LEN = 120  # longer utterances are dropped: the model has no position for them
MAX_CODE_LEN = 400
MIN_SENTENCES = 40  # each speaker then has the two validation utterances that make a pair
PACKAGES = ("espeakng_loader", "konlpy", "sentencepiece", "sklearn")
FOLDERS = ("codes", "condition", "emo_vec", "text_ids")
FILES = ("codebook.npy", "tokenizer.model", "train_pairs.jsonl", "val_pairs.jsonl")
READERS_INDEX = ".tuner-index"  # created by readers of the manifests


def plan_utterances(sentences: list[str], num_sentences: int | None = None) -> list[speech.Utterance]:
    """Gives each sentence (or `num_sentences` of them) to one split, a tenth to val, and to two speakers."""
    order = np.random.default_rng([speech.SEED, 1]).permutation(len(sentences))[:num_sentences]
    speakers = speech.SPEAKERS
    num_val = max(2 * len(speakers), len(order) // 10)
    return [
        speech.Utterance(
            id=f"{speaker.name}-{index:05d}",
            text=sentences[index],
            speaker=speaker,
            split="val" if position < num_val else "train",
        )
        for position, index in enumerate(order)
        for speaker in (speakers[position % len(speakers)], speakers[(position + 1) % len(speakers)])
    ]


def train_tokenizer(sentences: list[str]) -> bytes:
    """A SentencePiece unigram model (start 0, stop 1, unknown 2) of VOCAB_SIZE pieces, as its file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),  # with files, the model would contain their paths
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=-1,
        num_threads=1,  # with more, the sums depend on the order of threads
        minloglevel=2,
    )
    return model.getvalue()


def pair(utterances: list[speech.Utterance], lengths: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """One manifest record an utterance of a split: itself as target, another of its speaker as prompt.

    `lengths` has the numbers of text ids and codes. An utterance that is its speaker's only one has no record.
    """
    random = np.random.default_rng([speech.SEED, 4])
    records = []
    for speaker in speech.SPEAKERS:
        mine = [one.id for one in utterances if one.speaker == speaker]
        for index, target in enumerate(mine if len(mine) > 1 else []):
            prompt = mine[(index + random.integers(1, len(mine))) % len(mine)]
            text_len, code_len = lengths[target]
            records.append(
                {
                    "id": f"{target}__{prompt}",
                    "target_text_ids_path": f"text_ids/{target}.npy",
                    "target_codes_path": f"codes/{target}.npy",
                    "prompt_condition_path": f"condition/{speaker.name}.npy",
                    "prompt_emo_vec_path": f"emo_vec/{prompt}.npy",
                    "target_text_len": text_len,
                    "target_code_len": code_len,
                    "prompt_condition_len": speech.CONDITION_LEN,
                    "prompt_id": prompt,
                    "target_id": target,
                    "language": "ko",
                    "speaker": speaker.name,
                }
            )
    return records


def _write(folder: Path, parameters: dict[str, Any], num_workers: int) -> dict[str, Any]:
    """Makes the corpus in `folder`, which is empty; returns its corpus.json, which it writes last."""
    import sentencepiece

    console = Console(stderr=True, highlight=False)
    sentences = speech.read_sentences()
    tokenizer = train_tokenizer(sentences)
    planned = plan_utterances(sentences, parameters["num_sentences"])
    with _progress(console, len(planned)) as progressed:
        log_mels = speech.speak(planned, num_workers, progressed)
    console.print(f"clustering the speech into {speech.NUM_CODES} codes and writing the files")
    encode = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).encode
    text_ids = {one.id: np.array(encode(one.text), np.int32) for one in planned}
    lengths = {one.id: (len(text_ids[one.id]), len(log_mels[one.id])) for one in planned}
    utterances = [one for one in planned if lengths[one.id][0] <= MAX_TEXT_LEN and lengths[one.id][1] <= MAX_CODE_LEN]
    codes, codebook = speech.quantize(utterances, log_mels)
    conditions, emotions = speech.voice_vectors(utterances, log_mels, parameters["width"])

    for name, arrays in zip(FOLDERS, (codes, conditions, emotions, text_ids), strict=True):
        (folder / name).mkdir()
        for key, array in arrays.items():
            np.save(folder / name / f"{key}.npy", array)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    np.save(folder / "codebook.npy", codebook)
    pairs = {}
    for split in ("train", "val"):
        pairs[split] = pair([one for one in utterances if one.split == split], lengths)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in pairs[split]]
        (folder / f"{split}_pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    seconds = sum(record["target_code_len"] for split in pairs.values() for record in split) / speech.CODES_PER_SECOND
    about = {
        "recipe": RECIPE,
        "parameters": parameters,
        "num_train": len(pairs["train"]),
        "num_val": len(pairs["val"]),
        "num_dropped": len(planned) - len(pairs["train"]) - len(pairs["val"]),
        "num_speakers": len(speech.SPEAKERS),
        "num_codes": speech.NUM_CODES,
        "vocab_size": VOCAB_SIZE,
        "seconds": seconds,
        "hours": round(seconds / 3600, 3),
        "digest": _digest(folder),
    }
    (folder / "corpus.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


@contextmanager
def _progress(console: Console, total: int) -> Iterator[speech.Progressed]:
    """Counts spoken utterances: a bar on a terminal, a line for every tenth elsewhere. May be called by threads."""
    task_name = "speaking Korean sentences"
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(task_name, total=total)
            yield lambda: bar.advance(task)
        return
    lock, num_done = threading.Lock(), 0

    def progressed() -> None:
        nonlocal num_done
        with lock:
            num_done += 1
            if num_done * 10 // total > (num_done - 1) * 10 // total:
                console.print(f"{task_name}: {num_done:,} of {total:,}")

    yield progressed


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of the corpus but corpus.json."""
    digest = hashlib.sha256()
    names = [f"{name}/{entry}" for name in FOLDERS for entry in sorted(os.listdir(folder / name))]
    for name in [*names, *FILES]:
        data = (folder / name).read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _read_whole(folder: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """corpus.json, if the folder is complete and has this recipe and these parameters; takes a fraction of a second."""
    try:
        about: dict[str, Any] = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        same = (about["recipe"], about["parameters"], about["digest"]) == (RECIPE, parameters, _digest(folder))
    except (OSError, ValueError, KeyError, TypeError):  # missing or incomplete
        return None
    return about if same else None


def _check(folder: Path, width: int, num_sentences: int | None, num_workers: int | None) -> None:
    for name, value, least in (
        ("width", width, 1),
        ("num_sentences", num_sentences, MIN_SENTENCES),
        ("num_workers", num_workers, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value} is too small; use at least {least}.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another folder for the corpus.")
    foreign = set(os.listdir(folder)) - {*FOLDERS, *FILES, "corpus.json", READERS_INDEX} if folder.exists() else set()
    if foreign:
        raise UserError(f"{folder} holds {min(foreign)}, which is no part of a corpus; choose another folder.")


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Waits for the lock on `folder`, and holds it inside the block."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} can't be created: {error}; choose another folder.") from error
    with lock:  # the file stays: after its removal two processes could hold two locks
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_corpus(
    folder: Path, *, width: int = 128, num_sentences: int | None = None, num_workers: int | None = None
) -> dict[str, Any]:
    """Makes the corpus in `folder`, and replaces another corpus there; reuses a complete one with equal parameters.

    Args:
        width: Of the condition and emotion vectors.
        num_sentences: At least MIN_SENTENCES. Default: all.
        num_workers: Speakers that speak at a time. Default: one per core.

    Returns the content of corpus.json and `reused`. An interruption leaves `folder` unchanged. Raises UserError for an
    invalid argument, a folder with other files, and a missing demo package.
    """
    folder = folder.expanduser().resolve()
    parameters = {"width": width, "num_sentences": num_sentences}
    if about := _read_whole(folder, parameters):
        return {**about, "reused": True}
    _check(folder, width, num_sentences, num_workers)
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"the Korean demo corpus needs {', '.join(missing)}; install with: pip install 'prodigy-tuner[demo]'"
        )
    making, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("making", "replaced"))
    with _lock_folder(folder):
        if replaced.exists() and not folder.exists():  # interrupted between the two renames below
            replaced.rename(folder)
        if about := _read_whole(folder, parameters):  # made by another process in the meantime
            return {**about, "reused": True}
        for leftover in (making, replaced):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            making.mkdir()
            about = _write(making, parameters, num_workers or os.cpu_count() or 1)
            if folder.exists():
                folder.rename(replaced)
            making.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return {**about, "reused": False}


def main(command_line: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 after a UserError."""
    parser = argparse.ArgumentParser(description="Makes the Korean demo corpus.")
    parser.add_argument("--folder", type=Path, default=Path("data/korean_demo"))
    parser.add_argument("--width", type=int, default=128, help="of the condition and emotion vectors")
    arguments = parser.parse_args(command_line)
    try:
        about = make_corpus(arguments.folder, width=arguments.width)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.folder} is unchanged", file=sys.stderr)
        return 130
    print(
        f"{arguments.folder}: {about['num_train']:,} training and {about['num_val']:,} validation pairs, "
        f"{about['hours']:.2f} hours of speech, {about['num_speakers']} speakers"
        + (" (already there)" if about["reused"] else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
