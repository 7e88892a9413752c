"""Shells complete commands, options and their choices."""

import pytest
from click.shell_completion import BashComplete

from moetuner.cli import main, moetuner

SCRIPTS = {
    "bash": "complete -o nosort -F _moetuner_completion moetuner",
    "zsh": "compdef _moetuner_completion moetuner",
    "fish": "complete --no-files --command moetuner",
}


@pytest.mark.parametrize(("shell", "words"), SCRIPTS.items())
def test_every_shell_gets_a_script(shell, words, monkeypatch, capsys):
    """The documented variable makes the command print what the shell evaluates."""
    monkeypatch.setenv("_MOETUNER_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert words in capsys.readouterr().out


BEGUN = """
co | plain,collect plain,compare plain,convert
so | plain,solve
--ver | plain,--version
solve --meth | plain,--method
solve --method jo | plain,joint
solve --for vllm | plain,vllm plain,vllm-ascend
solve trace | file,trace
solve --out place | file,place
solve --topology machine | file,machine
solve --topology h100-nvl8-ib | plain,h100-nvl8-ib400
advise --initial round | plain,round_robin
collect mod | file,mod
"""


@pytest.mark.parametrize("line", BEGUN.strip().splitlines())
def test_what_is_begun_is_completed(line):
    """Commands, options, choices, methods, machines and files."""
    begun, wanted = (part.split() for part in line.split(" | "))
    shell = BashComplete(moetuner, {}, "moetuner", "_MOETUNER_COMPLETE")
    items = shell.get_completions(begun[:-1], begun[-1])
    assert [shell.format_completion(item) for item in items] == wanted
