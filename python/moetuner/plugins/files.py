"""Read the files that the settings name, once and whole; choose the placement of a model."""

from __future__ import annotations

import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner.formats import open_input
from moetuner.placement import Placement, keep_slots
from moetuner.plugins.decision import Case, MoveLimits, Slots
from moetuner.plugins.log import quote_error
from moetuner.plugins.settings import Settings
from moetuner.statistics import RoutingStatistics, as_counts

# How vLLM marks the name of a draft model, which has its own decisions beside the main model's.
DRAFT = " (draft)"


def compute_checksum(content: bytes) -> str:
    """Return eight hexadecimal digits that change when the content does."""
    return f"{zlib.crc32(content):08x}"


@dataclass(frozen=True)
class Stored:
    """A placement that was read from a file, with all slots full.

    ``checksum`` is that of the placement in the file, which ``moetuner inspect`` shows, and
    ``made`` the file's Unix time.
    """

    path: Path
    placement: Placement
    checksum: str
    made: float

    @property
    def load(self) -> NDArray[np.float64] | None:
        """Loads [L,E] that the placement was computed from; None if its file does not say them."""
        placement, load = self.placement, None
        with suppress(TypeError, ValueError):
            load = np.array(placement.settings.get("load"), dtype=np.float64)
        if load is None or load.shape != (placement.layers, placement.num_experts):
            return None
        return load if (np.isfinite(load) & (load >= 0)).all() else None

    def warning(self, model: str | None) -> str:
        """Return a warning if this was made for another model than the engine's; "" if not.

        There is no warning where one of the two names is not known.
        """
        name = self.placement.model
        if not (name and model) or _is_same(name, model):
            return ""
        return f"{self.path} was made for {name}, and the engine serves {model}"

    def __str__(self) -> str:
        placement = self.placement
        return (
            f"{self.path} ({self.checksum}: {placement.layers} layers x "
            f"{placement.slots_per_device} slots on {placement.devices} ranks, "
            f"{placement.num_experts} experts)"
        )


@dataclass(frozen=True)
class Files:
    """The content of all files that the settings name, or the error of reading them.

    Live decisions take pairs from the ``profile``. Ranks with the same ``checksum``, which is of
    the rules and of all content, decide alike.
    """

    placements: tuple[Stored, ...] = ()
    profile: RoutingStatistics | None = None
    checksum: str = ""
    error: str = field(default="", compare=False)

    @classmethod
    def read(cls, settings: Settings) -> Files:
        """Read what the settings name. An error becomes the ``error`` of the result."""
        path: Path | None = None
        try:
            placements, profile = [], None
            for path in settings.placements:
                made = path.stat().st_mtime
                placements += [
                    Stored(path, placement.filled(), placement.checksum, made)
                    for placement in Placement.load_all(path)
                ]
            if settings.profile is not None and settings.rebalance and not placements:
                path = settings.profile
                traffic = open_input(path)
                profile = as_counts(traffic, window=None, transitions=False, sets=False)
        except Exception as error:
            text = quote_error(error)
            if isinstance(error, OSError) and error.filename and error.strerror:
                text = f"{error.filename}: {error.strerror}"
            return cls(error=text if str(path) in text else f"{path}: {text}")
        content = [settings.rebalance, settings.rules, settings.reload is not None]
        content += [(stored.checksum, stored.placement.num_experts) for stored in placements]
        content += [None if profile is None else profile.fingerprint]
        return cls(tuple(placements), profile, compute_checksum(repr(content).encode()))

    def lack_draft(self, case: Case, model: str | None) -> bool:
        """Return whether a model is a draft model of which these files have nothing.

        They are of the main model then, and its layers are not put on those of the draft model.
        """
        layers = [stored.placement.layers for stored in self.placements]
        layers += [] if self.profile is None else [self.profile.layers]
        return (model or "").endswith(DRAFT) and bool(layers) and len(case.slots) not in layers

    def fault(self, case: Case, model: str | None, rules: MoveLimits) -> str:
        """Return why these files cannot serve a model; "" where they can."""
        try:
            if self.placements:
                self.slots(case, model)
            elif self.profile is not None:
                case.weigh_pairs(self.profile, rules.traffic)
        except ValueError as error:
            return self.error or quote_error(error)
        return self.error

    def slots(self, case: Case, model: str | None = None) -> tuple[Stored, Slots]:
        """Return the placement of a model, and its slots [L,D,S] in the order of the running ones.

        The model's name decides if several placements have the sizes of the case.
        """
        stored, rows = self._choose(case, model)
        layers, ranks, width = case.slots.shape
        slots = case.slots.copy()
        if not case.runs:
            # Layers without experts, which engines that count hidden layers have.
            slots[:] = (np.arange(ranks * width) % case.experts).reshape(ranks, width)
        slots[rows] = stored.placement.slots
        if case.runs:
            slots = keep_slots(case.slots, slots, np.full((layers, ranks), width))
        return stored, slots

    def _choose(self, case: Case, model: str | None) -> tuple[Stored, np.ndarray]:
        """Return the placement for a model, and the engine's layers for it; raise without one."""
        layers, ranks, width = case.slots.shape
        fitting, reasons = [], []
        for stored in self.placements:
            placement = stored.placement
            try:
                sizes = placement.devices, placement.slots_per_device, placement.num_experts
                if sizes != (ranks, width, case.experts):
                    raise ValueError(
                        f"{stored.path}: {sizes[0]} devices x {sizes[1]} slots for {sizes[2]} "
                        f"experts, but the engine has {ranks} ranks x {width} slots for "
                        f"{case.experts} experts"
                    )
                rows = case.find_rows(placement.layers, f"{stored.path}: the placement")
                fitting.append((stored, rows))
            except ValueError as error:
                reasons.append(str(error))
        if not fitting:
            raise ValueError("; ".join(reasons))
        # Placements of as many layers, and of the same model, come before others.
        same_layers = [pair for pair in fitting if pair[0].placement.layers == layers]
        fitting = same_layers or fitting
        same_model = [pair for pair in fitting if _is_same(pair[0].placement.model, model)]
        fitting = same_model or fitting
        if len(fitting) > 1:
            files = ", ".join(str(stored.path) for stored, _ in fitting)
            raise ValueError(
                f"{files}: more than one placement has {layers} layers x {width} slots on {ranks} "
                f"ranks, and none alone is named {model or 'like the model'}"
            )
        return fitting[0]


def _is_same(name: str | None, model: str | None) -> bool:
    """Return whether two names, or paths, are of the same model."""
    return bool(name and model) and _short(str(name)) == _short(str(model))


def _short(name: str) -> str:
    """Return the name of a model without its folder, owner and revision, in lower case."""
    # The cache of Hugging Face: models--OWNER--NAME/snapshots/REVISION.
    cached = re.search(r"models--(?:[^/]*--)?([^/]+)/snapshots/", name)
    return (cached[1] if cached else Path(name.removesuffix(DRAFT)).name).casefold()
