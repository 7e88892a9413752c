"""README's table of what was measured: every figure comes from a record.

    python bench/measured.py

Writes the figures of the records in bench/results into the table, as they came out; words stay. A
row has the figures of a function below, in their order, with as many decimals as README shows; what
is no result, such as a bandwidth that was set, stands there as text. Where words would be wrong,
such as the name of the best of the others, it says so instead.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from harness import HERE, RECORDS, parts_of

README = HERE.parent / "README.md"
# A number of its own, which is no part of a name such as gpt-oss-20b or H100.
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-])")
SIGNED = re.compile(r"[+-]?\d+(?:\.\d+)?")
# A figure of a record, or the text of a setting.
Figure = float | str


class Table(NamedTuple):
    """A table of a record: its title, the names of its columns, and its rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def numbers(self, column: str, *names: str, at: int = 0) -> list[float]:
        """Return the numbers in the cell of a row that begins with names, under a column.

        Of columns of one name ``at`` says which one.
        """
        place = [number for number, name in enumerate(self.columns) if name == column][at]
        (row,) = (row for row in self.rows if row[: len(names)] == [*names])
        return [float(number) for number in SIGNED.findall(row[place])]


@cache
def parts(record: str) -> tuple[str, ...]:
    """Return the tables and sentences of a record."""
    return tuple(parts_of(json.loads((RECORDS / f"{record}.json").read_text())["results"]))


def table(record: str, title: str) -> Table:
    """Return the one table of a record whose title begins like this."""
    (text,) = (part for part in parts(record) if part.startswith(f"**{title}"))
    named, _, body = text.partition("\n\n")
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()
    )
    return Table(named.strip("*"), columns, rows)


def said(record: str, pattern: str) -> list[list[float]]:
    """Return the numbers of every sentence of a record that a pattern matches."""
    matches = (re.search(pattern, part) for part in parts(record) if not part.startswith("**"))
    return [[float(number) for number in match.groups()] for match in matches if match]


def beside_best(title: str, best: str) -> list[Figure]:
    """Return the imbalance of ours on unseen halves, and of the best of the others."""
    halves = table("versus", f"{title}: ")
    others = {
        name: halves.numbers("imbalance", name)[0]
        for name, *_ in halves.rows
        if not name.startswith(("ours", "oracle", "bound"))
    }
    lowest = min(others, key=others.__getitem__)
    if others[best] > others[lowest]:
        raise ValueError(f"{title}: the best of the others is {lowest}, README names {best}")
    return [halves.numbers("imbalance", "ours, balance")[0], others[best]]


def placements() -> list[Figure]:
    """Return the figures on others' placements."""
    figures: list[Figure] = []
    for title, best in (
        ("deepseek-v3-phases", "deepseek_vec"),
        ("qwen3-30b-a3b-languages", "FlashLB"),
        ("mixtral-8x7b-mmlu", "FlashLB"),
        ("domains", "FlashLB"),
    ):
        figures += beside_best(title, best)
    figures += table("versus", "domains: ").numbers("imbalance", "EPLB")[:1]
    crossing = table("versus", "gpt-oss-20b: 24 x 32 on 8 devices")
    rows = ("ours, follow", "Mt-KaHyPar, follow", "the paper's two stages")
    return [*figures, *(crossing.numbers("crossing", row)[0] for row in rows)]


def live_policy() -> list[Figure]:
    """Return the figures on engines' own policies, which decide again and again."""
    rebalances = table("versus", "Sequences of rebalances")
    moved, gains = list[float](), {"vLLM": list[list[float]](), "best": list[list[float]]()}
    peers: dict[str, list[str]] = {}
    for name, peer, *_ in rebalances.rows:
        if peer != "by itself":
            peers.setdefault(name, []).append(peer)
    for name, there in peers.items():
        theirs, ours = (rebalances.numbers("moves", name, "vLLM", at=at)[0] for at in (0, 1))
        moved.append(100 * ours / theirs)
        best = max(there, key=lambda peer: rebalances.numbers("balanced", name, peer))
        for peer, rows in zip(("vLLM", best), gains.values(), strict=True):
            # A gain, and its standard error.
            rows.append(rebalances.numbers("ahead", name, peer))
    seeds = re.search(r"halves unseen: (\d+)", table("versus", "bundled trace: ").title)
    assert seeds
    figures: list[Figure] = [len(peers), seeds[1], min(moved), max(moved)]
    for beside, rows in gains.items():
        if beside == "best":
            figures.append(len(set().union(*peers.values())))
        figures += [sum(gain >= 0 for gain, _ in rows), len(rows)]
        figures += [max(0.0, -min(gain for gain, _ in rows))]
        figures += [sum(gain < -2 * error for gain, error in rows)]
    return figures


