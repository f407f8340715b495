"""Makes the Korean demo corpus: law texts, spoken by espeak-ng, as an IndexTTS-2 preprocessing run leaves them.

    python -m studies.korean_demo.corpus [--folder data/korean_demo] [--width 128]

Needs the extra `demo` and no network. The same call makes the same bytes; a folder that is already whole is left
as it is. What is in it:

    train_pairs.jsonl, val_pairs.jsonl   one prompt/target pair a line; paths relative to the manifest
    text_ids/, codes/, emo_vec/          one .npy an utterance: int32 [text], int32 [25 a second], float32 [width]
    condition/                           one .npy a speaker: float32 [32, width]
    tokenizer.model                      SentencePiece
    corpus.json                          recipe, parameters, counts and digest; written last
"""

import argparse
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from trainer.errors import UserError

RECIPE = 1  # raise it with every change that changes a byte: older corpora are then made again
SEED = 2024
SAMPLE_RATE = 22_050
CODES_PER_SECOND = 25
NUM_BANDS = 40
NUM_CODES = 256
CONDITION_LEN = 32
VOCAB_SIZE = 600
MAX_CHARACTERS = 100  # longer sentences are cut; some 15 seconds of speech
MAX_TEXT_LEN = 120  # what is longer in text ids or codes is dropped: the model has no position for it
MAX_CODE_LEN = 400
MIN_SENTENCES = 40  # each speaker then has the two validation utterances that make a pair
PACKAGES = ("espeakng_loader", "konlpy", "sentencepiece", "sklearn")
FOLDERS = ("codes", "condition", "emo_vec", "text_ids")
FILES = ("tokenizer.model", "train_pairs.jsonl", "val_pairs.jsonl")

Progressed = Callable[[], None]


class Speaker(NamedTuple):
    """One espeak-ng voice: its variant, pitch (0 to 100) and rate (words a minute)."""

    name: str
    voice: str
    pitch: int
    rate: int


SPEAKERS = (
    Speaker("ko-base", "ko", 50, 175),
    Speaker("ko-m7", "ko+m7", 35, 165),
    Speaker("ko-f2", "ko+f2", 55, 185),
    Speaker("ko-shelby", "ko+shelby", 50, 175),
)


class Utterance(NamedTuple):
    """One sentence as one speaker says it; `speaker` counts in SPEAKERS, `split` is train or val."""

    id: str
    text: str
    speaker: int
    split: str


def _paragraphs(text: str) -> list[str]:
    """Joins lines that were wrapped for print, also inside a word; drops ruled table lines and page numbers."""
    starts_anew = re.compile(r"\s{2}|\s*(제\s*\d+\s*[조장절항]|[①-⑳]|[가-하]\.\s|\d+[.)]|[-○◦ㅇ□*※])")
    paragraphs: list[str] = []
    previous = ""
    for line in text.split("\n"):
        if not re.search("[가-힣]", line) or "---" in line:
            continue
        if len(previous) >= 15 and not starts_anew.match(line):
            paragraphs[-1] += line
        else:
            paragraphs.append(line)
        previous = line
    return paragraphs


def read_sentences() -> list[str]:
    """Korean sentences of 6 to MAX_CHARACTERS characters from konlpy's law texts, each once, in a fixed order."""
    spec = importlib.util.find_spec("konlpy")  # importing it would ask for Java
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "data" / "corpus"
    sentences: dict[str, None] = {}
    for path in [*sorted(root.glob("kolaw/*.txt")), *sorted(root.glob("kobill/*.txt"))]:
        for paragraph in _paragraphs(path.read_text(encoding="utf-8")):
            for raw in re.split(r"(?<=[.!?:;])\s+|[①-⑳]", paragraph):
                clean = re.sub(r"\s+", " ", re.sub(r"[^가-힣0-9 .,·%]+", " ", raw)).strip(" ,·")
                for piece in textwrap.wrap(clean, MAX_CHARACTERS):
                    if len(piece) >= 6 and len(re.findall("[가-힣]", piece)) >= 0.6 * len(piece):
                        sentences[piece] = None
    return list(sentences)


