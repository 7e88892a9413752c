"""The command line: what it prints, what it writes, and one line for everything that goes wrong."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.cli import MENU, moetuner, options
from moetuner.serving.settings import list_settings

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

METHODS = "contiguous,lpt,joint"
# Where the number of splits does not matter.
ONCE = ("--splits", 1)


@pytest.fixture
def recorded(trace):
    """Give what the file holds."""
    return mt.RoutingTrace.load(trace)


@pytest.fixture
def solved(ok, trace, tmp_path):
    """Solve for a file, and give the JSON, and the placement in p.json."""

    def solved(*arguments, of=trace):
        out, report = tmp_path / "p.json", tmp_path / "r.json"
        ok("solve", of, *arguments, "--out", out, "--json", report)
        return json.loads(report.read_text()), mt.Placement.load(out)

    return solved


@pytest.fixture
def table(tmp_path):
    """File of a load table of six windows in two groups."""
    path = tmp_path / "load.npz"
    load = np.random.default_rng(0).integers(0, 100, (6, 3, 8))
    np.savez(path, load=load, group=np.arange(6) % 2, group_names=np.array(["a", "b"]))
    return path


SHOWN = [name for name, command in moetuner.commands.items() if not command.hidden]


def test_the_menu_lists_every_command(ok):
    """No arguments, --help and -h show it: in the order of the flow, each in a whole line."""
    menu = ok()
    assert menu == ok("--help") == ok("-h")
    listed = re.findall(r"^  (\w+) +(.+)$", menu.split("Commands:")[1], re.MULTILINE)
    assert [name for name, _ in listed] == SHOWN
    assert (listed[0][0], len(listed)) == ("demo", 13)
    assert all(what.endswith(".") and "..." not in what for _, what in listed)
    assert ok("--version") == f"moetuner {mt.__version__}\n"


def test_every_command_ends_its_help_with_an_example_that_runs(
    ok, make_trace, tmp_path, monkeypatch
):
    """They run one after the other; those that need a model or a GPU have options that exist.

    The demo runs in the next test.
    """
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("trace", "newer")):
        make_trace(800, seed=seed).save(f"{name}.safetensors")
    certify = ("--max-imbalance", 2, "--objective", "traffic", "--certificate", "proof.json")
    ok("solve", "trace.safetensors", "--devices", 8, *certify, "--out", "other.json")
    main = re.findall(r"^    moetuner (.*)$", ok("--help"), re.MULTILINE)
    assert len(main) == 4
    for name in SHOWN:
        words = ok(name, "--help").split("Example:")[1].split()
        assert words[:2] == ["moetuner", name]
        if name in ("collect", "demo", "fit"):
            main.append(" ".join(words[1:]))
        else:
            ok(*words[1:])
    for name, *words in map(str.split, main):
        there = {flag for parameter in moetuner.commands[name].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= there


LOADED = """
import sys
from moetuner.cli import main
status = main(sys.argv[1:])
commands = [name for name in sys.modules if name.startswith("moetuner.cli.")]
print(status, "numpy" in sys.modules, *sorted(commands), file=sys.stderr)
"""
LIGHT = "False moetuner.cli.interrupts moetuner.cli.streams"


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ("--help", f"0 {LIGHT}"),
        ("--version", "0 False moetuner.cli.interrupts moetuner.cli.release moetuner.cli.streams"),
        ("advize", f"2 {LIGHT}"),
    ],
)
def test_the_menu_loads_no_command(words, loaded):
    """Help, the version and an unknown command need neither a command's module nor numpy."""
    command = [sys.executable, "-c", LOADED, words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == loaded


@pytest.mark.parametrize("name", MENU)
def test_the_menu_says_how_a_command_begins(name):
    """A line of the menu is the first of the command's help, which is loaded later."""
    command = moetuner.commands[name]
    assert command.name == name
    assert command.help.partition("\n\n")[0].replace("\n", " ") == MENU[name]
    assert not command.hidden


def test_demo_shows_the_whole_flow(ok, tmp_path):
    """The demo fits a screen and writes what it says; then comes what advise says of the trace."""
    out = ok("demo", "--out", tmp_path / "demo")
    trace = tmp_path / "demo" / "trace.safetensors"
    demo, advice = out.split(f"  moetuner advise {trace} --devices 4\n")
    assert advice == ok("advise", trace, "--devices", 4)
    assert len(demo.splitlines()) <= 24
    assert max(map(len, demo.replace(str(tmp_path / "demo"), "demo-output").splitlines())) <= 100
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"eplb.npz", "placement.json", "trace.safetensors"}
    placement = mt.Placement.load(tmp_path / "demo" / "placement.json")
    assert (placement.devices, placement.slots_per_device) == (4, 4)


