"""Write the reference of commands and options from what ``--help`` is made of.

A page has a line ``<!-- generated: command solve -->``, ``<!-- generated: commands -->`` or
``<!-- generated: options -->``. When Sphinx reads the page, the line becomes the reference, so it
is never older than the commands. ``EXPLAINED`` names the page that explains each option.
"""

import re
from pathlib import Path

import click

from moetuner.cli import MENU, moetuner
from moetuner.cli.options import BEGIN, GROUPS, OTHER

DOCS = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- generated: (\w+)(?: (\w+))? -->$", re.MULTILINE)
# Section that explains an option, below docs; "COMMAND OPTION" where it differs by command.
EXPLAINED = {
    "--any-order": "choosing.md#groups",
    "--arrival": "choosing.md#arrival",
    "--baseline": "choosing.md#what-runs",
    "--batch-size": "engines/transformers.md#record",
    "--by-group": "choosing.md#groups",
    "--certificate": "sure.md#how-far-from-the-best",
    "--check": "engines/vllm.md#check",
    "--checkpoint": "engines/transformers.md#load",
    "--copies": "choosing.md#slots-for-copies",
    "--cost-model": "choosing.md#cost-model",
    "--count": "large.md#count-first",
    "--dataset": "engines/transformers.md#record",
    "--dense-layers": "choosing.md#the-model",
    "--device": "engines/transformers.md#record",
    "fit --device": "fit.md",
    "--device-memory": "copies.md#the-price-is-kv-cache",
    "--devices": "choosing.md#the-machine",
    "--devices-per-node": "choosing.md#the-machine",
    "--dtype": "engines/transformers.md#record",
    "--each-layer": "engines/ktransformers.md#choose",
    "--effort": "choosing.md#effort",
    "--every-loss": "survive.md#a-plan-for-a-loss",
    "--expert-bytes": "choosing.md#the-model",
    "export --expert-bytes": "engines/ktransformers.md#choose",
    "--experts": "fit.md",
    "--extra-slots": "choosing.md#slots-for-copies",
    "--fail-if-drift": "choosing.md#gates",
    "--fail-if-gain-below": "choosing.md#gates",
    "--fail-if-worse": "choosing.md#gates",
    "--fewer": "survive.md#a-plan-for-a-loss",
    "--figures": "report.md",
    "inspect --figures": "quickstart.md",
    "--fill-slots": "choosing.md#the-engine",
    "--for": "choosing.md#the-engine",
    "--forbid": "choosing.md#rules",
    "--from": "loads.md#what-is-read",
    "--gpu-bytes": "engines/ktransformers.md#choose",
    "--gpu-experts": "engines/ktransformers.md#choose",
    "--group-by": "choosing.md#groups",
    "--groups": "choosing.md#groups",
    "--hidden": "fit.md",
    "--hidden-layers": "choosing.md#the-model",
    "--holdout": "choosing.md#held-out",
    "--initial": "choosing.md#what-runs",
    "--intermediate": "fit.md",
    "--json": "choosing.md#output",
    "--kv-bytes": "copies.md#the-price-is-kv-cache",
    "--max-imbalance": "choosing.md#objective",
    "--max-tokens": "engines/transformers.md#record",
    "--measure": "choosing.md#gates",
    "--method": "choosing.md#method",
    "--methods": "choosing.md#method",
    "--mixed-seed": "choosing.md#arrival",
    "--model": "choosing.md#the-model",
    "fit --model": "fit.md",
    "--more-copies": "survive.md#a-plan-for-a-loss",
    "--move-budget": "choosing.md#what-runs",
    "--move-cost": "choosing.md#what-runs",
    "--num-experts": "choosing.md#the-model",
    "--objective": "choosing.md#objective",
    "--only": "choosing.md#groups",
    "--out": "choosing.md#output",
    "--pareto": "choosing.md#what-runs",
    "--pin": "choosing.md#rules",
    "--placement": "sure.md#how-far-from-the-best",
    "--prefill-share": "choosing.md#prefill-and-decode",
    "--price": "choosing.md#gates",
    "--profile": "quickstart.md#place-hand-over-check",
    "--quiet": "choosing.md#output",
    "--regime": "choosing.md#regime",
    "--report": "report.md",
    "--retire": "survive.md#a-plan-for-a-loss",
    "--risk": "choosing.md#objective",
    "--router-groups": "choosing.md#rules",
    "--running": "engines/tensorrt_llm.md#record",
    "--sample": "large.md#count-first",
    "--seed": "choosing.md#held-out",
    "--sequence-length": "engines/transformers.md#record",
    "--skip-unreadable": "large.md#count-first",
    "--slots-per-device": "choosing.md#slots-for-copies",
    "--split": "choosing.md#the-engine",
    "--splits": "choosing.md#held-out",
    "--step-ms": "step.md#say-what-a-step-takes",
    "--steps": "survive.md#a-plan-for-a-loss",
    "--survive": "choosing.md#lost-devices",
    "--table": "survive.md#a-plan-for-a-loss",
    "--threads": "choosing.md#effort",
    "--time-limit": "choosing.md#effort",
    "--times": "fit.md#times-that-you-have",
    "--to": "quickstart.md#place-hand-over-check",
    "--tokens-per-step": "loads.md#a-window-is-a-step",
    "--top-k": "choosing.md#the-model",
    "fit --top-k": "fit.md",
    "--topology": "choosing.md#the-machine",
    "--unseen": "choosing.md#held-out",
    "--waterfill": "dispatchers.md#the-shared-experts-tokens-fill-devices-that-wait",
    "--weight-bits": "choosing.md#the-model",
    "--window": "choosing.md#window",
    "--with": "survive.md#a-plan-for-a-loss",
    "--without": "survive.md#a-plan-for-a-loss",
    "evaluate --without": "survive.md#a-placement-that-survives",
}


