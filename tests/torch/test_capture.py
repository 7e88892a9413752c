"""capture: what routers choose, token by token, with sequences and groups and without padding."""

import numpy as np
import pytest
from moe_models import WATCHERS, Gate, build, choices, ending, prompts, recorded, refused, torch
from transformers import CompileConfig, DynamicCache

import moetuner as mt
from moetuner.torch import RoutingCounters, apply_placement, capture, moe_layers
from moetuner.torch.record.capture import Recorder


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("mixtral", {}, (32, 24)),
        ("qwen3_moe", {}, (32, 16)),
        ("deepseek_v3_groups", {}, (32, 16)),
        ("gpt_oss", {}, (32, 24)),
        ("mixtral", {"num_local_experts": 300, "intermediate_size": 4}, (32, 4)),
    ],
)
def test_trace_is_what_the_routers_chose(name, changes, size):
    """Every token in the order of the batch, and what the model's configuration says."""
    model, experts = build(name, **changes), 300 if changes else 8
    trace = recorded(model).trace()
    expected = choices(model, prompts())
    assert np.array_equal(trace.expert_ids, expected.reshape(trace.expert_ids.shape))
    assert trace.expert_ids.dtype == (np.uint16 if changes else np.uint8)
    assert trace.sequence.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert (trace.num_experts, trace.group, trace.model) == (experts, None, type(model).__name__)
    assert trace.expert_size == size


@pytest.mark.parametrize("where", ["keyword", "position", "recorder"])
def test_padding_is_left_out(where):
    """Masked tokens are not in the trace, wherever the mask comes from."""
    model, tokens = build("mixtral"), prompts()
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[2, 5:] = 0
    own = {"attention_mask": mask} if where == "recorder" else {}
    call = {
        "keyword": lambda: model(input_ids=tokens, attention_mask=mask),
        "position": lambda: model(tokens, mask),
        "recorder": lambda: model(tokens),
    }[where]
    trace = recorded(model, call, **own).trace()
    expected = choices(model, tokens, None if own else mask)
    assert np.array_equal(trace.expert_ids, expected[mask.bool().numpy()])
    assert trace.sequence.tolist() == [0] * 4 + [1] * 7 + [2] * 5