def test_solve_writes_the_placement(solved, recorded):
    """The file holds what the library would give, and the JSON tells the same figures."""
    actual, placement = solved("--devices", 4, "--max-imbalance", 2)
    stats = mt.RoutingStatistics.from_trace(recorded, window=512, sets=True)
    result = mt.solve(mt.Problem(stats, mt.Topology(4), max_imbalance=2))
    assert placement == result.placement
    assert actual["objective"] == result.objective == placement.objective
    assert (actual["settings"]["max_imbalance"], actual["status"]) == (2, result.status)
    assert actual["crossing"] == mt.evaluate(placement, recorded).crossing


def test_answers_do_not_depend_on_threads(as_json, solved, trace):
    """The same seed gives the same placements and figures, on one thread and on two."""
    one, two = (solved("--devices", 2, "--seed", 7, "--threads", threads) for threads in (1, 2))
    assert (one[0]["objective"], one[1]) == (two[0]["objective"], two[1])

    def figures(threads):
        rows = as_json(*compare(METHODS, trace, *ONCE), "--threads", threads)["methods"]
        return {name: {**row, "solve_seconds": None} for name, row in rows.items()}

    assert figures(1) == figures(2)


@pytest.mark.parametrize("name", ["boxes", "h100-nvl8-ib400"])
def test_topology_is_a_file_or_a_common_machine(solved, tmp_path, name):
    """A file gives devices, nodes and the name; a name alone is one node of a common machine."""
    machine = tmp_path / "boxes"
    machine.write_text('{"devices": 4, "devices_per_node": 2, "name": "boxes"}')
    given = machine if name == "boxes" else name
    assert solved("--topology", given, "--method", "lpt")[1].topology == name


def test_solve_without_pairs_makes_up_no_crossing(solved, table):
    """A load table can only be balanced."""
    actual, _ = solved("--devices", 4, of=table)
    assert (actual["unit"], actual["crossing"]) == ("us per layer", None)
    assert 0 < actual["bound"] <= actual["objective"]
    actual, _ = solved("--devices", 4, "--max-imbalance", 1.2, of=table)
    assert (actual["objective"], actual["gap"], actual["crossing"]) == (None, None, None)


def test_solve_takes_every_term(solved, recorded):
    """Options become the problem's terms, and the objective is told with its unit."""
    terms = (
        "--devices 4 --objective balance --slots-per-device 3,3,2,2 --split nearest --arrival 0.5 "
        "--risk 0.5 --groups even=2,odd=0.5 --window 64 --pin *:3:0 --forbid 1:2:3 --forbid 0:2:3"
    )
    actual, placement = solved(*terms.split())
    statistics = mt.RoutingStatistics.from_trace(recorded, window=64, by_group=True)
    how = {"slots_per_device": [3, 3, 2, 2], "objective": "balance", "split": "nearest"}
    how |= {"arrival": 0.5, "risk": 0.5, "groups": {"even": 2, "odd": 0.5}}
    how |= {"pinned": [(None, 3, 0)], "forbidden": [(1, 2, 3), (0, 2, 3)]}
    problem = mt.Problem(statistics, mt.Topology(4), **how)
    assert placement == mt.solve(problem).placement
    value = problem.objective_function.value(placement)
    assert (actual["unit"], actual["objective"]) == ("max / mean load", value)
    assert actual["settings"]["pinned"] == [[None, 3, 0]]


