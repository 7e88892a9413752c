"""moetuner collect: from a folder and a file of texts to a trace."""

import json
import shutil
import sys

import numpy as np
import pytest
from moe_models import build, choices, refused, torch, transformers

import moetuner as mt
from moetuner.torch.collect import Document, collect, read_texts
from moetuner.torch.record.capture import Recorder

TEXTS = ["one two three", "four", "one one one one one two", "three three"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Save a tiny model with a tokenizer of one token per word; return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny-moe"
    build("mixtral").save_pretrained(folder)
    words = {word: number for number, word in enumerate(["?", ".", "one", "two", "three", "four"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    how = {"tokenizer_object": tokenizer, "unk_token": "?", "eos_token": "."}
    transformers.PreTrainedTokenizerFast(**how).save_pretrained(folder)
    return folder


@pytest.fixture
def lines(tmp_path):
    """Write a file of texts, one per line."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


def test_the_command(model_folder, lines, tmp_path, run):
    """The trace holds every token of every text, and the output says so."""
    out = tmp_path / "trace.safetensors"
    how = ("--out", out, "--batch-size", 3, "--json", "-")
    status, text, _ = run("collect", model_folder, "--dataset", lines, *how)
    assert status == 0
    trace = mt.RoutingTrace.load(out)
    about = {"model": "tiny-moe", "layers": 3, "kind": "trace", "top_k": 2}
    about |= {"files": [str(out)], "tokens": 12, "sequences": 4}
    about |= {"num_experts": 8, "group_names": []}
    assert json.loads(text)["trace"] == about
    assert trace.sequence.tolist() == [0] * 3 + [1] + [2] * 6 + [3] * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = choices(model, torch.tensor([[2, 2, 2, 2, 2, 3]]))[0]
    assert np.array_equal(trace.select(sequences=[2]).expert_ids, ids)


def test_limits_and_groups(model_folder, tmp_path):
    """Texts are cut, the last one at the limit; groups come from the file."""
    path = tmp_path / "texts.jsonl"
    groups = [{"group": "a"}, {"group": "b"}, {}, {"group": "a"}]
    records = [{"text": text, **group} for text, group in zip(TEXTS, groups, strict=True)]
    path.write_text("\n".join(map(json.dumps, records)))
    seen, out = [], tmp_path / "trace.safetensors"
    limits = {"batch_size": 2, "sequence_length": 4, "max_tokens": 9}
    how = {"dtype": "bfloat16", "device": "cpu", "progress": seen.append}
    trace = collect(str(model_folder), path, out, **limits, **how)
    assert seen == [4, 9]
    assert trace.sequence.tolist() == [0] * 3 + [1] + [2] * 4 + [3]
    names = [trace.group_names[number] for number in trace.group]
    assert names == ["a"] * 3 + ["b"] + ["other"] * 4 + ["a"]


def test_texts_of_a_file(tmp_path):
    """Lines or JSON lines, told apart by the first; empty ones are no texts."""
    path = tmp_path / "texts"
    path.write_text("\ufeff a b \n\n  \n{c\n", encoding="utf-8")
    assert list(read_texts(path)) == [Document("a b", None), Document("{c", None)]
    path.write_bytes(rb'{"text": "\ud83d\ude00"}')  # both halves of one
    assert list(read_texts(path)) == [Document("\U0001f600", None)]
    path.write_text('{"text": "a\\nb", "id": 3}\n{"text": " "}\n\n{"text": "c", "group": "g"}')
    assert list(read_texts(path)) == [Document("a\nb", None), Document("c", "g")]

    for content, text in (
        (b'{"text": "a"}\nb', "line 2: "),
        (b'{"text": "a"}\n[1]', "line 2: must be a JSON object, got list"),
        (b'{"text": "a"}\n{"group": "b"}', 'must be an object with "text" and perhaps "group"'),
        (b'{"text": "a"}\n{"text": "b", "group": 1}', "line 2: must be an object with"),
        (b"a\n\xff", f"{path}: line 2: must be UTF-8: invalid start byte"),
        (rb'{"text": "a\ud800b"}', "line 1: must be whole letters, got half of a letter (\\ud800)"),
        (
            rb'{"text": "a", "group": "\udfff"}',
            "line 1: must be whole letters, got half of a letter",
        ),
    ):
        path.write_bytes(content)
        refused(text, lambda: list(read_texts(path)))


def test_interrupted(model_folder, lines, tmp_path, run, monkeypatch):
    """Ctrl-C in the second batch: the first is kept beside the trace, and a line says where."""
    out, calls, group = tmp_path / "trace.safetensors", [], Recorder.group

    def interrupted(self, names):
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return group(self, names)

    monkeypatch.setattr(Recorder, "group", interrupted)
    how = ("--out", out, "--batch-size", "1")
    status, printed, error = run("collect", model_folder, "--dataset", lines, *how)
    partial = tmp_path / "trace.partial.safetensors"
    tokens = mt.RoutingTrace.load(partial).tokens
    assert (status, printed, tokens) == (130, "", 3)
    assert f"moetuner: warning: the recording ended with KeyboardInterrupt: {partial} has" in error
    assert error.splitlines()[-1] == "moetuner: error: interrupted"
    assert not out.exists()


def test_errors_are_one_line(model_folder, lines, tmp_path, run, monkeypatch):
    """What is missing or wrong is said in one line, and no trace appears."""
    out = tmp_path / "trace.safetensors"

    def fails(text, *arguments, dataset=lines):
        status, printed, error = run("collect", *arguments, "--dataset", dataset, "--out", out)
        assert (status, printed) == (2, "")
        assert text in error.splitlines()[-1]
        assert "bug" not in error
        assert not out.exists()

    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    fails(f"{empty}: must hold at least one text", model_folder, dataset=empty)
    fails("does not exist", model_folder, dataset=tmp_path / "none.txt")
    fails("none", tmp_path / "none")
    fails("device", model_folder, "--device", "neverland")
    dense = tmp_path / "dense"
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(dense)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(dense)
    fails("model must have MoE layers, LlamaForCausalLM has no module with 'experts'", dense)
    text = "dtype must be one of auto, float32, bfloat16, float16"
    refused(text, collect, str(model_folder), lines, out, dtype="int8")
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails("collecting needs transformers: pip install transformers", model_folder)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.safetensors", 0),
        ("model.safetensors", -1),
        ("config.json", 50),
        ("tokenizer.json", 50),
    ],
)
def test_a_model_that_is_cut_off(name, size, model_folder, lines, tmp_path, run):
    """Files of the model that end too early are said in one line that names the model, no bug."""
    folder, out = tmp_path / "cut", tmp_path / "trace.safetensors"
    shutil.copytree(model_folder, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    status, printed, error = run("collect", folder, "--dataset", lines, "--out", out)
    assert (status, printed) == (2, "")
    assert str(folder) in error.splitlines()[-1]
    assert "bug" not in error
    assert not out.exists()


def test_without_torch(lines, tmp_path, run, monkeypatch):
    """Without torch the command says what to install."""
    for name in [name for name in sys.modules if name.startswith("moetuner.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "trace.safetensors"
    status, _, error = run("collect", "model", "--dataset", lines, "--out", out)
    assert status == 2
    assert error.endswith(": moetuner.torch needs PyTorch: pip install 'moetuner[torch]'\n")