class Wrapper(torch.nn.Module):
    """A module with a model in it, beside a module of its own."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, torch.nn.Linear(2, 2)


class Passes(Wrapper):
    """Passes on what it is given, as DistributedDataParallel does."""

    def forward(self, *inputs, **kwargs):
        return self.model(*inputs, **kwargs)


class Renames(Wrapper):
    """Has arguments of other names, in another order."""

    def forward(self, padding, input_ids):
        return self.model(input_ids, padding)


class Bypasses(Wrapper):
    """Calls past the hooks of the model, as PEFT does."""

    def forward(self, *inputs, **kwargs):
        return self.model.forward(*inputs, **kwargs)


@WATCHERS
@pytest.mark.parametrize(
    ("wrap", "calls"),
    [
        (Passes, ("position", "keyword", "mixed")),
        (Bypasses, ("position", "keyword", "mixed")),
        (lambda model: Passes(Bypasses(model)), ("position", "mixed")),
        (lambda model: Passes(torch.compile(model, backend="eager")), ("position", "keyword")),
        (torch.nn.DataParallel, ("position", "mixed")),
        (Renames, ("renamed",)),
        (lambda model: Passes(Renames(model)), ("renamed",)),
    ],
)
def test_padding_is_left_out_behind_a_wrapper(wrap, calls, observe):
    """Whatever stands between the caller and the model, the mask that it gets counts."""
    model, tokens = build("mixtral"), prompts()
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[2, 5:] = 0
    expected = choices(model, tokens, mask)[mask.bool().numpy()]
    load = np.stack([np.bincount(ids.ravel(), minlength=8) for ids in expected.swapaxes(0, 1)])
    wrapper = wrap(model)
    ways = {
        "position": lambda: wrapper(tokens, mask),
        "keyword": lambda: wrapper(input_ids=tokens, attention_mask=mask),
        "mixed": lambda: wrapper(tokens, attention_mask=mask),
        "renamed": lambda: wrapper(mask, tokens),
    }
    for call in calls:
        watcher = recorded(wrapper, ways[call], observe=observe)
        if observe is capture:
            assert np.array_equal(watcher.trace().expert_ids, expected), call
        else:
            assert np.array_equal(watcher.statistics().total_load, load), call
        assert watcher.dropped == 0


def test_an_error_in_a_wrapper_is_no_pass():
    """After a pass that failed before its model ran, the next one is recorded as it is."""
    model, tokens = build("mixtral"), prompts()
    wrapper = Passes(model)

    def fails():
        with pytest.raises(TypeError):
            wrapper(tokens, nothing=model, input_ids=tokens)

    recorder = recorded(wrapper, fails, lambda: wrapper(tokens, torch.ones_like(tokens)))
    assert (recorder.trace().tokens, recorder.dropped) == (21, 0)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "usual") for name in ("mixtral", "deepseek_v3", "gpt_oss")),
        *(("qwen3_moe", how) for how in ("static", "compiled", "uncached")),
    ],
)
def test_generation_continues_sequences(name, how):
    """Tokens that generate feeds, with any cache, are their prompts' and route as in one pass."""
    compiled = []
    config = CompileConfig(backend=lambda graph, _: compiled.append(graph) or graph)
    config._compile_all_devices = True
    how = {
        "usual": {},
        "static": {"cache_implementation": "static"},
        "compiled": {"cache_implementation": "static", "compile_config": config},
        "uncached": {"use_cache": False},
    }[how]
    model, tokens = build(name), prompts()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :3] = 0
    how |= {"attention_mask": mask[:, :7], "do_sample": False}
    with torch.no_grad(), capture(model) as recorder:
        text = model.generate(tokens, max_new_tokens=6, **how)
        model.generate(tokens, max_new_tokens=2, **how)
    trace = recorder.trace()
    assert np.bincount(trace.sequence).tolist() == [9, 12, 12, 5, 8, 8]
    whole = choices(model, text[:, :-1], mask)
    for row, padding in enumerate((3, 0, 0)):
        ids = trace.select(sequences=[row]).expert_ids
        assert np.array_equal(ids, whole[row, padding:])
    assert recorder.dropped == 0
    assert not compiled  # what is compiled could not be heard


def test_endings_are_those_of_the_call():
    """What ends a sequence is said in the call of generate; a padding token said is text."""
    model, tokens = build("mixtral"), prompts()

    def generated(**more):
        with torch.no_grad(), capture(model) as recorder:
            text = model.generate(tokens, max_new_tokens=6, do_sample=False, **more)[:, 7:]
        return text.tolist(), np.bincount(recorder.trace().sequence).tolist()

    ending = generated()[0][0][1]
    text, lengths = generated(eos_token_id=ending, pad_token_id=0)
    fed = [row.index(ending) if ending in row else len(row) - 1 for row in text]
    assert min(fed) < 5
    assert lengths == [7 + count for count in fed]
    model.generation_config.pad_token_id = ending
    assert generated(attention_mask=torch.ones_like(tokens))[1] == [7 + 5] * 3