def test_every_field_of_a_problem_is_an_option(solved):
    """Declared once: there is an option in a group, its help, and its value in the JSON."""
    names = {of.name for of in fields(mt.Problem)} - {"statistics", "topology"}
    declared = list_settings(mt.Problem, mt.Serving)
    settings = {name: declared[name] for name in names}
    assert set(settings) <= set(solved("--devices", 2, "--method", "lpt")[0]["settings"])
    for command in ("solve", "compare"):
        mine = {option.name: option for option in moetuner.commands[command].params}
        for name, setting in settings.items():
            assert mine[name].group == setting["group"] in options.GROUPS
            assert mine[name].help == setting["help"]


@pytest.mark.parametrize("name", moetuner.commands)
def test_help_has_every_option_once(ok, name):
    """In a sentence, in one group or below "Other", in the order that a newcomer needs."""
    text = ok(name, "--help")
    for option in (of for of in moetuner.commands[name].params if of.opts[0].startswith("--")):
        assert option.help.split("  [")[0].endswith("."), option.name
        assert len(re.findall(rf"^  (-\w, )?{option.opts[0]}\b(?![-.])", text, re.MULTILINE)) == 1
    if name in ("solve", "compare", "advise"):
        assert text.index("Begin with:") < text.index("The machine:")


@pytest.mark.parametrize("name", moetuner.commands)
def test_help_has_the_same_groups_in_all_commands(ok, name):
    """Sections have the names of the groups, in their order; a single one is called Options."""
    titles = re.findall(r"^([A-Z][a-z ]+):$", ok(name, "--help"), re.MULTILINE)
    own = [option for option in moetuner.commands[name].params if option.opts[0].startswith("--")]
    groups = {option.group for option in own}
    if groups == {options.OTHER}:
        assert titles == ["Options"]
    else:
        ordered = [group for group in options.GROUPS if group in titles]
        assert titles == ordered
        assert groups - {*titles} == set()


OBJECTIVES = """
| time
--cost-model h100:64x32 | time
--max-imbalance 2 | traffic 2
--objective traffic | traffic 1.05
--objective traffic --regime follow | traffic 1.05
--extra-slots 3 | time
"""


@pytest.mark.parametrize("row", OBJECTIVES.strip().splitlines())
def test_objective_is_time_unless_a_cap_is_given(solved, row):
    """The default, and the cap of traffic."""
    line, wanted = map(str.strip, row.split("|"))
    objective, *cap = wanted.split()
    actual, _ = solved("--devices", 2, *line.split())
    settings = actual["settings"]
    assert settings["objective"] == objective
    assert settings["max_imbalance"] == (float(cap[0]) if cap else None)
    assert actual["predicted_layer_us"] > 0


def test_solve_moves_little_and_says_what(ok, solved, tmp_path):
    """From a running placement within a budget; the JSON has moves by pair, and trades."""
    running, out, moves = (tmp_path / name for name in ("running.json", "p.json", "moves.json"))
    machine = ("--devices", 4, "--devices-per-node", 2)
    before = solved(*machine, "--method", "contiguous")[1]
    before.save(running)
    moving = ("--initial", running, "--move-budget", 3e6, "--expert-bytes", 1e6, "--pareto")
    actual, after = solved(*machine, "--objective", "balance", *moving)
    diff = before.diff(after, topology=mt.Topology(4, 2))
    assert 0 < diff.experts_moved <= 3
    assert actual["moves"]["moves"] == diff.moves.tolist()
    assert actual["moves"]["bytes_moved"] == 1e6 * diff.experts_moved
    assert actual["pareto"][0]["experts_moved"] == 0
    assert actual["pareto"][-1]["gain"] > 0
    ok("export", out, "--to", "moves", "--initial", running, *machine[2:], "--out", moves)
    assert json.loads(moves.read_text())["moves"] == diff.moves.tolist()


def test_evaluate_tells_groups(as_json, solved, trace, recorded, tmp_path):
    """Figures of all traffic and of each group with tokens; --only leaves one of them."""
    _, placement = solved("--devices", 4, "--method", "lpt", "--only", "odd")
    out = tmp_path / "p.json"
    actual = as_json("evaluate", out, trace, "--window", 64)
    assert actual["imbalance"] == mt.evaluate(placement, recorded, window=64).imbalance
    assert set(actual["by_group"]) == {"even", "odd"}
    whole = actual["by_group"]["odd"]
    alone = as_json("evaluate", out, trace, "--window", 64, "--only", "odd")
    assert (alone["tokens"], alone["crossing"]) == (whole["tokens"], whole["crossing"])
    assert (alone["input"]["group_names"], list(alone["by_group"])) == (["odd"], ["odd"])
    both = as_json("inspect", trace, "--only", "odd", "--only", "even")
    assert both["input"]["tokens"] == 800


