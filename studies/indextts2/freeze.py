"""Parts of the model that are not trained: whole parameters, or rows of the text tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from studies.indextts2.weights import TEXT_ROWS
from trainer.errors import UserError

_ROWS = re.compile(r"(.*)\[(?:(base)|(\d+):(\d+))\]")


def freeze_parts(model: nn.Module, names: Sequence[str], base_rows: Callable[[], Sequence[int]]) -> None:
    """Freeze what the option `freeze` names: prefixes of parameters, and rows such as "text_embedding[base]".

    Args:
        base_rows: Called for "[base]": the numbers of the base vocabulary's rows.

    Raises:
        UserError: A name fits nothing, or nothing is left to train.
    """
    rows: dict[str, set[int]] = {}
    for entry in names:
        if "[" in entry:
            tables, chosen = _parse_rows(model, entry, base_rows)
            for table in tables:
                rows.setdefault(table, set()).update(chosen)
            continue
        named = [parameter for name, parameter in model.named_parameters() if name.startswith(entry)]
        if not named:
            example = next(name for name, _ in model.named_parameters())
            raise UserError(f"freeze names {entry!r}, and no parameter starts so; they are like {example!r}")
        for parameter in named:
            parameter.requires_grad_(False)
    for table, frozen in rows.items():
        if model.get_parameter(table).requires_grad:
            _freeze_rows(model, table, frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze = {list(names)} leaves nothing to train")


def _parse_rows(
    model: nn.Module, entry: str, base_rows: Callable[[], Sequence[int]]
) -> tuple[list[str], Sequence[int]]:
    """The tables of an entry, and the numbers of its rows."""
    match = _ROWS.fullmatch(entry)
    tables = [name for name in TEXT_ROWS if match and name.startswith(match[1])]
    if not match or not tables:
        raise UserError(
            f"freeze names {entry!r}: rows are those of text_embedding and text_head, and are written as "
            '"text_embedding[base]" or "text_head[0:12000]"'
        )
    if match[2]:
        return tables, base_rows()
    start, end, size = int(match[3]), int(match[4]), len(model.get_parameter(tables[0]))
    if not start < end <= size:
        raise UserError(f"freeze names {entry!r}, and the table has the rows 0:{size}")
    return tables, range(start, end)


class _Rows(nn.Module):
    """A table of which some rows are trained. The parameter holds these alone, so that neither weight decay nor the
    optimizer's sums see the others."""

    table: Tensor
    trained: Tensor

    def __init__(self, table: Tensor, trained: Tensor) -> None:
        super().__init__()
        # Non-persistent: the state dict holds the whole table, under its published name.
        self.register_buffer("table", table.detach().clone(), persistent=False)
        self.register_buffer("trained", trained, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.table.index_copy(0, self.trained, rows)

    def right_inverse(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.trained)


def _freeze_rows(model: nn.Module, table: str, frozen: set[int]) -> None:
    path, _, name = table.rpartition(".")
    module = model.get_submodule(path)
    whole = getattr(module, name)
    trained = [row for row in range(len(whole)) if row not in frozen]
    if not trained:
        whole.requires_grad_(False)
        return
    rows = _Rows(whole, torch.tensor(trained))
    parametrize.register_parametrization(module, name, rows)
    inner = f"parametrizations.{name}.original"

    def publish(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        del state[prefix + inner]
        state[prefix + name] = getattr(module, name).detach()

    def take(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if (whole := state.pop(prefix + name, None)) is not None:
            rows.table.copy_(whole)
            state[prefix + inner] = rows.right_inverse(whole.to(rows.table.device))

    module.register_state_dict_post_hook(publish)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(take)  # type: ignore[no-untyped-call]
