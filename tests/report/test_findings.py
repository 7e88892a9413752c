"""Findings: every kind has a sentence, answers are decided on findings, and voices differ."""

import ast
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.report import words
from moetuner.report.findings import PYTHON, TERMINAL, Finding

PACKAGE = Path(mt.__file__).parent


@cache
def list_nodes():
    """Return the syntax of all code that may find something."""
    return [
        node
        for folder in ("report", "cli", "evaluation")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
    ]


def test_every_kind_has_one_sentence_and_is_found_somewhere():
    """The table has no row that nothing says, and no code finds what has no row."""
    texts = {
        node.value
        for node in list_nodes()
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    kinds = {
        node.args[0].value
        for node in list_nodes()
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "Finding"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert kinds <= words.CLAUSES.keys() <= texts
    rows = [
        name for table in (words.advice, words.results, words.traffic) for name in table.CLAUSES
    ]
    assert len(rows) == len(set(rows)) == len(words.CLAUSES)


def test_no_sentence_is_taken_apart():
    """First letters are raised in one place, and no part of a sentence is replaced."""
    raised = [
        ast.unparse(node)
        for node in list_nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("upper", "lower", "capitalize")
        and isinstance(node.func.value, ast.Subscript)
    ]
    assert raised == []


def test_options_and_arguments_are_named_when_a_sentence_is_written():
    """The same finding names what a terminal takes, and what Python does."""
    numbers = {"model": None, "weight_bits": 8.0}
    finding = Finding("assumed experts", numbers)
    at_terminal, in_python = (words.say(finding, voice) for voice in (TERMINAL, PYTHON))
    assert at_terminal.endswith("as INPUT names no model: pass --model.")
    assert in_python.endswith("name one by dataclasses.replace(traffic, model=...).")
    assert at_terminal.partition(", as ")[0] == in_python.partition(", as ")[0]


@pytest.fixture(scope="module")
def advice():
    """Advice on a table in which some experts are hot, in windows of one size."""
    share = np.random.default_rng(0).lognormal(0, 1, 16)
    load = np.random.default_rng(1).multinomial(20_000, share / share.sum(), (40, 2))
    table = mt.RoutingStatistics(load.astype(np.uint64))
    return mt.advise(table, mt.Topology(4), copies=[0], splits=1, iterations=50)


def test_a_headline_makes_the_gain_needless_but_on_a_page(advice):
    """A terminal says the gain once; a page says it short above the tiles, and in full below."""
    (gain,) = (each for each in advice.findings if each.kind == "gain")
    full, page = words.say(gain), PYTHON._replace(is_page=True)
    assert advice.answer == advice.findings[0].forces == "worth a trial"
    assert words.write(gain) in advice.sentence
    assert full not in advice.say("reason")
    assert full in advice.say("reason", voice=page)
    assert words.write(gain) not in advice.say_answer(page)


def test_the_json_has_what_the_sentences_say(advice):
    """Sentences of Python are those of the findings that the JSON has, in their order."""
    contents = advice.to_dict()
    assert [each["kind"] for each in contents["findings"]] == [f.kind for f in advice.findings]
    deciding = [each for each in contents["findings"] if each["forces"]]
    assert deciding[0]["role"] == "headline"
    assert deciding[0]["forces"] == contents["answer"]
    assert contents["findings"][0]["numbers"]["gain"]["gain"] == advice.main.gain.gain
    warnings = [words.say(each) for each in advice.findings if each.role == "warning"]
    assert contents["warnings"] == warnings
