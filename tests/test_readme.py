"""The README tells the truth."""

import re
from pathlib import Path

import pytest

from moetuner.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_example_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    """The Python example runs as it stands, and prints the block below it."""
    code, printed = re.search(
        r"```python\n(.*?)```\n+```\n(.*?)```", README.read_text(), re.DOTALL
    ).groups()
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    capsys.readouterr()
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out == printed


def test_example_with_torch(tmp_path, monkeypatch):
    """The PyTorch example records a model, places its experts and leaves its logits alone."""
    from moe_models import build, logits, prompts, torch, transformers

    _, code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = build("mixtral")
    before = logits(model)
    names = {"model": model, "batches": [{"input_ids": prompts(seed=n)} for n in range(3)]}
    exec(compile(code, str(README), "exec"), names)
    assert names["recorder"].trace().tokens == 3 * prompts().numel()
    loaded = transformers.AutoModelForCausalLM.from_pretrained("placed").eval()
    for found in (logits(model), logits(loaded)):
        assert torch.allclose(found, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()))
def test_links_lead_somewhere(link):
    """What the README links to exists."""
    assert (README.parent / link).exists()