def test_a_cache_that_the_model_made():
    """A cache that comes out of one pass and goes into the next continues its sequences."""
    model, tokens = build("qwen3_moe"), prompts()
    with torch.no_grad(), capture(model) as recorder:
        first = model(input_ids=tokens, use_cache=True)
        name = "cache" if hasattr(first, "cache") else "past_key_values"
        model(input_ids=tokens[:, :2], **{name: getattr(first, name)})
        model(input_ids=tokens[:, :2])
    expected = [*[0] * 7, *[1] * 7, *[2] * 7, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert recorder.trace().sequence.tolist() == expected


def test_groups():
    """Tokens have the group that is in force, or each sequence its own."""
    model, given = build("mixtral"), {"input_ids": prompts(2, 3)}
    with torch.no_grad(), capture(model) as recorder:
        with recorder.group("german"):
            model(**given)
            with recorder.group(["python", "german"]):
                model(**given)
        model(**given)
    trace = recorder.trace()
    names = [trace.group_names[number] for number in trace.group]
    assert names == ["german"] * 6 + ["python"] * 3 + ["german"] * 3 + ["other"] * 6
    assert recorded(model, given, group="all").trace().group_names == ("all",)
    text = "group must be a name, or one for each of 2 sequences"
    refused(text, recorded, model, given, group=["a", "b", "c"])


@pytest.mark.parametrize("buffer_bytes", [1, 13, 100, 1 << 20])
def test_files_and_small_buffers(buffer_bytes, tmp_path):
    """The file holds the same trace for any size of the buffer, and nothing else stays."""
    model, tokens, path = build("gpt_oss"), prompts(), tmp_path / "trace.safetensors"
    passes = [{"input_ids": tokens[:rows]} for rows in (3, 1, 2)]
    expected = recorded(model, *passes, group="a").trace()
    own = {"group": "a", "path": path, "buffer_bytes": buffer_bytes}
    recorder = recorded(model, *passes, lambda: not path.exists() or pytest.fail("early"), **own)
    for trace in (mt.RoutingTrace.load(path), recorder.trace()):
        for name in ("expert_ids", "sequence", "group", "group_names"):
            assert np.array_equal(getattr(trace, name), getattr(expected, name))
    assert [file.name for file in tmp_path.iterdir()] == ["trace.safetensors"]


def test_all_modes():
    """Training, recomputation, no_grad and inference mode: recorded once, gradients as without."""
    model, tokens = build("mixtral"), prompts()
    given = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    model(**given).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with capture(model) as recorder:
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                model(input_ids=tokens)
        model.train()
        model(**given).loss.backward()
        assert all(p.grad.equal(g) for p, g in zip(model.parameters(), expected, strict=True))
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)()
        model(**given).loss.backward()
    ids = recorder.trace().expert_ids.reshape(4, -1)
    assert all(np.array_equal(ids[0], others) for others in ids)


def test_nothing_stays_behind(tmp_path):
    """After the block, also after an error, the model has no hooks and no raw file is left."""
    model, path = build("mixtral"), tmp_path / "a.safetensors"
    modules, own = list(model.modules()), set(model.__dict__)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()
    with capture(model, path=path) as recorder:
        assert hooks() == before + 2 + 3
        with pytest.raises(RuntimeError, match=r"trace\(\) needs a recording that has ended"):
            recorder.trace()
    assert (hooks(), recorder.trace().tokens) == (before, 0)
    path.unlink()
    with pytest.raises(KeyError, match="mine"), capture(model, path=path) as recorder:
        raise KeyError("mine")
    assert (hooks(), set(model.__dict__), list(tmp_path.iterdir())) == (before, own, [])
    with pytest.raises(RuntimeError, match="ended and has tokens"):
        recorder.trace()


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
@pytest.mark.parametrize("buffer_bytes", [100, 1 << 20])
def test_an_error_keeps_what_was_recorded(error, buffer_bytes, tmp_path):
    """It comes out of the block; the passes before are in the trace, and in a file beside it."""
    model, tokens, path = build("mixtral"), prompts(), tmp_path / "a.safetensors"
    path.write_bytes(b"an older trace")
    for where in (None, path):
        recorder = capture(model, path=where, group="g", buffer_bytes=buffer_bytes)
        with ending(error, f"{error.__name__}.* 42 tokens until then"), recorder:
            model(input_ids=tokens)
            model(input_ids=tokens)
            raise error
        trace = recorder.trace()
        expected = choices(model, tokens).reshape(21, 3, 2)
        assert np.array_equal(trace.expert_ids, np.concatenate([expected, expected]))
        assert (trace.sequence.max(), trace.group_names) == (5, ("g",))
    assert path.read_bytes() == b"an older trace"
    partial = tmp_path / "a.partial.safetensors"
    assert np.array_equal(mt.RoutingTrace.load(partial).expert_ids, trace.expert_ids)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, partial.name}


