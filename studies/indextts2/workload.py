"""IndexTTS-2's GPT as a workload: paired utterances in, losses of text and speech codes out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, ValidationInfo, model_validator
from torch import Tensor

from studies.indextts2.config_file import find_tokenizer, read_config
from studies.indextts2.data_checks import check_manifests
from studies.indextts2.dataset import PairedUtterances, Utterance, utterance_length
from studies.indextts2.export import export_gpt, list_export_files
from studies.indextts2.freeze import freeze_parts
from studies.indextts2.lora import add_lora, load_adapters, merge_lora, set_adapters
from studies.indextts2.manifest import ManifestSpec
from studies.indextts2.mix import check_shares, draw_shares
from studies.indextts2.model import NO_TARGET, PREFIX, GPTConfig, IndexTTS2GPT
from studies.indextts2.weights import LORA_BASE, TEXT_ROWS, count_pieces, find_shared_rows, load_base_checkpoint
from trainer.check import Check
from trainer.config import NonNegativeInt, PositiveFloat, Role
from trainer.errors import UserError
from trainer.export import WeightsFormat, WriteFile
from trainer.workload import Batch, DataPath, Dataset, Workload, resolve_path


def _resolve_manifest(spec: str, info: ValidationInfo) -> str:
    path = ManifestSpec.parse(spec).path
    return str(resolve_path(Path(path), info)) + spec[len(path) :]


ManifestPath = Annotated[str, AfterValidator(_resolve_manifest)]
"""PATH, PATH::language or PATH::language@share, the path relative to the study.toml, stored absolute."""


class IndexTTS2(Workload):
    """The options of `[workload]`. One of `config` and `gpt` gives the size of the model."""

    # Paths may change between a run and its continuation; `data_digest` covers their contents.
    train_manifests: Annotated[list[ManifestPath], Role.FREE] = Field(min_length=1)
    """Mixed. With shares ("a.jsonl::ko", "b.jsonl::en@0.15") 15% of the samples are drawn from b; the manifests without
    a share divide the rest by size."""
    val_manifests: Annotated[list[ManifestPath], Role.FREE] = Field(min_length=1)
    config: Annotated[DataPath | None, Role.FREE] = None
    """A config.yaml with a `gpt:` section."""
    gpt: GPTConfig | None = None
    """That section, inline."""
    base_checkpoint: Annotated[DataPath | None, Role.FREE] = None
    """Weights to start from: a `gpt.pth`, or a checkpoint of this trainer. Absent: from scratch."""
    tokenizer: Annotated[DataPath | None, Role.FREE] = None
    """The SentencePiece model that made the text ids; its size is the model's `number_text_tokens`."""
    base_tokenizer: Annotated[DataPath | None, Role.FREE] = None
    """The SentencePiece model of `base_checkpoint` or of other initial weights, if it is another one."""
    text_loss_weight: Annotated[NonNegativeFloat, Role.MEASURE] = 0.2
    mel_loss_weight: Annotated[NonNegativeFloat, Role.MEASURE] = 0.8
    duration: Literal["binary", "length"] = "binary"
    """The model's input about the utterance's duration; see `IndexTTS2GPT`."""
    freeze: tuple[str, ...] = ()
    """Prefixes of the names of parameters that are not trained: "gpt.h.0.", "text_embedding". Also rows of the text
    tables: "text_embedding[base]", those of the pieces of `base_tokenizer`, or "text_head[0:12000]"."""
    lora_rank: NonNegativeInt = 0
    """Above 0: LoRA adapters of this rank on the attention and MLP layers are trained in place of their weights."""
    lora_alpha: PositiveFloat | None = None
    """The adapters' products are multiplied by lora_alpha / lora_rank. Default: lora_rank."""
    lora_train: tuple[str, ...] = ()
    """Prefixes of the names of parameters that are trained beside the adapters. The text tables are, if there is a
    `base_tokenizer`: their new rows are random at first."""
    condition_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the training samples whose speaker and emotion are zeros: the model can't lean on the prompt alone."""
    pack: Annotated[Literal["auto"] | bool, Role.FREE] = "auto"
    """Pack the utterances' files into one memory-mapped store on first use. "auto": if it needs at most 20 GB and a
    quarter of the free disk; true: if the disk has room; false: never."""
    gradient_checkpointing: Annotated[bool, Role.FREE] = False
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> IndexTTS2:
        if (self.config is None) == (self.gpt is None):
            raise ValueError("give exactly one of 'config' (a config.yaml) and 'gpt' (its gpt section, inline)")
        if self.base_tokenizer and not self.tokenizer:
            raise ValueError("'base_tokenizer' is only of use with 'tokenizer'")
        check_shares([ManifestSpec.parse(spec).share for spec in self.train_manifests])
        if shared := [spec for spec in self.val_manifests if ManifestSpec.parse(spec).share]:
            raise ValueError(f"{shared[0]}: the validation set is fixed, and has no shares; remove the share")
        if self.lora_rank and not self.base_checkpoint:
            raise ValueError("'lora_rank' needs 'base_checkpoint': adapters change the weights of a trained model")
        if self.text_loss_weight + self.mel_loss_weight == 0:
            raise ValueError("'text_loss_weight' and 'mel_loss_weight' can't both be 0")
        return self

    @cached_property
    def gpt_config(self) -> GPTConfig:
        """The model's configuration, its text vocabulary that of the tokenizer if there is one."""
        config = self.gpt or read_config(self.config or Path())
        if self.tokenizer:
            config = config.model_copy(update={"number_text_tokens": count_pieces(self.tokenizer)})
        return config

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"text_loss": self.text_loss_weight, "mel_loss": self.mel_loss_weight}

    def build_model(self) -> IndexTTS2GPT:
        model = IndexTTS2GPT(
            self.gpt_config,
            dropout=self.dropout,
            condition_dropout=self.condition_dropout,
            duration=self.duration,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        if self.base_checkpoint:
            load_base_checkpoint(
                model, self.base_checkpoint, tokenizer=self.tokenizer, base_tokenizer=self.base_tokenizer
            )
        if self.lora_rank:
            add_lora(
                model,
                rank=self.lora_rank,
                alpha=self.lora_alpha or self.lora_rank,
                also=(*self.lora_train, *(TEXT_ROWS if self.base_tokenizer else ())),
                digest=_fingerprint(self.base_checkpoint),
            )
        freeze_parts(model, self.freeze, self._base_rows)
        return model

    def _base_rows(self) -> Sequence[int]:
        if not (self.tokenizer and self.base_tokenizer):
            raise UserError("freeze names rows as [base], which needs tokenizer and base_tokenizer in [workload]")
        return list(find_shared_rows(self.gpt_config, self.tokenizer, self.base_tokenizer))

    @cached_property
    def _train_files(self) -> PairedUtterances:
        return PairedUtterances(self.train_manifests, self.gpt_config)

    @cached_property
    def _val_files(self) -> PairedUtterances:
        return PairedUtterances(self.val_manifests, self.gpt_config)

    @cached_property
    def _train(self) -> Dataset:
        return self._train_files.open_packed(self.pack)

    @cached_property
    def _val(self) -> Dataset:
        return self._val_files.open_packed(self.pack)

    def train_data(self) -> Dataset:
        return self._train

    def val_data(self) -> Dataset:
        return self._val

    def draw_epoch(self, epoch: int, seed: int) -> np.ndarray | None:
        shares = [ManifestSpec.parse(spec).share for spec in self.train_manifests]
        if not any(shares):
            return None
        sizes = self._train_files.sizes
        if 0 in sizes:
            raise UserError(
                f"{self.train_manifests[sizes.index(0)]}: none of its utterances fits into the model's position "
                "tables, so it can't have a part of the mix; leave it out of train_manifests"
            )
        return draw_shares(sizes, shares, epoch, seed)

    @cached_property
    def _val_parts(self) -> list[str]:
        """A name for each validation manifest: its language, or its file's name if they have not several languages."""
        if len(self.val_manifests) == 1:
            return [""]
        languages = [ManifestSpec.parse(spec).language or "" for spec in self.val_manifests]
        if all(languages) and len(set(languages)) > 1:
            return languages
        stems = [Path(ManifestSpec.parse(spec).path).stem for spec in self.val_manifests]
        return [f"{stem}-{number}" if stems.count(stem) > 1 else stem for number, stem in enumerate(stems)]

    def val_part(self, index: int) -> str:
        return self._val_parts[self._val_files.manifest_of(index)]

    def collate(self, samples: Sequence[Utterance], pad_multiple: int = 1) -> Batch:
        return collate(samples, self.gpt_config, pad_multiple)

    def loss_sums(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`text_loss` and `mel_loss`; in eval mode `mel_top1` too, so that a training step pays nothing."""
        return model(inputs)  # type: ignore[no-any-return]

    def load_weights(self, model: torch.nn.Module, path: Path) -> None:
        model = cast(IndexTTS2GPT, model)
        if self.lora_rank:
            load_adapters(model, path)
        else:
            load_base_checkpoint(model, path, tokenizer=self.tokenizer, base_tokenizer=self.base_tokenizer)

    def _merge(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights of a checkpoint, its adapters merged into the base's."""
        if not self.lora_rank or LORA_BASE not in state:
            return state
        # Without frozen rows the text tables are whole parameters.
        model = self.model_copy(update={"freeze": ()}).build_model()
        set_adapters(model, state, "the checkpoint")
        return merge_lora(model)

    def export_weights(self, state: Mapping[str, Tensor], path: Path, *, format: WeightsFormat = "pth") -> None:
        export_gpt(self._merge(state), path, base_checkpoint=self.base_checkpoint, format=format)

    def export_files(self, state: Mapping[str, Tensor], *, format: WeightsFormat = "pth") -> Mapping[str, WriteFile]:
        return list_export_files(
            self._merge(state),
            config=self.gpt_config,
            config_file=self.config,
            tokenizer=self.tokenizer,
            base_checkpoint=self.base_checkpoint,
            format=format,
        )

    def input_files(self) -> Sequence[tuple[str, Path]]:
        specs = {"train_manifests": self.train_manifests, "val_manifests": self.val_manifests}
        manifests = [(name, Path(ManifestSpec.parse(spec).path)) for name, given in specs.items() for spec in given]
        names = ("config", "base_checkpoint", "tokenizer", "base_tokenizer")
        return [*manifests, *((name, path) for name in names if (path := getattr(self, name)) is not None)]

    def unpacked(self) -> IndexTTS2:
        # No copy: it would share the data that is already open.
        return self if self.pack is False else self.model_validate(self.model_dump() | {"pack": False})

    def check_data(
        self, *, whole: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[Check]:
        tokenizer = self.tokenizer or (find_tokenizer(self.config) if self.config else None)
        return check_manifests(
            self.train_manifests, self.val_manifests, self.gpt_config, tokenizer, whole=whole, progress=progress
        )

    def memory_savers(self) -> Sequence[str]:
        time = () if self.gradient_checkpointing else ("gradient_checkpointing = true",)
        return time if self.lora_rank or not self.base_checkpoint else (*time, "lora_rank = 16")

    def without_initial_weights(self) -> IndexTTS2:
        # Adapters are loaded beside the weights of the base.
        return self if self.lora_rank else self.model_copy(update={"base_checkpoint": None})

    def data_digest(self) -> str:
        train, val = self._train_files.digests, self._val_files.digests
        digests = ["train", *train, "val", *val, self.gpt_config.model_dump_json()]
        shares = [ManifestSpec.parse(spec).share for spec in self.train_manifests]
        digests += [f"shares {shares}"] if any(shares) else []
        digests += [_fingerprint(path) for path in (self.base_checkpoint, self.tokenizer, self.base_tokenizer)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def best_checkpoints(self) -> Mapping[str, str]:
        return {"val/mel_loss": "best_mel_model.pth", "val/text_loss": "best_text_model.pth"}


def collate(samples: Sequence[Utterance], config: GPTConfig, pad_multiple: int = 1) -> Batch:
    """Make the inputs of `IndexTTS2GPT.forward`.

    The rows' length is rounded up to `pad_multiple`, and the numbers of text and mel targets to `pad_multiple` per
    row, so that batches of one size have few shapes.
    """
    lengths = [utterance_length(len(sample.text), len(sample.codes)) for sample in samples]
    length = _round_up(max(lengths), pad_multiple)
    shape = (len(samples), length - PREFIX)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    is_mel = np.zeros(shape, np.bool_)
    targets: dict[str, list[np.ndarray]] = {"text": [], "mel": []}
    places: dict[str, list[np.ndarray]] = {"text": [], "mel": []}
    for row, sample in enumerate(samples):
        mel_start = len(sample.text) + 2
        end = mel_start + 1 + len(sample.codes)
        ids[row, 0], ids[row, mel_start - 1] = config.start_text_token, config.stop_text_token
        ids[row, 1 : mel_start - 1] = sample.text
        ids[row, mel_start] = config.start_mel_token
        ids[row, mel_start + 1 : end] = sample.codes
        positions[row, :mel_start] = np.arange(mel_start)
        positions[row, mel_start:end] = np.arange(end - mel_start)
        is_mel[row, mel_start:end] = True
        first = row * length + PREFIX
        places["text"].append(np.arange(first, first + mel_start - 1))
        targets["text"].append(np.append(sample.text, config.stop_text_token))
        places["mel"].append(np.arange(first + mel_start, first + end))
        targets["mel"].append(np.append(sample.codes, config.stop_mel_token))
    arrays = {
        "condition": np.stack([sample.condition for sample in samples]),
        "emo_vec": np.stack([sample.emo_vec for sample in samples]),
        "ids": ids,
        "positions": positions,
        "is_mel": is_mel,
        "code_lengths": np.array([len(sample.codes) for sample in samples]),
    }
    num_targets = {}
    for kind in ("text", "mel"):
        num_targets[kind] = sum(map(len, targets[kind]))
        num_padded = _round_up(num_targets[kind], pad_multiple * len(samples))
        arrays[f"{kind}_index"] = _join_padded(places[kind], num_padded, 0)
        arrays[f"{kind}_targets"] = _join_padded(targets[kind], num_padded, NO_TARGET)
    return Batch(
        inputs={name: torch.from_numpy(values) for name, values in arrays.items()},
        counts={
            "text_loss": num_targets["text"],
            "mel_loss": num_targets["mel"],
            "mel_top1": num_targets["mel"],
        },
        num_samples=len(samples),
        num_tokens=sum(lengths),
        num_slots=len(samples) * length,
    )


def _fingerprint(path: Path | None, edge: int = 1 << 20) -> str:
    """Size, first and last megabyte: the end of a `.pth` holds the checksum of each tensor in it."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            content = file.read(edge)
            file.seek(max(0, size - edge))
            return hashlib.sha256(b"%d" % size + content + file.read()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; check the path in [workload]") from None


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _join_padded(parts: Sequence[np.ndarray], length: int, filling: int) -> np.ndarray:
    """The concatenated parts, filled up to `length`: int64."""
    values = np.full(length, filling, np.int64)
    joined = np.concatenate(parts)
    values[: len(joined)] = joined
    return values
