"""Rename single experts in settings beside a checkpoint that say how weights are stored.

compressed-tensors has names of modules or regular expressions, ModelOpt has globs, and GPTQModel
and AutoRound have either as keys.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any

from moetuner._checks import shown
from moetuner.torch.reorder.plan import Changes, TensorPlan

# The name of one expert's module: a prefix that says which kind of pattern it is, the block, the
# number, and the name within the expert. Dots may be escaped, as in a regular expression.
MODULE = re.compile(
    r"(?P<start>(?:re:|[+-]:)?\^?(?P<block>[\w\\.-]+?)\\?\.experts\\?\.(?:local_experts\\?\.)?)"
    r"(?P<expert>\d+)(?P<end>(?:\\?[.$].*)?)"
)
KIND = re.compile(r"re:|[+-]:")
# An expert's number in a pattern of any kind.
NUMBER = re.compile(r"experts?[].\\()[*?^]{1,5}\d")


class Mentions:
    """Renames experts in settings as their tensors are renamed."""

    def __init__(self, plan: TensorPlan, changes: Changes) -> None:
        self.plan = plan
        pairs = {(name, change.name) for name, change in changes.items() if name != change.name}
        pairs |= {(old.rpartition(".")[0], new.rpartition(".")[0]) for old, new in pairs}
        # Settings may name experts whose weights are stacked.
        for block, row in plan.rows.items():
            for new, old in enumerate(plan.order[row].tolist()):
                for end in ("", ".w"):
                    pairs.add((f"{block}.experts.{old}{end}", f"{block}.experts.{new}{end}"))
        # Names of experts before and after: of tensors and of the modules that hold them.
        self.pairs = sorted((old, new) for old, new in pairs if old != new)

    def rename(self, value: Any) -> Any:
        """Return settings with the new names of experts, in texts and in keys."""
        if isinstance(value, dict):
            return {self._rename_text(name): self.rename(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.rename(item) for item in value]
        return self._rename_text(value) if isinstance(value, str) else value

    def _rename_text(self, text: str) -> str:
        """Return a text with the new number of its expert; raise if a pattern cannot have one."""
        if (module := MODULE.fullmatch(text)) is not None:
            number = self._renumber(module["block"].replace("\\", ""), module["expert"], text)
            return f"{module['start']}{number}{module['end']}"
        has_number = NUMBER.search(text) is not None
        if has_number or "expert" in text or "*" in text:
            tested = [self._test_pattern(matches) for matches in _list_readings(text)]
            is_free = all(is_same for is_same, _ in tested)
            matches_any = any(any_matched for _, any_matched in tested)
            # A pattern with numbers of experts that matches none is of an unknown kind.
            if not is_free or (has_number and not matches_any):
                rule = "must not tell experts apart where their numbers change"
                raise ValueError(f"{shown(text)}: a pattern of modules {rule}")
        return text

    def _renumber(self, block: str, expert: str, text: str) -> str:
        """Return the new number of an expert of a block, whose name may be only its end."""
        blocks = {
            other for other in self.plan.blocks if other == block or other.endswith(f".{block}")
        }
        blocks = {block} if block in blocks else blocks
        if len(blocks) != 1:
            raise ValueError(f"{shown(text)}: must be an expert of one of the MoE blocks")
        row = self.plan.rows.get(blocks.pop())
        if row is None:
            return expert
        order = self.plan.order[row].tolist()
        if int(expert) not in order:
            raise ValueError(f"{shown(text)}: must be an expert from 0 to {len(order) - 1}")
        width = len(expert) if expert.startswith("0") else 0
        return str(order.index(int(expert))).zfill(width)

    def _test_pattern(self, matches: Callable[[str], bool]) -> tuple[bool, bool]:
        """Return whether a pattern matches the same experts as before, and whether any."""
        any_matched = False
        for old, new in self.pairs:
            matched = matches(old)
            any_matched |= matched
            if matched != matches(new):
                return False, any_matched
        return True, any_matched


def _list_readings(text: str) -> list[Callable[[str], bool]]:
    """Return functions that match a name: by text within it, by a glob, by a regular expression."""
    body = KIND.sub("", text, count=1) if KIND.match(text) else text
    readings: list[Callable[[str], bool]] = [lambda name: body in name]
    patterns = [fnmatch.translate(body), body]
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error:
            continue
        readings += [
            lambda name, pattern=compiled: pattern.search(name) is not None,  # type: ignore[misc]
            lambda name, pattern=compiled: pattern.fullmatch(name) is not None,  # type: ignore[misc]
        ]
    return readings
