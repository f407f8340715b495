"""Judges paired manifests: prompts, vocabulary, splits, speakers, lengths and codes, each in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studies.indextts2.data_scan import BLOCK, DAMAGED, SELF_PAIR, STILL, UNKNOWN, Block, Scan, read_spelling, scan
from studies.indextts2.manifest import Manifest, ManifestSpec, open_manifest
from studies.indextts2.mix import divide
from studies.indextts2.model import GPTConfig
from trainer.check import Check, State

SAMPLE = 256
"""Lines of each split that a launch reads."""
NUM_EXAMPLES = 3
SERIOUS = 0.01
"""From this share on a fault of the data is a fail."""


@dataclass(frozen=True)
class Split:
    """The manifests of a split and what was read of them."""

    name: str
    manifests: Sequence[Manifest]
    numbers: np.ndarray
    """Numbers of the lines that were read, over all manifests."""
    found: Scan
    languages: Mapping[str, float]
    """The share of each in the samples that are drawn, with the shares of the manifests."""

    def having(self, flag: int) -> np.ndarray:
        """Positions in `found.lines`."""
        return np.flatnonzero(self.found.lines["flags"] & flag)

    def examples(self, positions: np.ndarray) -> str:
        """The ids of the first lines: ", such as a, b"."""
        if not len(positions):
            return ""
        starts = np.cumsum([0, *(len(manifest.text_lengths) for manifest in self.manifests)])
        ids = []
        for number in self.numbers[positions[:NUM_EXAMPLES]]:
            which = int(np.searchsorted(starts, number, side="right")) - 1
            ids.append(str(self.manifests[which].record(int(number - starts[which]))["id"]))
        return f", such as {', '.join(ids)}"


def check_manifests(
    train: Sequence[str],
    val: Sequence[str],
    config: GPTConfig,
    tokenizer: Path | None,
    *,
    whole: bool,
    progress: Callable[[int, int], None],
) -> Iterator[Check]:
    """Read the lines of both splits and judge them.

    Args:
        train: Manifests, PATH or PATH::language.
        tokenizer: None: nothing about characters is checked.
        whole: All lines; else `SAMPLE` of each split, without what needs all: repetitions, and speakers.
    """
    splits = _read_splits({"training": train, "validation": val}, config, tokenizer, whole, progress)
    training, validation = splits
    yield from (_check_files(split) for split in splits)
    yield _check_self_pairs(splits)
    if tokenizer:
        yield _check_unknown(splits, tokenizer)
        yield _check_spelling(splits, tokenizer, common=common_syllables() if whole else [])
        yield _check_tokens(splits)
    yield _check_lengths(splits, config)
    yield _check_codes(splits)
    yield _check_languages(training, validation)
    if whole:
        yield _check_overlap(training, validation, "speech", "validation targets", "targets")
        yield _check_overlap(training, validation, "text", "texts of the validation", "texts")
        yield from (_check_duplicates(split) for split in splits)
        yield _check_speakers(training, validation)
    elif same := {m.digest for m in training.manifests} & {m.digest for m in validation.manifests}:
        path = next(m.path for m in validation.manifests if m.digest in same)
        remedy = "validate on utterances of its own: the validation loss can't show overfitting"
        yield Check("val in train", "warn", f"{path} is a training manifest too", remedy)


def _read_splits(
    specs: dict[str, Sequence[str]],
    config: GPTConfig,
    tokenizer: Path | None,
    whole: bool,
    progress: Callable[[int, int], None],
) -> list[Split]:
    opened = {name: [open_manifest(spec) for spec in given] for name, given in specs.items()}
    chosen: dict[str, np.ndarray] = {}
    blocks: dict[str, list[Block]] = {}
    for name, manifests in opened.items():
        sizes = [len(manifest.text_lengths) for manifest in manifests]
        total = sum(sizes)
        chosen[name] = np.arange(total) if whole else np.unique(np.linspace(0, total - 1, SAMPLE).astype(np.int64))
        starts, blocks[name] = np.cumsum([0, *sizes]), []
        for spec, first, last in zip(specs[name], starts, starts[1:], strict=False):
            rows = chosen[name][np.searchsorted(chosen[name], first) : np.searchsorted(chosen[name], last)] - first
            for start in range(0, len(rows), BLOCK):
                part = rows[start : start + BLOCK]
                blocks[name].append(
                    Block(spec, range(part[0], part[-1] + 1) if whole else part.tolist(), config, tokenizer)
                )
    num_done, num_lines = 0, sum(map(len, chosen.values()))

    def count(number: int) -> None:
        nonlocal num_done
        num_done += number
        progress(num_done, num_lines)

    scans = list(scan([block for split in blocks.values() for block in split], count))
    splits = []
    for name, own in blocks.items():
        parts, scans = scans[: len(own)], scans[len(own) :]
        scans_of = [[part for block, part in zip(own, parts, strict=True) if block.manifest == s] for s in specs[name]]
        languages = _languages(specs[name], opened[name], scans_of, config)
        splits.append(Split(name, opened[name], chosen[name], Scan.join(parts), languages))
    return splits


def _languages(
    specs: Sequence[str], manifests: Sequence[Manifest], scans: Sequence[Sequence[Scan]], config: GPTConfig
) -> dict[str, float]:
    """The share of each language in the samples that are drawn: by the lines of each manifest, else by its label."""
    sizes = [int(np.count_nonzero(manifest.fits(config))) for manifest in manifests]
    found: dict[str, float] = {}
    parts = divide(sizes, [ManifestSpec.parse(spec).share for spec in specs])
    for manifest, part, own in zip(manifests, parts, scans, strict=True):
        counts = sum((scan.languages for scan in own), Counter[str]()) or {manifest.language or "not named": 1}
        for language, number in counts.items():
            found[language] = found.get(language, 0.0) + part * number / sum(counts.values())
    return found


def _judge(share: float, tolerated: float = 0.0) -> State:
    return "ok" if share <= tolerated else "warn" if share <= SERIOUS else "fail"


def _percent(share: float) -> str:
    """Such as "0.0031%": with few figures, but one of a million is not none."""
    return f"{100 * share:.0f}%" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"


def _share(splits: Sequence[Split], flag: int) -> tuple[float, str]:
    """The share of the lines with a flag, and the message: number, lines, examples."""
    num_lines = sum(len(split.found.lines) for split in splits)
    found = {split.name: split.having(flag) for split in splits}
    number = sum(map(len, found.values()))
    share = number / max(1, num_lines)
    examples = next((split.examples(found[split.name]) for split in splits if len(found[split.name])), "")
    if not number:
        return 0.0, f"none of {num_lines:,} lines"
    return share, f"{number:,} of {num_lines:,} lines ({_percent(share)}){examples}"


def _check_files(split: Split) -> Check:
    share, message = _share([split], DAMAGED)
    remedy = "preprocess these again, or leave them out: a run stops at more than 1%" if share else ""
    return Check(f"{split.name} files", _judge(share), f"damaged or missing: {message}", remedy)


def _check_self_pairs(splits: Sequence[Split]) -> Check:
    share, message = _share(splits, SELF_PAIR)
    if not any(split.found.num_paired for split in splits):
        return Check("self pairs", "ok", "not known: the lines have no prompt_id and target_id")
    remedy = "pair each target with another utterance of its speaker: the model learns to copy its prompt"
    return Check("self pairs", _judge(share), f"the prompt is the target: {message}", remedy if share else "")


def _check_unknown(splits: Sequence[Split], tokenizer: Path) -> Check:
    tokens = sum(split.found.num_tokens for split in splits)
    unknown = sum(split.found.num_unknown for split in splits)
    share = unknown / max(1, tokens)
    message = f"{unknown:,} of {tokens:,} tokens ({_percent(share)}); {_share(splits, UNKNOWN)[1]}"
    if unknown and not any(split.found.num_with_text for split in splits):
        message += "; the lines have no target_text, so their characters are not known"
    elif chars := sum((split.found.unknown_chars for split in splits), Counter[str]()):
        message += f"; from {_list(chars)}"
    remedy = f"replace these characters, or train {tokenizer.name} on these texts with byte_fallback"
    return Check("unknown tokens", _judge(share), message, remedy if share else "")


def _list(chars: Counter[str]) -> str:
    """The most frequent characters with their counts."""
    shown = ", ".join(f"{char!r} {count:,}" for char, count in chars.most_common(8))
    return shown + (f" and {len(chars) - 8:,} more" if len(chars) > 8 else "")


def common_syllables() -> list[str]:
    """The 2,350 Hangul syllables of KS X 1001, which cover ordinary Korean."""
    return [char for char in map(chr, range(0xAC00, 0xD7A4)) if _is_common(char)]


def _is_common(char: str) -> bool:
    try:
        return len(char.encode("euc_kr")) == 2
    except UnicodeEncodeError:
        return False


def _check_spelling(splits: Sequence[Split], tokenizer: Path, common: Sequence[str]) -> Check:
    """Hangul that the tokenizer has no piece for: in the texts, and in `common`."""
    if not any(_base(language) == "ko" for split in splits for language in split.languages):
        return Check("hangul", "ok", "no Korean: not checked")
    spelling = read_spelling(tokenizer)
    how = {kind: [char for char in common if spelling.spell(char) == kind] for kind in ("unknown", "bytes")}
    used: Counter[str] = Counter()
    for split in splits:
        for chars in (split.found.unknown_chars, split.found.byte_chars):
            used.update({char: count for char, count in chars.items() if "\uac00" <= char <= "\ud7a3"})
    parts = [f"in the texts without a piece: {_list(used) or 'none'}"]
    if common:
        examples = " ".join([*how["unknown"], *how["bytes"]][:8])
        parts.append(
            f"of {len(common):,} common syllables {len(how['unknown']):,} unknown and {len(how['bytes']):,} in bytes"
            + (f" ({examples})" if examples else "")
        )
    state: State = "warn" if used or any(how.values()) else "ok"
    remedy = "train the tokenizer with these syllables as required_chars, and make the text ids again"
    return Check("hangul", state, "; ".join(parts), "" if state == "ok" else remedy)


def _check_tokens(splits: Sequence[Split]) -> Check:
    tokens, chars = (sum(getattr(split.found, name) for split in splits) for name in ("num_tokens", "num_chars"))
    ratio = tokens / max(1, chars)
    state: State = "warn" if ratio > 1.25 else "ok"
    remedy = "the tokenizer was not trained on this language: train one on these texts" if state == "warn" else ""
    return Check("tokens", state, f"{ratio:.2f} tokens per character, without spaces", remedy)


def _check_lengths(splits: Sequence[Split], config: GPTConfig) -> Check:
    """From the indexes: all lines, also of a sample."""
    parts, share = [], 0.0
    for split in splits:
        text = np.concatenate([manifest.text_lengths for manifest in split.manifests])
        codes = np.concatenate([manifest.code_lengths for manifest in split.manifests])
        left_out = len(text) - sum(int(np.count_nonzero(manifest.fits(config))) for manifest in split.manifests)
        share = max(share, left_out / len(text))
        parts.append(
            f"{split.name}: up to {text.max():,} of {config.max_text_tokens:,} text tokens and {codes.max():,} of "
            f"{config.max_mel_tokens:,} codes, {left_out:,} of {len(text):,} left out"
        )
    state: State = "fail" if share > 0.1 else "warn" if share else "ok"
    remedy = "split the long utterances, or accept that they are left out" if share else ""
    return Check("lengths", state, "; ".join(parts), remedy)


def _check_codes(splits: Sequence[Split]) -> Check:
    share, message = _share(splits, STILL)
    remedy = "listen to these: silence or a broken recording teaches the model to fall silent" if share else ""
    return Check("codes", _judge(share), f"nearly constant, as in silence: {message}", remedy)


def _base(language: str) -> str:
    return language.lower().replace("_", "-").partition("-")[0]


def _shares(counts: Mapping[str, float]) -> str:
    total, largest = sum(counts.values()), sorted(counts, key=lambda name: -counts[name])[:4]
    shown = ", ".join(f"{name} {_percent(counts[name] / total)}" for name in largest)
    return shown + (f" and {len(counts) - 4:,} more" if len(counts) > 4 else "")


def _check_languages(training: Split, validation: Split) -> Check:
    message = f"the training draws {_shares(training.languages)}; the validation has {_shares(validation.languages)}"
    missing, new = training.languages.keys() - validation.languages, validation.languages.keys() - training.languages
    labels = {_base(m.language) for split in (training, validation) for m in split.manifests if m.language}
    if wrong := labels - {_base(name) for split in (training, validation) for name in split.languages}:
        remedy = "correct the ::language of the manifest, or the language of its lines"
        return Check("languages", "warn", f"{message}; no line has the label {', '.join(sorted(wrong))}", remedy)
    if new:
        return Check("languages", "warn", message, f"{', '.join(sorted(new))} is validated and not trained")
    if missing:
        remedy = f"add {', '.join(sorted(missing))} to the validation: nothing would show that it is forgotten"
        return Check("languages", "warn", message, remedy)
    return Check("languages", "ok", message)


def _check_overlap(training: Split, validation: Split, column: str, what: str, short: str) -> Check:
    """Lines of the validation whose hash is in the training too."""
    lines = validation.found.lines
    usable = _usable(validation)
    shared = usable[np.isin(lines[column][usable], training.found.lines[column][_usable(training)])]
    share = len(shared) / max(1, len(usable))
    message = f"{len(shared):,} of {len(usable):,} {what} are in the training ({_percent(share)})"
    if column == "text":
        state: State = "ok" if share <= SERIOUS else "warn"
        remedy = "the validation's text loss is too low: draw it by sentence, not by line"
    else:
        state, remedy = _judge(share), "leave them out of one split: the validation loss does not show overfitting"
    return Check(f"val {short}", state, message + validation.examples(shared), "" if state == "ok" else remedy)


def _usable(split: Split) -> np.ndarray:
    """Positions of the lines that could be read."""
    return np.flatnonzero((split.found.lines["flags"] & DAMAGED) == 0)


def _check_duplicates(split: Split) -> Check:
    """Lines that equal an earlier one in all that the model sees."""
    lines, usable = split.found.lines, _usable(split)
    _, first = np.unique(lines["pair"][usable], return_index=True)
    repeated = np.delete(usable, first)
    share = len(repeated) / max(1, len(usable))
    num_targets = len(np.unique(lines["speech"][usable]))
    message = f"{len(repeated):,} of {len(usable):,} lines repeat another one ({_percent(share)})"
    message += f"{split.examples(repeated)}; {num_targets:,} different targets"
    state: State = "fail" if share > 0.1 else "warn" if repeated.size else "ok"
    remedy = "remove them: an epoch weighs them twice" if repeated.size else ""
    return Check(f"{split.name} repeats", state, message, remedy)


def _check_speakers(training: Split, validation: Split) -> Check:
    found = {split.name: split.found.speakers for split in (training, validation)}
    if not found["training"]:
        return Check("speakers", "ok", "not known: the lines have no speaker")
    message = "; ".join(f"{name}: {len(each):,} ({_shares(each)})" for name, each in found.items())
    unseen = found["validation"].keys() - found["training"].keys()
    message += f"; {len(unseen):,} of the validation are not in the training"
    (_, largest), *others = found["training"].most_common()
    if others and largest > 0.5 * found["training"].total():
        return Check(
            "speakers", "warn", message, "more than half of the training is one voice: draw fewer of its lines"
        )
    return Check("speakers", "ok", message)
