"""[notify] and [hooks]: what happens beside a run. They change no result, so they may differ between launches."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import PositiveFloat, model_validator

from tuner.spec.search import Section

Event = Literal["study_ended", "run_ended", "failed", "stopped_by_guard", "declined", "gpu_idle"]
Form = Literal["slack", "mattermost", "discord", "ntfy"]
HookEvent = Literal["best", "milestone", "end"]

PLACEHOLDERS = ("checkpoint", "step", "out", "study", "trial")
PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")
"""`{step}`, but not the shell's `${STEP}`."""


class NotifySection(Section):
    url: str | None = None
    """The name of an environment variable that holds a webhook's address: "$SLACK_URL". The address itself is a secret,
    and the study stores this section."""
    form: Form | None = None
    """The JSON that the receiver takes. Default: by the address."""
    command: str | None = None
    """In place of `url`: run in a shell, with $TUNER_EVENT and $TUNER_MESSAGE."""
    on: tuple[Event, ...] = ("study_ended", "run_ended", "failed", "stopped_by_guard", "declined", "gpu_idle")

    # Of the section and not of `url`: the message of a field's error would show its value.
    @model_validator(mode="after")
    def _check(self) -> NotifySection:
        if self.url is not None and not re.fullmatch(r"\$[A-Za-z_]\w*", self.url):
            raise ValueError(
                'url must be the name of an environment variable that holds the address, such as "$SLACK_URL": the '
                "study stores this file, and whoever has a webhook's address can write to it"
            )
        if self.url and self.command:
            raise ValueError("give url or command, not both")
        return self


class HooksSection(Section):
    command: str
    """Run in a shell, in the folder of the study.toml, with PLACEHOLDERS replaced."""
    on: tuple[HookEvent, ...] = ("best", "end")
    timeout: PositiveFloat = 600.0
    """Seconds."""
    metric: str | None = None
    """A number in the command's metrics.json, by which `promote --confirm` judges. Default: the study's metric."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Of `metric`."""

    @model_validator(mode="after")
    def _check(self) -> HooksSection:
        for name in PLACEHOLDER.findall(self.command):
            if name not in PLACEHOLDERS:
                known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
                raise ValueError(f"command has the unknown placeholder {{{name}}}; known are {known}")
        if "{checkpoint}" not in self.command:
            raise ValueError("command has no {checkpoint}: without it the command does not know which file to read")
        return self
