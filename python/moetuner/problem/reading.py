"""Reading: the options by which a recording was read, which its own files do not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from moetuner._checks import positive, shown, text_or_none, whole_number
from moetuner.recording import Recording
from moetuner.serving.settings import setting


def _texts(name: str, value: object) -> None:
    if not (isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)):
        raise ValueError(f"{name} must be a list of texts, got {shown(value)}")


@dataclass(frozen=True)
class Reading:
    """How a recording was read.

    The metadata of a field say how a later reading uses it. It ``replaces`` an option that is not
    given: for all recordings, or for counts whose windows have an unknown length. A ``hint`` is
    needed before the recording is read. A field that ``scales`` gives the numbers their meaning, so
    other recordings of the kind are read with it, too.

    Parameters
    ----------
    files, tokens, windows
        Names of its files, and the number of its tokens or windows.
    only, group_by
        The groups that were used, if not all, and the option that named the groups.
    model, weight_bits
        Name of its model, and bits of a weight.
    tokens_per_step
        Tokens of a step, to which windows of counts were scaled.
    num_experts, top_k
        Experts of a layer, and experts of a token, where its files do not say them.
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
        """Return the reading of a recording by options, from those fields that the options have."""
        names = [field.name for field in fields(cls) if hasattr(options, field.name)]
        values: dict[str, Any] = {name: getattr(options, name) for name in names}
        # A relative path is found again from the same folder; an absolute one is private.
        files = tuple(
            path.name if path.is_absolute() else str(path) for path in options.input_files
        )
        return cls(**{**values, "files": files, **recording.size})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reading:
        """Return the reading that a placement's file has; unknown keys are ignored."""
        checked: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if value is not None:
                field.metadata["check"](f"input.{field.name}", value)
                checked[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**checked)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    def substitute(self, options: Any, recording: Recording) -> dict[str, Any]:
        """Return the fields that replace options which are not given, by name."""
        kinds = ["all"]
        if not recording.ordered and recording.window is None:
            kinds.append("counts")
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.metadata.get("replaces") in kinds and getattr(options, field.name) is None
        }

    def hints(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of fields that are needed before a recording is read."""
        for field in fields(self):
            if field.metadata.get("hint"):
                yield field.name, getattr(self, field.name)

    def fits(self, recording: Recording) -> bool:
        """Return whether a recording has the size of the one that was read."""
        return all(getattr(self, name) == size for name, size in recording.size.items())

    def contradicts(self, recording: Recording) -> bool:
        """Return whether a recording has another size than the one that was read, if known."""
        return any(getattr(self, name) not in (None, size) for name, size in recording.size.items())

    def without_files(self) -> Reading:
        """Return the reading for other recordings of the kind: hints, and fields that scale."""
        values: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.metadata.get("scales") or field.metadata.get("hint")
        }
        return Reading(**values, group_by=self.group_by)


# Options by which other recordings of the kind are read, too.
SCALES = tuple(field.name for field in fields(Reading) if field.metadata.get("scales"))