def test_a_full_disk_does_not_fail_the_model(tmp_path, monkeypatch):
    """Passes go on; the block ends with the error, and what was written before is there."""
    model, append, calls = build("mixtral"), Recorder._append, []

    def full(self, *arrays):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        append(self, *arrays)

    monkeypatch.setattr(Recorder, "_append", full)
    recorder = capture(model, path=tmp_path / "a.safetensors", buffer_bytes=21 * 6)
    with ending(OSError, "No space left|OSError"), recorder:
        for _ in range(5):
            out = model(input_ids=prompts())
    assert out.logits.shape[0] == 3
    assert mt.RoutingTrace.load(tmp_path / "a.partial.safetensors").tokens == 21
    assert recorder.dropped > 0


@WATCHERS
def test_a_pass_that_is_not_understood_is_left_out(observe):
    """The model is as unobserved; the pass is counted and warned of, and leaves no tokens."""
    model, tokens = build("mixtral"), prompts()
    given = {"input_ids": tokens, "attention_mask": torch.ones(3, 1, 7, 7).bool().tril()}
    with torch.no_grad():
        expected = model(**given).logits

    def same():
        assert model(**given).logits.equal(expected)
        with pytest.raises(IndexError):
            model(input_ids=tokens + 1000)

    with pytest.warns(RuntimeWarning, match="attention_mask must be") as warned:
        watcher = recorded(model, same, same, {"input_ids": tokens}, observe=observe)
    assert (len(warned), watcher.dropped) == (1, 2)
    if observe is capture:
        assert watcher.trace().tokens == 21
    else:
        assert watcher.statistics().total_load[0].sum() == 2 * 21


def test_paged_batches():
    """Tokens of many requests in one row: counted without their padding, and no trace of them."""
    model = build("mixtral")
    given = {
        "input_ids": prompts(1, 7),
        "attention_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool).tril(),
        "cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32),
    }
    paged = lambda: model(**given, cache=DynamicCache())  # noqa: E731
    counters = recorded(model, paged, observe=RoutingCounters.attach)
    assert counters.statistics().total_load[0].sum() == 2 * 5
    with pytest.warns(RuntimeWarning, match="paged batches do not say which"):
        recorder = recorded(model, paged, {"input_ids": prompts(1, 4)})
    assert (recorder.dropped, recorder.trace().tokens) == (1, 4)


def test_nan_scores_are_named():
    """NaN is an error that names the layer, except in padding."""
    model, tokens = build("mixtral"), prompts()
    mask = torch.ones_like(tokens)
    mask[1, :] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens[1]] = torch.nan
        embeddings = model.model.embed_tokens(tokens)
        embeddings[0] = embeddings[2] = 0.5
    text = "router scores must be numbers, got NaN in layer 0 (model.layers.0.mlp.gate)"
    given = {"inputs_embeds": embeddings}
    refused(text, recorded, model, given)
    refused(text, recorded(model, given, observe=RoutingCounters.attach).statistics)
    assert recorded(model, given | {"attention_mask": mask}).trace().tokens == 14


def test_models_that_cannot_be_recorded():
    """Layers that differ, other callers and silent routers are told apart."""
    model = build("mixtral")
    moe_layers(model)[2].router.top_k = 3
    text = "must have the same top_k, got 2 in model.layers.0.mlp.gate and 3"
    refused(text, recorded, model)
    moe_layers(model)[1].router.num_experts = 9
    refused("must have the same experts, got 8 in model.layers.0.mlp.gate and 9", recorded, model)

    model = build("mixtral")
    text = "model.layers.0.mlp.gate ran outside a forward pass of MixtralForCausalLM"
    refused(text, recorded, model, lambda: model.model(input_ids=prompts()))
    model.model.layers[1].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    text = "every router must run in a forward pass, model.layers.1.mlp.gate did not (what torch.c"
    refused(text, recorded, model)