def list_commands():
    """Return the commands of the menu by name, with their contexts, from which help is made."""
    commands = {name: moetuner.commands[name] for name in MENU}
    parent = click.Context(moetuner, info_name="moetuner", **moetuner.context_settings)
    return {
        name: (command, click.Context(command, info_name=name, parent=parent))
        for name, command in commands.items()
    }


def flag_of(option):
    """Return the long name of an option."""
    return max(option.opts, key=len)


def options_of(command):
    """Return the options of a command by their long names."""
    shown = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    return {flag_of(option): option for option in shown if not option.hidden}


def find_explanation(name, flag):
    """Return the section that explains an option of a command."""
    section = EXPLAINED.get(f"{name} {flag}") or EXPLAINED.get(flag)
    if section is None:
        raise ValueError(
            f"{name} {flag}: no page explains this option; docs/_extensions/commands.py, "
            "EXPLAINED, has the section for each"
        )
    return section


def mark_up(text):
    """Return help as Markdown: options and commands are code, and nothing else is marked."""
    parts = re.split(r'("[^"]+"|(?<![\w-])--?[a-z][\w-]*)', text)
    for number, part in enumerate(parts):
        is_code = number % 2 and part.startswith(("-", '"moetuner', '"-'))
        code = part.strip('"')
        parts[number] = f"`{code}`" if is_code else re.sub(r"([\\`*_\[\]<>])", r"\\\1", part)
    return "".join(parts)


def describe(option, context):
    """Return the help of an option, and what ``--help`` shows in brackets behind it."""
    record = option.get_help_record(context)
    assert record is not None
    brackets = re.findall(r"\s{2}\[([^]]*)\]", record[1])
    text = re.sub(r"\s{2}\[[^]]*\]", "", record[1])
    return " ".join(text.split()), brackets


def write_facts(brackets):
    """Return default and range of an option as a sentence each."""
    words = []
    for fact in (fact.strip() for bracket in brackets for fact in bracket.split(";")):
        spaced = re.sub("([<>]=?)", r" \1 ", fact)
        text = f"Range: {spaced}" if spaced != fact else fact[0].upper() + fact[1:]
        words.append(f"{mark_up(text)}.")
    return " ".join(words)


def title_of(page):
    """Return the heading of a page, or of the section of it that a link names."""
    path, _, anchor = page.partition("#")
    headings = re.findall(r"^(#+) (.+)$", (DOCS / path).read_text(), re.MULTILINE)
    title = headings[0][1]
    for _, heading in headings[1:] if anchor else ():
        if slug(heading) == anchor:
            return f"{title}: {heading}"
    assert not anchor, f"{page}: no such section"
    return title


def slug(heading):
    """Return the anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def write_command(name):
    """Return the reference of a command."""
    command, context = list_commands()[name]
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"```text\nmoetuner {name} {usage}\n```\n"]
    lines += [*write_help(command.help or ""), *write_help(command.epilog or "")]
    sections = {group: [] for group in GROUPS}
    for flag, option in options_of(command).items():
        is_first = flag in command.begin_with
        sections[BEGIN if is_first else getattr(option, "group", OTHER)].append((flag, option))
    lines.append(f"```{{program}} moetuner {name}\n```\n")
    filled = {group: options for group, options in sections.items() if options}
    for group, options in filled.items():
        lines.append(f"## {group if len(filled) > 1 else 'Options'}\n")
        lines += [write_option(name, option, context) for _, option in options]
    return "\n".join([*lines, write_json(name), write_status(command)])


def write_help(text):
    """Return the paragraphs of a command's help; what click does not wrap is a fence."""
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b"):
            yield f"```text\n{paragraph[1:].strip(chr(10))}\n```\n"
        elif paragraph.strip():
            yield f"{mark_up(' '.join(paragraph.split()))}\n"