def test_evaluate_predicts_times(as_json, solved, trace, recorded, tmp_path):
    """There are times, of any cost model: a file, or a GPU with the sizes of experts."""
    out, file = tmp_path / "p.json", tmp_path / "model.json"
    _, placement = solved("--devices", 4, "--method", "lpt")
    model = mt.CostModel.preset("a100", hidden=64, intermediate=32)
    model.save(file)
    wanted = mt.evaluate(placement, recorded, window=512, cost_model=model)
    for name in (file, "a100:64x32"):
        actual = as_json("evaluate", out, trace, "--cost-model", name)
        for figure in ("predicted_layer_us_p95", "imbalance_mixed"):
            assert actual[figure] == getattr(wanted, figure)


def test_groups_that_do_not_fill_a_window_are_one(as_json, solved, trace, recorded, tmp_path):
    """Such a group is one window of its tokens, as its figures show."""
    sizes = np.bincount(recorded.group)
    window, out = int(sizes.max()) + 1, tmp_path / "p.json"
    _, placement = solved("--devices", 4, "--method", "lpt", "--window", window)
    shown = as_json("evaluate", out, trace, "--window", window)["by_group"]["odd"]
    alone = mt.evaluate(placement, recorded.select(groups=["odd"]), window=int(sizes[1]))
    assert shown["imbalance"] == alone.imbalance


def test_audit_fails_on_demand(as_json, run, ok, solved, trace, tmp_path):
    """Groups that got worse end it with status 3; judged by itself nothing is worse."""
    blocks, all_on_two = tmp_path / "p.json", tmp_path / "two.json"
    solved("--devices", 4, "--method", "contiguous")
    slots = np.full((3, 4, 4), -1)
    slots[:, 0], slots[:, 1] = np.arange(4), np.arange(4, 8)
    mt.Placement(slots, num_experts=8).save(all_on_two)
    arguments = ("evaluate", all_on_two, trace, "--by-group", "--window", 40, "--fail-if-worse", 5)
    assert run(*arguments)[::2] == (3, "")
    actual = as_json(*arguments, "--measure", "crossing")
    assert (actual["failed"], actual["settings"]["judged"]) == (False, ["crossing"])
    # Crossing matters in the other regime alone: it is there where it is asked for.
    judged = actual["judgement"]
    assert {of["measure"] for of in judged["worse"]} == {"imbalance", "predicted_layer_us"}
    assert "crossing" not in as_json(*arguments[:4])["judgement"]["whole"]
    assert set(judged["groups"]) == {"even", "odd"}
    ok("evaluate", blocks, trace, "--baseline", blocks, "--by-group", "--fail-if-worse", 0)


