"""The config.yaml of a model: its `gpt:` section, its file names, and a copy with another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from studies.indextts2.model import GPTConfig
from trainer.errors import UserError

VOCABULARY = "number_text_tokens"


def read_config(path: Path) -> GPTConfig:
    """The `gpt:` section of a config.yaml. Raises UserError where the file or the section can't be read."""
    return parse_gpt(read_text(path), path)


def read_text(path: Path) -> str:
    """The file with its own line ends."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"config {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not UTF-8") from None


def parse_gpt(text: str, path: Path) -> GPTConfig:
    """The `gpt:` section of a config.yaml's text; `path` is for the message of a UserError."""
    try:
        return GPTConfig.model_validate(parse(text, path)["gpt"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("gpt", *first["loc"])))
        raise UserError(f"config {path}: {where}: {first['msg']}") from None
    except KeyError:
        raise UserError(f"config {path} has no gpt: section") from None


def parse(text: str, path: Path) -> Mapping[str, Any]:
    """The content of a config.yaml's text; empty where it is no mapping."""
    yaml = _yaml(path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, Mapping) else {}


def name_of(content: Mapping[str, Any], part: Literal["tokenizer", "weights"]) -> str:
    """The name that a config.yaml gives a file of its folder; the usual name where it gives none, or another folder."""
    dataset = content.get("dataset")
    if part == "weights":
        name, default = content.get("gpt_checkpoint"), "gpt.pth"
    else:
        name, default = dataset.get("bpe_model") if isinstance(dataset, Mapping) else None, "bpe.model"
    return name if isinstance(name, str) and Path(name).name == name else default


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer beside a config.yaml, if there is one."""
    tokenizer = path.parent / name_of(parse(read_text(path), path), "tokenizer")
    return tokenizer if tokenizer.is_file() else None


def format_config(config: GPTConfig, tokenizer: str, weights: str) -> str:
    """A config.yaml for a model whose size is inline in the study.toml: without the other parts of inference."""
    content = {"dataset": {"bpe_model": tokenizer}, "gpt": config.model_dump(), "gpt_checkpoint": weights}
    return str(_yaml(Path("config.yaml")).safe_dump(content, sort_keys=False))


def set_vocabulary(text: str, size: int, path: Path) -> str:
    """The text with `gpt.number_text_tokens` = `size`; every other character stays.

    Raises:
        UserError: The value is missing, or is used by another key too (a YAML alias).
    """
    yaml = _yaml(path)
    before = parse(text, path)
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in ("gpt", VOCABULARY):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in entries if name.value == key), None)
    if node is None:
        raise UserError(f"config {path} has no gpt.{VOCABULARY}: add it, with the value {size}")
    changed = text[: node.start_mark.index] + str(size) + text[node.end_mark.index :]
    if parse(changed, path) != {**before, "gpt": {**before["gpt"], VOCABULARY: size}}:
        raise UserError(f"config {path}: gpt.{VOCABULARY} can't be changed alone: write {size} there yourself")
    return changed


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError(f"reading {path} needs pyyaml: pip install 'prodigy-tuner[indextts2]'") from None
    return yaml
