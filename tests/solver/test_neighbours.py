"""A better answer for a neighbouring problem is an answer of this one: the search has converged.

``bench/neighbours.py`` draws the problems; docs/experiments.md has the distribution of 200.
"""

import neighbours
import numpy as np
import pytest

import moetuner as mt


@pytest.fixture(scope="module")
def pairs():
    """Small problems of the first draws, which take a second at most, beside their neighbours."""
    drawn = [seed for seed in range(30) if is_small(neighbours.draw(seed)[0])]
    assert len(drawn) > 10
    return [pair for seed in drawn for pair in neighbours.compare(seed)]


def is_small(problem):
    """Return whether the search has little to do."""
    return problem.layers * problem.capacity[0].sum() <= 80


def test_hardly_a_neighbour_has_a_better_answer(pairs):
    """By another seed, under other names, in a slot less, for the other goal."""
    worse = np.array([pair.worse for pair in pairs])
    better = [pair for pair in pairs if pair.worse > neighbours.WANTED]
    assert len(better) <= len(pairs) / 20, better
    assert worse.max() < 4 * neighbours.WANTED, better
    assert np.median(worse) < 0.01


def test_neighbours_answers_are_answers():
    """They break no rule, and other names are those of the problem."""
    problem, random = neighbours.draw(3)
    found = neighbours.neighbours(problem, random)
    assert len(found) == 4
    for placement in found.values():
        assert not problem.violations(placement)
    objective = mt.solve(problem, "heuristic").objective
    values = [problem.value(found[name]) for name in ("another seed", "other names")]
    assert values == pytest.approx([objective] * 2, rel=0.01)
    slots, experts = found["other names"].slots, problem.num_experts
    reversed_names = np.where(slots >= 0, experts - 1 - slots, slots)
    shuffled = mt.Placement(np.roll(reversed_names, 1, axis=0), num_experts=experts)
    assert problem.value(shuffled) > 1.02 * objective