def test_audit_finds_the_one_group_that_got_worse(as_json, tmp_path):
    """Two groups share expert 0, which moves away from the other expert of one of them."""
    group, random = np.arange(800) // 400, np.random.default_rng(0)
    # Half of each group's tokens in random order, so that no sequence repeats another.
    is_shared = np.concatenate([random.permutation(400) < 200 for _ in range(2)])
    ids = np.where(is_shared, 0, np.where(group, 4, 1))[:, None, None]
    labels = {"sequence": np.arange(800) // 20, "group": group, "group_names": ("gains", "loses")}
    trace_of(ids, **labels).save(tmp_path / "t.safetensors")
    mt.Placement([[[0, 4, 2, 3], [1, 5, 6, 7]]]).save(tmp_path / "p.json")
    judged = ("--by-group", "--measure", "imbalance")
    actual = as_json("evaluate", tmp_path / "p.json", tmp_path / "t.safetensors", *judged)
    judged = actual["judgement"]
    assert {"group": "loses", "measure": "imbalance"} in judged["worse"]
    assert {of["group"] for of in judged["worse"]} == {"loses"}
    assert judged["groups"]["loses"]["imbalance"]["gain"] == pytest.approx(-1.0)


def test_audit_judges_nothing_of_few_windows(as_json, solved, table, tmp_path):
    """Three windows of a group are too few, also for --fail-if-worse."""
    blocks = tmp_path / "blocks.json"
    solved("--devices", 4, "--method", "lpt", of=table)[1].save(blocks)
    solved("--devices", 4, "--method", "contiguous", of=table)
    words = ("evaluate", tmp_path / "p.json", table, "--baseline", blocks, "--by-group")
    assert as_json(*words, "--fail-if-worse", 0)["judgement"]["too_few"] == {"a": 3, "b": 3}


def test_a_gate_on_the_gain_takes_the_lower_end_of_its_interval(
    as_json, run, solved, trace, tmp_path
):
    """It fails below that, and where the gain may be chance: a placement against itself."""
    solved("--devices", 4, "--method", "lpt")
    words = ("evaluate", tmp_path / "p.json", trace, "--window", 40, "--measure", "imbalance")
    gain, gate = as_json(*words)["gain"], "--fail-if-gain-below"
    assert 0 < gain["low"] < gain["gain"]
    for least, status in ((100 * gain["low"] - 1e-6, 0), (100 * gain["low"] + 1e-6, 3)):
        actual, out, err = run(*words, gate, least, "--json", "-")
        assert (actual, json.loads(out)["failed"], err) == (status, status == 3, "")
    assert run(*words, gate, 0.1, "--baseline", tmp_path / "p.json")[0] == 3


def compare(methods, *arguments):
    """Give the words of a comparison."""
    return ("compare", *arguments, "--devices", 4, "--methods", methods)


def test_compare_judges_on_unseen_sequences(as_json, trace, recorded):
    """The numbers are those of the library: statistics of one half, replay of the other."""
    words = compare(METHODS, trace, "--window", 64, "--max-imbalance", 1.05, *ONCE)
    rows = as_json(*words)["methods"]
    assert list(rows) == METHODS.split(",")
    seen, unseen = recorded.split(0.5, seed=0)
    stats = mt.RoutingStatistics.from_trace(seen, window=64, sets=True)
    problem = mt.Problem(stats, mt.Topology(4), max_imbalance=1.05)
    for method, row in rows.items():
        result = mt.solve(problem, method)
        evaluation = mt.evaluate(result.placement, unseen, window=64)
        assert row["objective"] == result.objective
        for name in ("crossing", "imbalance", "fanout", "tokens"):
            assert row[name] == getattr(evaluation, name)
        assert {"bound", "gap", "status", "solve_seconds"} <= set(row)


TWO = ("--window", 64, "--objective", "balance", "--baseline", "contiguous")


def test_compare_tells_gains_over_splits(as_json, trace):
    """Each is solved and judged by itself: the first, with its interval, and the range of all."""
    words = compare("contiguous,lpt", trace, *TWO)
    actual = as_json(*words, "--splits", 3)
    singles = [as_json(*words, *ONCE, "--seed", seed)["methods"] for seed in range(3)]
    gain, one = (of["lpt"]["gain"] for of in (actual["methods"], singles[0]))
    wanted = [1 - of["lpt"]["imbalance"] / of["contiguous"]["imbalance"] for of in singles]
    assert gain["splits"] == pytest.approx(wanted)
    assert len(set(wanted)) == 3
    assert (gain["mean"], gain["range"]) == (np.mean(wanted), [min(wanted), max(wanted)])
    assert (gain["measure"], gain["names"][0]) == ("imbalance", "contiguous")
    alike = one.keys() - {"mean", "splits", "range"}
    assert {of: gain[of] for of in alike} == {of: one[of] for of in alike}
    assert (actual["settings"]["splits"], actual["methods"]["contiguous"]["gain"]) == (3, None)
    assert actual["methods"]["lpt"]["imbalance"] == singles[0]["lpt"]["imbalance"]
    assert (one["range"], one["splits"]) == (None, [one["mean"]])
    assert one["low"] < one["gain"] < one["high"]


def test_compare_splits_several_times_by_default(as_json, trace):
    """Traffic is split three times; what is judged on what it saw, once, as it was solved."""
    words = compare("contiguous,lpt", trace)
    assert as_json(*words)["settings"]["splits"] == 3
    whole = as_json(*words, "--holdout", 0, "--objective", "traffic")
    assert whole["settings"]["splits"] == 1
    for row in whole["methods"].values():
        assert row["objective"] == pytest.approx(row["fanout"])


def test_tables_fit_eighty_columns(ok, trace, tmp_path):
    """No line of a table is longer than an ordinary terminal is wide; nodes have a column."""
    nodes = ("--devices-per-node", 2, "--regime", "dispatch", *ONCE)
    texts = [ok(*compare("lpt,eplb", trace, *nodes), *cap) for cap in ((), ("--max-imbalance", 2))]
    assert all(re.search("method .* nodes ", text) for text in texts)
    solving = ("solve", trace, "--devices", 4, "--out", tmp_path / "p.json")
    texts += [ok(*compare(METHODS, trace, *ONCE)), ok(*solving)]
    texts.append(ok("evaluate", tmp_path / "p.json", trace))
    for text in texts:
        rows = re.findall("^(?:method|lpt|joint|traffic|odd)(?: !)?  .*$", text, re.M)
        assert rows
        assert max(len(line.rstrip()) for line in rows) <= 80


def test_convert_joins_sources(ok, make_trace, tmp_path):
    """Sources of two kinds become one trace, in order."""
    first, second, out = (tmp_path / name for name in ("a.npz", "b.npy", "t.safetensors"))
    a, b = make_trace(30, seed=1), make_trace(20, seed=2)
    np.savez(first, expert_ids=a.expert_ids, num_experts=8)
    np.save(second, b.expert_ids)
    ok("convert", first, second, "--num-experts", 8, "--out", out)
    joined = mt.RoutingTrace.load(out)
    assert np.array_equal(joined.expert_ids, np.concatenate([a.expert_ids, b.expert_ids]))


def test_the_papers_method_has_two_names(as_json, solved, trace):
    """``moetuner`` is accepted everywhere, and the row says ``paper``."""
    words = compare("moetuner,paper,lpt", trace, "--baseline", "moetuner", *ONCE)
    actual = as_json(*words)
    assert list(actual["methods"]) == ["paper", "lpt"]
    assert actual["settings"]["baseline"] == "paper"
    assert solved("--devices", 4, "--method", "moetuner")[0]["method"] == "paper"


def test_long_names_make_no_long_lines(ok, solved, make_trace, tmp_path):
    """A name of 120,000 letters with spaces is cut wherever it is shown."""
    trace, long = make_trace(400), "x y " * 30000
    labels = {"sequence": trace.sequence, "group": trace.group, "group_names": ["a", long, "c"]}
    path, p = tmp_path / "t.safetensors", tmp_path / "p.json"
    trace_of(trace.expert_ids, model=long, **labels).save(path)
    solved("--devices", 2, "--method", "lpt", of=path)
    for line in (("inspect", path), ("evaluate", p, path, "--by-group")):
        assert max(map(len, ok(*line).splitlines())) < 5000


@pytest.mark.parametrize("how", ["compare --methods lpt,eplb", "advise --copies 0"])
def test_the_largest_seed_is_one(ok, trace, how):
    """Seeds of further splits go on from 0."""
    ok(*how.split(), trace, "--devices", 2, "--splits", 2, "--seed", 2**63 - 1)


@pytest.mark.parametrize("devices", [2, 4])
def test_evaluate_says_how_many_tokens_stay_on_one_of_two_devices(
    ok, recorded, trace, tmp_path, devices
):
    """What is left of two visits, counted token by token; of more devices nothing is said."""
    blocks = tmp_path / "blocks.json"
    mt.Placement(np.tile(np.arange(8).reshape(devices, -1), (3, 1, 1))).save(blocks)
    device = recorded.expert_ids // (8 // devices)
    share = 100 * (device == device[..., :1]).all(axis=2).mean()
    line = f"{share:.1f} of 100 tokens have all their experts of a layer on one device."
    text = ok("evaluate", blocks, trace)
    assert (line in text.splitlines()) == ("on one device" in text) == (devices == 2)
