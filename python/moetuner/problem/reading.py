"""Reading: how a recording was read, which its own files do not say. Declared once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from moetuner._checks import positive, shown, text_or_none, whole_number
from moetuner.recording import Recording
from moetuner.serving.settings import setting


def _texts(name: str, value: object) -> None:
    if not (isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)):
        raise ValueError(f"{name} must be a list of texts, got {shown(value)}")


@dataclass(frozen=True)
class Reading:
    """How a recording was read.

    A field says of which recordings it ``replaces`` an option that is not given: of all, or of
    counts whose windows are of unknown length; whether it is a ``hint``, needed before the
    recording is read; and whether it ``scales``, so that others of the kind are read by it, too:
    what their numbers stand for.

    Parameters
    ----------
    files, tokens, windows
        Names of its files, and how much they held.
    only, group_by
        Groups that were used alone, and what named them.
    model, weight_bits
        Its model, and bits of a weight.
    tokens_per_step
        Tokens of a step that windows of counts were scaled to.
    num_experts, top_k
        What its files do not say of a layer.
    """

    files: tuple[str, ...] | None = setting(None, check=_texts)
    only: tuple[str, ...] | None = setting(None, check=_texts)
    tokens: int | None = setting(None, check=partial(whole_number, lowest=0))
    windows: int | None = setting(None, check=partial(whole_number, lowest=0))
    model: str | None = setting(None, check=text_or_none, replaces="all", scales=True)
    weight_bits: float | None = setting(None, check=positive, replaces="all", scales=True)
    tokens_per_step: int | None = setting(None, check=whole_number, replaces="counts", scales=True)
    num_experts: int | None = setting(None, check=whole_number, hint=True)
    top_k: int | None = setting(None, check=whole_number, replaces="counts", hint=True)
    group_by: str | None = setting(None, check=text_or_none)

    @classmethod
    def from_options(cls, options: Any, recording: Recording) -> Reading:
        """Return how options read a recording, of those fields that they have."""
        names = [own.name for own in fields(cls) if hasattr(options, own.name)]
        read: dict[str, Any] = {name: getattr(options, name) for name in names}
        # A path from here is found again from here; one of the whole machine is nobody else's.
        files = tuple(
            path.name if path.is_absolute() else str(path) for path in options.input_files
        )
        return cls(**{**read, "files": files, **recording.size})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reading:
        """Return what a placement's file says; other keys are of no use."""
        read: dict[str, Any] = {}
        for own in fields(cls):
            value = values.get(own.name)
            if value is not None:
                own.metadata["check"](f"input.{own.name}", value)
                read[own.name] = tuple(value) if isinstance(value, list) else value
        return cls(**read)

    def to_json(self) -> dict[str, Any]:
        """Return what is known, as JSON values."""
        return {
            own.name: list(value) if isinstance(value, tuple) else value
            for own in fields(self)
            if (value := getattr(self, own.name)) is not None
        }

    def substitute(self, options: Any, recording: Recording) -> dict[str, Any]:
        """Return what stands in for options that are not given, by their names."""
        kinds = ["all"]
        if not recording.ordered and recording.window is None:
            kinds.append("counts")
        return {
            own.name: getattr(self, own.name)
            for own in fields(self)
            if own.metadata.get("replaces") in kinds and getattr(options, own.name) is None
        }

    def hints(self) -> Iterator[tuple[str, Any]]:
        """Yield what is needed before a recording is read, by the names of options."""
        for own in fields(self):
            if own.metadata.get("hint"):
                yield own.name, getattr(self, own.name)

    def fits(self, recording: Recording) -> bool:
        """Whether a recording is as large as the one that was read."""
        return all(getattr(self, name) == size for name, size in recording.size.items())

    def contradicts(self, recording: Recording) -> bool:
        """Whether what was read had another size than a recording; not where it is not known."""
        return any(getattr(self, name) not in (None, size) for name, size in recording.size.items())

    def without_files(self) -> Reading:
        """Return how others of the kind are read: what its numbers stand for, and hints."""
        names = [
            own.name
            for own in fields(self)
            if own.metadata.get("scales") or own.metadata.get("hint")
        ]
        read: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Reading(**read, group_by=self.group_by)


# What other recordings of the kind are read by.
SCALES = tuple(own.name for own in fields(Reading) if own.metadata.get("scales"))
