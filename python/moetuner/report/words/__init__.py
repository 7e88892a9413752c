"""Words: the sentence of every finding, for a terminal, a page and Python.

A row of ``CLAUSES`` has a text, which is filled with the finding's numbers and the voice, or a
function of both. Clauses begin with a small letter and end without a full stop, so that they stand
behind an answer or alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from moetuner.files.cells import sentence
from moetuner.report.findings import PYTHON, Finding, Role, Voice
from moetuner.report.words import advice, results, traffic
from moetuner.report.words.advice import ANSWER_WORDS

CLAUSES = advice.CLAUSES | results.CLAUSES | traffic.CLAUSES


def write(finding: Finding, voice: Voice = PYTHON) -> str:
    """Write a finding as a clause."""
    clause = CLAUSES[finding.kind]
    if isinstance(clause, str):
        return clause.format(voice=voice, **finding.numbers)
    return clause(voice, **finding.numbers)


def say(finding: Finding, voice: Voice = PYTHON) -> str:
    """Write a finding as a sentence, behind the name of what it is about."""
    clause = write(finding, voice)
    return f"{finding.about}: {clause.rstrip('.')}." if finding.about else sentence(clause)


def say_all(
    findings: Iterable[Finding], voice: Voice = PYTHON, *, roles: Iterable[Role] = ()
) -> list[str]:
    """Write findings as sentences, of some roles or all, without those that another one says."""
    findings, roles = list(findings), set(roles)
    said = {kind for each in findings for kind in list_repeated(each.kind, voice)}
    return [
        say(each, voice)
        for each in findings
        if each.kind not in said and (not roles or each.role in roles)
    ]


def list_repeated(kind: str, voice: Voice) -> tuple[str, ...]:
    """Return the kinds of findings that one of this kind says as well."""
    # A page has tiles for the times of its headline, and the sentence among the reasons.
    return ("gain",) if kind == "gain of one size of windows" and not voice.is_page else ()


def say_answer(answer: str, headline: Finding, voice: Voice = PYTHON) -> str:
    """Write an answer and its headline, which stand alone."""
    if headline.kind == "gains of phases" and answer == ANSWER_WORDS["worth it"]:
        return say(headline, voice)  # it begins with the answer
    return sentence(f"{answer}: {write(headline, voice)}")
