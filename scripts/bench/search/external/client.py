"""The script's side of the protocol."""

from __future__ import annotations

import json
import sys
from typing import Any

Config = dict[str, Any]

_messages, sys.stdout = sys.stdout, sys.stderr


def read_line() -> dict[str, Any]:
    """Returns the next message; exits where the search is over. The first one describes the search."""
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    message: dict[str, Any] = json.loads(line)
    return message


def send(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_messages, flush=True)


def train(config: Config, until: int) -> list[tuple[int, float]]:
    """The losses so far, (samples, loss)."""
    send({"config": config, "until": until})
    return [(samples, loss) for samples, loss in read_line()["curve"]]


def promote(config: Config) -> None:
    """Choose it from now on."""
    send({"promote": config})


class Incumbent:
    """The configuration with the lowest loss of all evaluations, which most tools report as their best."""

    def __init__(self) -> None:
        self.loss = float("inf")

    def train(self, config: Config, until: int) -> float:
        """The loss there; the configuration is chosen if it is the lowest one so far."""
        loss = train(config, until)[-1][1]
        if loss < self.loss:
            self.loss = loss
            promote(config)
        return loss
