"""The material of the Korean demo corpus: sentences, speakers, their speech by espeak-ng, and its codes and vectors.

    python -m studies.korean_demo.speech    one speaking process; `speak` runs it

`corpus` plans, pairs and writes. With a change of a byte here, increase `corpus.RECIPE`.
"""

import ctypes
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEED = 2024
SAMPLE_RATE = 22_050
CODES_PER_SECOND = 25
NUM_BANDS = 40
FFT_SIZE = 1024
NUM_CODES = 256
CONDITION_LEN = 32
MAX_CHARACTERS = 48  # longer sentences are cut: a step of the demo should take a tenth of a second

Progressed = Callable[[], None]


class Speaker(NamedTuple):
    """One espeak-ng voice: its variant, pitch (0 to 100) and rate (words a minute)."""

    name: str
    voice: str
    pitch: int
    rate: int


SPEAKERS = (
    Speaker("ko-base", "ko", 50, 220),
    Speaker("ko-m7", "ko+m7", 35, 205),
    Speaker("ko-f2", "ko+f2", 55, 230),
    Speaker("ko-shelby", "ko+shelby", 50, 220),
)


class Utterance(NamedTuple):
    """One sentence by one speaker; `split` is train or val."""

    id: str
    text: str
    speaker: Speaker
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
    spec = importlib.util.find_spec("konlpy")  # importing it needs Java
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


@functools.cache
def mel_filters(size: int) -> np.ndarray:
    """Triangular filters, float32 [size // 2 + 1, NUM_BANDS], evenly spaced in mel from 50 to 8,000 Hz."""
    lowest, highest = 2595 * np.log10(1 + np.array([50, 8000]) / 700)
    mels = np.linspace(lowest, highest, NUM_BANDS + 2)
    low, centre, high = np.lib.stride_tricks.sliding_window_view(700 * (10 ** (mels / 2595) - 1), NUM_BANDS)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)[:, None]
    rise, fall = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    filters: np.ndarray = np.maximum(0, np.minimum(rise, fall)).astype(np.float32)
    return filters


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Log energy by mel band of int16 samples at SAMPLE_RATE: float32 [frames, NUM_BANDS]."""
    size, hop = FFT_SIZE, SAMPLE_RATE // CODES_PER_SECOND
    padded = np.pad(wave.astype(np.float32) / 32768, (0, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: len(wave) : hop]
    window = np.hanning(size).astype(np.float32)
    spectrum = np.fft.rfft(frames * window)
    power = (spectrum.real**2 + spectrum.imag**2) / np.sum(window**2)  # abs() takes as long as the transform
    energies: np.ndarray = np.log(power.astype(np.float32) @ mel_filters(size) + np.float32(1e-5))
    return energies


def _speak_as() -> None:
    """A speaking process (see `speak`): reads a speaker and texts from stdin, writes log-mels to stdout."""
    import espeakng_loader
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)  # the speakers fill the cores
    (_, voice, pitch, words_a_minute), texts = json.load(sys.stdin)
    samples: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)  # type: ignore[untyped-decorator]
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
    it resets that: only a fresh process with the same texts in the same order repeats its samples.
    """
    log_mels: dict[str, np.ndarray] = {}
    processes: list[subprocess.Popen[bytes]] = []
    # Not by multiprocessing, which would run the caller's main module again in each process.
    command = [sys.executable, "-m", __name__]

    def run_speaker(speaker: Speaker) -> None:
        mine = [one for one in utterances if one.speaker == speaker]
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
                process.stdin.write(json.dumps([speaker, [one.text for one in mine]]).encode())
                process.stdin.close()
                for one in mine:
                    size = int.from_bytes(process.stdout.read(4))
                    spoken = process.stdout.read(size)
                    if not size or len(spoken) < size:
                        raise BrokenPipeError("the end of the pipe")
                    log_mels[one.id] = np.frombuffer(spoken, np.float32).reshape(-1, NUM_BANDS)
                    progressed()
            except BrokenPipeError as error:
                raise RuntimeError(f"the process of speaker {speaker.name} failed; its error is above") from error

    with ThreadPoolExecutor(num_workers) as threads:
        try:
            list(threads.map(run_speaker, SPEAKERS))
        finally:
            for process in processes:
                process.kill()  # no effect on an exited process
    return log_mels


def quantize(utterances: list[Utterance], log_mels: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each utterance's frames as int32 codes [frames], and the codebook, float32 [NUM_CODES, NUM_BANDS].

    K-means, its centres from the training split alone.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    frames = np.concatenate([log_mels[one.id] for one in utterances if one.split == "train"])
    with threadpool_limits(1):  # sums over threads differ in their last bit from run to run
        kmeans = MiniBatchKMeans(NUM_CODES, batch_size=4096, n_init=1, random_state=SEED)
        kmeans.fit(frames[::3])  # a third of them finds as good centres in a third of the time
        codes = kmeans.predict(np.concatenate([log_mels[one.id] for one in utterances])).astype(np.int32)
    ends = np.cumsum([len(log_mels[one.id]) for one in utterances])
    by_id = {one.id: own for one, own in zip(utterances, np.split(codes, ends[:-1]), strict=True)}
    return by_id, kmeans.cluster_centers_.astype(np.float32)


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
    statistics = (statistics - statistics[is_train].mean(0)) / statistics[is_train].std(0)

    def project(values: np.ndarray, shape: tuple[int, ...], stream: int) -> np.ndarray:
        matrix = np.random.default_rng([SEED, stream]).standard_normal((values.size, *shape))
        projected = np.tensordot(values, matrix, 1)
        scaled: np.ndarray = (0.3 * projected / projected.std()).astype(np.float32)
        return scaled

    conditions = {}
    for speaker in SPEAKERS:
        is_own = np.array([one.speaker == speaker for one in utterances])
        conditions[speaker.name] = project(statistics[is_train & is_own].mean(0), (CONDITION_LEN, width), 2)
    owns = zip(utterances, statistics, strict=True)
    return conditions, {one.id: project(own, (width,), 3) for one, own in owns}


if __name__ == "__main__":
    _speak_as()