def plan_utterances(sentences: list[str], num_sentences: int | None = None) -> list[Utterance]:
    """Gives each sentence (or `num_sentences` of them) to one split, a tenth to val, and to two speakers."""
    order = np.random.default_rng([SEED, 1]).permutation(len(sentences))[:num_sentences]
    num_val = max(2 * len(SPEAKERS), len(order) // 10)
    return [
        Utterance(
            id=f"{SPEAKERS[speaker].name}-{index:05d}",
            text=sentences[index],
            speaker=speaker,
            split="val" if position < num_val else "train",
        )
        for position, index in enumerate(order)
        for speaker in (position % len(SPEAKERS), (position + 1) % len(SPEAKERS))
    ]


def train_tokenizer(sentences: list[str]) -> bytes:
    """A SentencePiece unigram model (start 0, stop 1, unknown 2) of VOCAB_SIZE pieces, as its file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),  # with files, their paths would stand in the model
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=-1,
        num_threads=1,  # with more, the sums depend on which thread comes first
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def _mel_filters(size: int) -> np.ndarray:
    """Triangular filters, float32 [size // 2 + 1, NUM_BANDS], evenly spaced in mel from 50 to 8,000 Hz."""
    mels = np.linspace(*(2595 * np.log10(1 + np.array([50, 8000]) / 700)), NUM_BANDS + 2)
    low, centre, high = np.lib.stride_tricks.sliding_window_view(700 * (10 ** (mels / 2595) - 1), NUM_BANDS)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)[:, None]
    rise, fall = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    return np.maximum(0, np.minimum(rise, fall)).astype(np.float32)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Log energy by mel band of int16 samples at SAMPLE_RATE: float32 [frames, NUM_BANDS]."""
    size, hop = 1024, SAMPLE_RATE // CODES_PER_SECOND
    padded = np.pad(wave.astype(np.float32) / 32768, (0, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(wave) : hop]
    window = np.hanning(size).astype(np.float32)
    spectrum = np.fft.rfft(frames * window)
    power = (spectrum.real**2 + spectrum.imag**2) / np.sum(window**2)  # abs() takes as long as the transform
    return np.log(power.astype(np.float32) @ _mel_filters(size) + np.float32(1e-5))


def _speak_as() -> None:
    """All that a speaking process does (see `speak`): a speaker and texts from stdin, their log-mels to stdout."""
    import espeakng_loader
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # the speakers fill the cores; threads for such small products would only fight
    speaker, texts = json.load(sys.stdin)
    _, voice, pitch, words_a_minute = Speaker(*speaker)
    samples: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def collect(wave: int | None, num_samples: int, _events: int | None) -> int:
        if wave and num_samples > 0:
            samples.append(ctypes.string_at(wave, 2 * num_samples))
        return 0

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2  # audio by callback without a thread in between: three times as fast as asynchronous
    rate = espeak.espeak_Initialize(synchronous, 0, os.fsencode(espeakng_loader.get_data_path()), 0)
    if rate != SAMPLE_RATE:
        raise RuntimeError(f"espeak_Initialize returned {rate} instead of the sample rate {SAMPLE_RATE}")
    espeak.espeak_SetSynthCallback(collect)
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(SEED))  # else the time of day
    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        raise RuntimeError(f"espeak-ng has no voice {voice}")
    for parameter, value in ((1, words_a_minute), (3, pitch)):
        espeak.espeak_SetParameter(parameter, value, 0)
    for text in texts:
        samples.clear()
        data, utf8 = text.encode() + b"\0", 1
        status = espeak.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, utf8, None, None)
        if status != 0 or not samples:
            raise RuntimeError(f"espeak_Synth returned {status} and {len(samples)} pieces of speech for: {text}")
        spoken = log_mel(np.frombuffer(b"".join(samples), np.int16)).tobytes()
        sys.stdout.buffer.write(len(spoken).to_bytes(4) + spoken)
        sys.stdout.flush()


def speak(utterances: list[Utterance], num_workers: int, progressed: Progressed) -> dict[str, np.ndarray]:
    """The log-mel of each utterance by its id. Each speaker is one fresh process that speaks in a fixed order.

    espeak-ng carries state from one utterance to the next (the flutter of the pitch, its noise), and nothing in
    it resets that: only a fresh process that says the same things in the same order repeats its samples.
    """
    log_mels: dict[str, np.ndarray] = {}
    processes: list[subprocess.Popen[bytes]] = []
    # Not by multiprocessing, which would run the caller's main module again in each process.
    command = [sys.executable, "-c", f"from studies.korean_demo import corpus; corpus.{_speak_as.__name__}()"]

    def run_speaker(number: int) -> None:
        mine = [one for one in utterances if one.speaker == number]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],  # where `studies` is
            start_new_session=True,  # an interrupt from the terminal is this process's to handle
        ) as process:
            processes.append(process)
            assert process.stdin and process.stdout
            try:
                process.stdin.write(json.dumps([SPEAKERS[number], [one.text for one in mine]]).encode())
                process.stdin.close()
                for one in mine:
                    size = int.from_bytes(process.stdout.read(4))
                    spoken = process.stdout.read(size)
                    if not size or len(spoken) < size:
                        raise BrokenPipeError("the end of the pipe")
                    log_mels[one.id] = np.frombuffer(spoken, np.float32).reshape(-1, NUM_BANDS)
                    progressed()
            except BrokenPipeError as error:
                name = SPEAKERS[number].name
                raise RuntimeError(f"the process that speaks as {name} failed; its error stands above") from error

    with ThreadPoolExecutor(num_workers) as threads:
        try:
            list(threads.map(run_speaker, range(len(SPEAKERS))))
        finally:
            for process in processes:
                process.kill()  # nothing where it has ended
    return log_mels


def quantize(utterances: list[Utterance], log_mels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each utterance's frames as int32 codes [frames]: k-means, its centres from the training split alone."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    frames = np.concatenate([log_mels[one.id] for one in utterances if one.split == "train"])
    with threadpool_limits(1):  # sums over threads differ in their last bit from run to run
        kmeans = MiniBatchKMeans(NUM_CODES, batch_size=4096, n_init=1, random_state=SEED)
        kmeans.fit(frames[::3])  # a third of them finds as good centres in a third of the time
        codes = kmeans.predict(np.concatenate([log_mels[one.id] for one in utterances])).astype(np.int32)
    ends = np.cumsum([len(log_mels[one.id]) for one in utterances])
    return {one.id: own for one, own in zip(utterances, np.split(codes, ends[:-1]), strict=True)}


def voice_vectors(
    utterances: list[Utterance], log_mels: dict[str, np.ndarray], width: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Conditions [CONDITION_LEN, width] by speaker and emotion vectors [width] by utterance, float32.

    Both are fixed random projections, of standard deviation 0.3, of statistics of the log-mel: mean and
    deviation of each band and deciles of the energy. The condition takes a speaker's mean over its training
    utterances, the emotion vector the utterance's own.
    """
    deciles = np.linspace(0.1, 0.9, 9)
    mels = [log_mels[one.id].astype(np.float64) for one in utterances]
    statistics = np.stack(
        [np.concatenate([mel.mean(0), mel.std(0), np.quantile(mel.mean(1), deciles)]) for mel in mels]
    )
    is_train = np.array([one.split == "train" for one in utterances])
    speaker = np.array([one.speaker for one in utterances])
    statistics = (statistics - statistics[is_train].mean(0)) / statistics[is_train].std(0)

    def project(values: np.ndarray, shape: tuple[int, ...], stream: int) -> np.ndarray:
        matrix = np.random.default_rng([SEED, stream]).standard_normal((values.size, *shape))
        projected = np.tensordot(values, matrix, 1)
        return (0.3 * projected / projected.std()).astype(np.float32)

    voices = {one.name: statistics[is_train & (speaker == i)].mean(0) for i, one in enumerate(SPEAKERS)}
    conditions = {name: project(voice, (CONDITION_LEN, width), 2) for name, voice in voices.items()}
    owns = zip(utterances, statistics, strict=True)
    return conditions, {one.id: project(own, (width,), 3) for one, own in owns}


def pair(utterances: list[Utterance], lengths: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """One manifest record an utterance of a split: itself as target, another of its speaker as prompt.

    `lengths` has the numbers of text ids and codes. An utterance that is its speaker's only one has no record.
    """
    random = np.random.default_rng([SEED, 4])
    records = []
    for speaker_number, speaker in enumerate(SPEAKERS):
        mine = [one.id for one in utterances if one.speaker == speaker_number]
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
                    "prompt_condition_len": CONDITION_LEN,
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
    sentences = read_sentences()
    tokenizer = train_tokenizer(sentences)
    planned = plan_utterances(sentences, parameters["num_sentences"])
    with _progress(console, len(planned)) as progressed:
        log_mels = speak(planned, num_workers, progressed)
    console.print(f"clustering the speech into {NUM_CODES} codes and writing the files")
    encode = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).encode
    text_ids = {one.id: np.array(encode(one.text), np.int32) for one in planned}
    lengths = {one.id: (len(text_ids[one.id]), len(log_mels[one.id])) for one in planned}
    utterances = [one for one in planned if lengths[one.id][0] <= MAX_TEXT_LEN and lengths[one.id][1] <= MAX_CODE_LEN]
    codes = quantize(utterances, log_mels)
    conditions, emotions = voice_vectors(utterances, log_mels, parameters["width"])

    for name, arrays in zip(FOLDERS, (codes, conditions, emotions, text_ids), strict=True):
        (folder / name).mkdir()
        for key, array in arrays.items():
            np.save(folder / name / f"{key}.npy", array)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    pairs = {}
    for split in ("train", "val"):
        pairs[split] = pair([one for one in utterances if one.split == split], lengths)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in pairs[split]]
        (folder / f"{split}_pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    seconds = sum(record["target_code_len"] for split in pairs.values() for record in split) / CODES_PER_SECOND
    about = {
        "recipe": RECIPE,
        "parameters": parameters,
        "num_train": len(pairs["train"]),
        "num_val": len(pairs["val"]),
        "num_dropped": len(planned) - len(pairs["train"]) - len(pairs["val"]),
        "num_speakers": len(SPEAKERS),
        "num_codes": NUM_CODES,
        "vocab_size": VOCAB_SIZE,
        "seconds": seconds,
        "hours": round(seconds / 3600, 3),
        "digest": _digest(folder),
    }
    (folder / "corpus.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Progressed]:
    """Counts spoken utterances: a bar on a terminal, a line for every tenth elsewhere. May be called by threads."""
    what = "speaking Korean sentences"
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        return
    lock, num_done = threading.Lock(), 0

    def progressed() -> None:
        nonlocal num_done
        with lock:
            num_done += 1
            if num_done * 10 // total > (num_done - 1) * 10 // total:
                console.print(f"{what}: {num_done:,} of {total:,}")

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
    """corpus.json, if the folder is whole and of this recipe and these parameters; takes a fraction of a second."""
    try:
        about: dict[str, Any] = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        same = (about["recipe"], about["parameters"], about["digest"]) == (RECIPE, parameters, _digest(folder))
    except (OSError, ValueError, KeyError, TypeError):  # missing or torn: not whole
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
    foreign = set(os.listdir(folder)) - {*FOLDERS, *FILES, "corpus.json"} if folder.exists() else set()
    if foreign:
        raise UserError(f"{folder} holds {min(foreign)}, which is no part of a corpus; choose another folder.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the right to make `folder` against other processes; waits for it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} can't be made: {error}; choose another folder.") from error
    with lock:  # the file stays: removing it would let two processes hold two of them
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_corpus(
    folder: Path, *, width: int = 128, num_sentences: int | None = None, num_workers: int | None = None
) -> dict[str, Any]:
    """Makes the corpus in `folder` unless it is there, whole, with the same parameters; replaces any other corpus.

    `width` is that of the condition and emotion vectors; `num_sentences` (at least MIN_SENTENCES) takes only so
    many; `num_workers` speakers speak at a time (default: one a core). Returns what corpus.json says (`num_train`
    and `num_val` pairs, `num_speakers`, `seconds` and `hours` of speech, ...) and `reused`. An interruption leaves
    `folder` as it was. Raises UserError for impossible arguments, a folder with other files in it, and a demo
    package that is missing.
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
    with _locked(folder):
        if replaced.exists() and not folder.exists():  # interrupted between the two renames below
            replaced.rename(folder)
        if about := _read_whole(folder, parameters):  # another process made it while this one waited
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
    """The command; returns its exit status: 2 with one line on a user's mistake."""
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
        print(f"interrupted; {arguments.folder} is as it was", file=sys.stderr)
        return 130
    print(
        f"{arguments.folder}: {about['num_train']:,} training and {about['num_val']:,} validation pairs, "
        f"{about['hours']:.2f} hours of speech, {about['num_speakers']} speakers"
        + (" (already there)" if about["reused"] else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