def write_option(name, option, context):
    """Return the entry of an option on the page of its command."""
    text, brackets = describe(option, context)
    flag = flag_of(option)
    page = find_explanation(name, flag)
    signature = ", ".join(sorted(option.opts, key=len))
    value = option.make_metavar(context) if not option.is_flag else ""
    link = f"More: [{title_of(page)}](../{page})."
    facts = write_facts(brackets)
    return f"````{{option}} {signature} {value}\n{mark_up(text)}\n\n{facts} {link}\n````\n"


def write_json(name):
    """Return the keys that a command writes with ``--json``: the sections of json.md."""
    keys = (DOCS / "json.md").read_text().partition("\n## Types")[0]
    written = f"`moetuner {name} --json FILE` writes these keys ([all](../json.md)).\n"
    lines = ["## JSON\n", written]
    for section in re.split(r"^## ", keys, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if title.split()[0] == name:
            lines += [f"{title}:\n"] if title != name else []
            lines.append(re.sub(r"\*([a-z_]+)\*", r"[\1](../json.md#\1)", body.strip()) + "\n")
    return "\n".join(lines)


def write_status(command):
    """Return the exit codes of a command."""
    gates = [f"`{flag}`" for flag in options_of(command) if flag.startswith("--fail-if")]
    lines = ["## Exit status\n", "| status | meaning |", "|---|---|", "| 0 | done |"]
    lines.append("| 2 | an option or a file is wrong, or no answer exists: the line says which |")
    if gates:
        lines.append(f"| 3 | the condition of {' or '.join(gates)} is met |")
    if "--check" in options_of(command):
        lines.append("| 2 | with `--check`: the engine could not load the map |")
    return "\n".join(
        [*lines, "", "[Exit status](../status.md) has the codes of signals and of bugs."]
    )


def write_commands():
    """Return the table of commands."""
    lines = ["| command | what it does |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| [{name}]({name}.md) | {text} |" for name, text in MENU.items())]
    )


def write_options():
    """Return every option once, in the order of the alphabet, with the commands that have it."""
    by_flag = {}
    for name, (command, context) in list_commands().items():
        for flag, option in options_of(command).items():
            text, brackets = describe(option, context)
            key = (mark_up(text), write_facts(brackets), find_explanation(name, flag))
            by_flag.setdefault(flag, {}).setdefault(key, []).append(name)
    lines = [write_topics(by_flag)]
    for flag, variants in sorted(by_flag.items()):
        lines.append(f"```{{index}} ! {flag}\n```\n\n({anchor_of(flag)})=\n## {flag}\n")
        for (text, facts, page), names in variants.items():
            links = ", ".join(f"[{name}](commands/{name}.md)" for name in names)
            lines.append(
                f"{text} {facts}\n\nCommands: {links}. More: [{title_of(page)}]({page}).\n"
            )
    return "\n".join(lines)


def write_topics(by_flag):
    """Return a table of the sections that explain options, with their options."""
    topics = {}
    for flag, variants in sorted(by_flag.items()):
        for page in sorted({page for _, _, page in variants}):
            topics.setdefault(page, []).append(f"[{flag}](#{anchor_of(flag)})")
    rows = sorted((title_of(page), page, flags) for page, flags in topics.items())
    lines = [f"| [{title}]({page}) | {', '.join(flags)} |" for title, page, flags in rows]
    return "\n".join(["## By topic\n", "| explained in | options |", "|---|---|", *lines, ""])


def anchor_of(flag):
    """Return the anchor of an option on the page of all options."""
    return f"option{flag[1:]}"


def replace_markers(app, docname, source):
    """Write the reference in place of its marker."""
    writers = {"command": write_command, "commands": write_commands, "options": write_options}

    def write(match):
        kind, name = match.groups()
        return writers[kind](name) if name else writers[kind]()

    source[0] = MARKER.sub(write, source[0])
    if docname == "json":  # a type in italics leads to its section
        types = "|".join(re.findall(r"^### (\w+)$", source[0], re.MULTILINE))
        source[0] = re.sub(rf"\*({types})\*", r"[\1](#\1)", source[0])


def list_generated(app, env, added, changed, removed):
    """Read pages with a marker anew in every build: what they show is no file of Sphinx's."""
    return [name for name in env.found_docs if MARKER.search(Path(env.doc2path(name)).read_text())]


def setup(app):
    """Register the extension."""
    app.connect("source-read", replace_markers)
    app.connect("env-get-outdated", list_generated)
    return {"parallel_read_safe": True}