def exchanges() -> list[Figure]:
    """Return the figures on the emulated cluster."""
    column, link = "joint, predicted", "500"
    dispatch, follow = (
        table("cluster", f"gpt-oss-20b 24 x 32, {regime}: % of a step saved, by link")
        for regime in ("dispatch", "follow")
    )
    ((right, ratios),) = said("cluster", r"where links are shaped, (\d+) of (\d+)\.")
    saved = (regime.numbers(column, link)[0] for regime in (dispatch, follow))
    return [link, *saved, "17.5", right, ratios, "10"]


def simulators() -> list[Figure]:
    """Return the figures on SimGrid and Frontier."""
    off = r"off is ([\d.]+) % off by ports, ([\d.]+) % by evaluate, and ([\d.]+) % by ports if told"
    ((ports, evaluated, _),) = said("judge_traffic", f"^RDMA: .*{off}")
    ((_, untold, told),) = said("judge_traffic", f"^default: .*{off}")
    saved = said(
        "judge_serving", r"^Joint saves ([\d.-]+) % of contiguous's mean time to the first"
    )
    return [evaluated, "16", "32", ports, untold, told, *min(saved), *max(saved)]


def gpus() -> list[Figure]:
    """Return the figures on times of real GPUs."""
    errors = table("gpu-times", "Mean error on batches left out")
    names = ("rtx-pro-6000-qwen3-30b-a3b.csv", "a800-qwen3-30b-a3b.csv")
    return [*(errors.numbers("exposed", name)[0] for name in names), "6000"]


def profiles() -> list[Figure]:
    """Return the figures on mixes of profiles."""
    several = table("deepseek", "32 ranks of 9 slots: fitted to several recordings")
    return [several.numbers("mix", name)[0] for name in ("joint", "EPLB")]


def headline() -> list[Figure]:
    """Return the figures of README's first lines."""
    ((*gains,),) = said(
        "phases",
        r"gains ([\d.]+) % of MoE layer time in decode and ([\d.]+) % in prefill on 8 H100, "
        r"([\d.]+) % and ([\d.]+) % on 32",
    )
    return [*gains[:2], "8", *gains[2:], "32"]


def phases() -> list[Figure]:
    """Return how often EPLB is ahead with the default answer, and by how much."""
    ((cases, *of_decode, many, most, regret),) = said(
        "phases",
        r"Of (\d+) machines.* in decode (\d+) times, by ([\d.]+) % at most, in prefill "
        r"(\d+) times, by ([\d.]+) % at most; the largest regret of a phase is ([\d.]+) %",
    )
    return [cases, *of_decode, many, most, regret]


# The line of README that has figures before any table, by how it begins.
HEADLINE = "gpt-oss-20b gains "
# What that line, or a row of the table, begins with, and what gives its figures.
ROWS: dict[str, Callable[[], list[Figure]]] = {
    HEADLINE: headline,
    "is moetuner ahead of its peers": placements,
    "is its live policy ahead": live_policy,
    "does either phase pay": phases,
    "do real exchanges over links": exchanges,
    "do independent simulators agree": simulators,
    "do predicted times agree": gpus,
    "what of [traffic that the profile": profiles,
}


def rows_of(readme: str) -> dict[str, str]:
    """Return the answers of the table by what their question begins with, and the headline."""
    section = readme.partition("## What was measured")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    (first,) = re.findall(rf"^{HEADLINE}[^:]*:", readme, re.MULTILINE)
    answers = {HEADLINE: first}
    for line in rows:
        question, answer = (cell.strip() for cell in line.strip("|").split(" | "))
        (name,) = (name for name in ROWS if question.startswith(name))
        answers[name] = answer
    return answers


def with_figures(name: str, answer: str) -> str:
    """Return the answer of a row with the figures of the records in the place of its numbers."""
    shown, figures = NUMBER.findall(answer), ROWS[name]()
    if len(shown) != len(figures):
        raise ValueError(f"{name}: README has {len(shown)} numbers, the records {len(figures)}")
    left = iter(figures)

    def figure(match: re.Match[str]) -> str:
        value = next(left)
        decimals = len(match[0].partition(".")[2])
        return value if isinstance(value, str) else f"{value:.{decimals}f}"

    return NUMBER.sub(figure, answer)


def filled(readme: str) -> str:
    """Return README with the figures of the records in its table."""
    for name, answer in rows_of(readme).items():
        readme = readme.replace(answer, with_figures(name, answer))
    return readme


def main() -> int:
    """Write the figures; the status is 1 where they do not fit the words."""
    try:
        README.write_text(filled(README.read_text()))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
