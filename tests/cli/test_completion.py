"""Shells complete commands, options and their choices."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from moetuner.cli import main, moetuner

BIN = Path(sys.executable).parent


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
so | plain,solve
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


def test_in_bash(tmp_path):
    """A bash that evaluated the script as documented completes a command."""
    if shutil.which("bash") is None or not (BIN / "moetuner").exists():
        pytest.skip("needs bash, and the moetuner command beside Python")
    script = """
        eval "$(_MOETUNER_COMPLETE=bash_source moetuner)"
        COMP_WORDS=(moetuner comp) COMP_CWORD=1
        _moetuner_completion moetuner
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("compare\n", "")
