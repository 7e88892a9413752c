"""Write findings as sentences, for a terminal, a page and Python.

``CLAUSES`` has, by kind of finding, a text which is filled with the finding's numbers and the
voice, or a function of both. Clauses begin with a small letter and end without a full stop, so that
they stand behind an answer or alone.
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
    """Write a finding as a sentence, behind the name of the method that it is about, if any."""
    clause = write(finding, voice)
    return f"{finding.about}: {clause.rstrip('.')}." if finding.about else sentence(clause)


def say_all(
    findings: Iterable[Finding], voice: Voice = PYTHON, *, roles: Iterable[Role] = ()
) -> list[str]:
    """Write findings of some roles, or all, as sentences, without those that another one covers."""
    findings, roles = list(findings), set(roles)
    covered = ""
    # On a page the headline has no times; there their sentence stands among the reasons.
    if any(finding.kind == "gain of one size of windows" for finding in findings):
        covered = "" if voice.is_page else "gain"
    return [
        say(finding, voice)
        for finding in findings
        if finding.kind != covered and (not roles or finding.role in roles)
    ]


def say_answer(answer: str, headline: Finding, voice: Voice = PYTHON) -> str:
    """Write an answer and its headline in a sentence that stands alone."""
    if headline.kind == "gains of phases" and answer == ANSWER_WORDS["worth it"]:
        return say(headline, voice)  # it begins with the answer
    return sentence(f"{answer}: {write(headline, voice)}")