def test_routers_that_are_named():
    """Any module of the model can be named as a router; its tokens must be those of the call."""
    model, x = torch.nn.Sequential(Gate(5, 4)), torch.randn(6, 4)
    trace = recorded(model, lambda: model(x), routers=[model[0]]).trace()
    assert (trace.num_experts, trace.sequence.tolist()) == (5, [0] * 6)
    assert np.array_equal(trace.expert_ids[:, 0], model[0](x)[0].numpy())
    model.forward = lambda x: model[0](x[1:])
    text = "0: expert ids must be [6, 2], [tokens, top_k] as the forward pass was called, got [5, 2"
    refused(text, recorded, model, lambda: model(x), routers=["0"])


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_model_runs_eagerly_while_it_is_recorded(how):
    """Also one that has run before; afterwards compiled code runs again."""
    runs = []

    def backend(graph, _):
        runs.append("compiled")
        return lambda *given: runs.append("ran") or graph(*given)

    model, x = torch.nn.Sequential(Gate(5, 4)), torch.randn(6, 4)
    called = model
    if how == "in place":
        model.compile(backend=backend)
    else:
        called = torch.compile(model, backend=backend)
    with torch.no_grad():
        called(x)
        before = runs.count("ran")
        assert before
        with capture(called, routers=[model[0]]) as recorder:
            ids = called(x)[0]
            # One within the other, left in the wrong order.
            other = RoutingCounters.attach(called, routers=[model[0]])
        called(x)
        other.detach()
        assert runs.count("ran") == before
        called(x)
    assert runs.count("ran") > before
    assert np.array_equal(recorder.trace().expert_ids[:, 0], ids)


def test_bad_arguments(tmp_path):
    """Every argument is checked, with its name, rule and value."""
    model = build("mixtral")
    for text, arguments in (
        ("path must end in .safetensors, got 'a.npz'", {"path": tmp_path / "a.npz"}),
        ("buffer_bytes must be at least 1", {"buffer_bytes": 0}),
        ("routers must be modules of the model, got 'x'", {"routers": ["x"]}),
        ("routers must be at least one and differ, got []", {"routers": []}),
        ("with a batch of 3, got [2, 7]", {"attention_mask": torch.ones(2, 7)}),
        ("must have at least 7 tokens, got [3, 6]", {"attention_mask": torch.ones(3, 6)}),
    ):
        refused(text, recorded, model, **arguments)


SIZES = {"layers": 2, "experts": 4, "top_k": 2}
NUMBERS = (True, "4", 4.5, -1, None, float("inf"))
WRONG = [
    (capture, "model", (None, 3, "x", torch.nn.Linear)),
    (capture, "path", (3, [], True, "x.npz")),
    (capture, "group", (3, [1], float("nan"))),
    (capture, "attention_mask", (3, "x", [1])),
    (capture, "routers", (3, "gate", [3], [None])),
    (capture, "name", (3, b"x", [1])),
    (capture, "buffer_bytes", NUMBERS),
    (apply_placement, "model", (None, 3, "x")),
    (apply_placement, "placement", (None, 3, "x", [[0]])),
    (apply_placement, "inverse", (None, 3, "x")),
    *((RoutingCounters, size, NUMBERS) for size in SIZES),
    (RoutingCounters, "window", NUMBERS[:4]),
    (RoutingCounters, "transitions", ("x", 2, None)),
    (RoutingCounters, "device", (3.5, "gpuu", [])),
]


def test_wrong_classes_are_named():
    """Models, placements, files, names and switches: one line that names the argument."""
    model = build("mixtral")
    placement = mt.Placement.from_assignment([[0, 0, 0, 0, 1, 1, 1, 1]] * 2, 2)
    both = {"model": model, "placement": placement}
    right = {capture: {"model": model}, apply_placement: both, RoutingCounters: SIZES}
    for call, name, values in WRONG:
        for value in values:
            refused(name, call, **{**right[call], name: value})
