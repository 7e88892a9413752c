"""Halves that were computed before: a placement is compared with several others.

An answer with more groups or figures than a request has is an answer to that request, too. So
answers are searched in a list.
"""

from __future__ import annotations

from typing import NamedTuple

from moetuner.evaluation.halves.halved import ByGroup
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.samples import Samples
from moetuner.recording import Recording, compute_once

# Answers that are kept for each recording, besides those of the last call.
CACHED_SETTINGS = 16


class HalvesRequest(NamedTuple):
    """What is asked: figures by name under a setting, of groups or not, by independent samples."""

    setting: Setting
    samples: Samples
    by_group: bool
    names: frozenset[str]

    def covers(self, other: HalvesRequest) -> bool:
        """Return whether the answer to this request holds the answer to another."""
        return (
            self.samples is other.samples
            and (self.by_group or not other.by_group)
            and other.names <= self.names
            and self.setting == other.setting
        )


Answers = list[tuple[HalvesRequest, ByGroup]]


def list_answers(traffic: Recording) -> Answers:
    """Return the answers that are known of a recording; what is added to them is kept with it."""
    answers: Answers = compute_once(traffic, "halves", list)
    del answers[: max(len(answers) - CACHED_SETTINGS, 0)]
    return answers


def find_answer(answers: Answers, request: HalvesRequest) -> ByGroup | None:
    """Return the first answer to a request; None where there is none."""
    for answered, figures in answers:
        if answered.covers(request):
            return figures if request.by_group else {None: figures[None]}
    return None
