"""Every MoE architecture of the installed transformers, built tiny; skips without torch."""

import contextlib
import importlib
import inspect
import os
import re
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt

load_file = pytest.importorskip("safetensors.torch").load_file
torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
auto = pytest.importorskip("transformers.models.auto.configuration_auto")
pytest.importorskip("moetuner.torch")
from moetuner.torch import RoutingCounters, capture, moe_layers  # noqa: E402

# Nothing here may ask the network for anything; two threads would only wait for each other.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

EXPERTS, LARGEST = 8, 4_000_000
WATCHERS = pytest.mark.parametrize("observe", [capture, RoutingCounters.attach])

# Given to a configuration as far as it has such a setting.
_SIZES = {
    8: "num_experts n_routed_experts num_local_experts moe_num_experts num_key_heads head_dim "
    "kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim linear_key_head_dim index_head_dim "
    "linear_value_head_dim mamba_d_state mamba_n_heads mamba_d_head global_head_dim "
    "linear_head_dim swa_head_dim "
    "mamba_num_heads mamba_head_dim ssm_state_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size expert_hidden_size moe_latent_size "
    "moe_shared_expert_intermediate_size moe_shared_intermediate_size moe_hidden_size "
    "share_expert_dim rel_extent o_lora_rank mamba_chunk_size",
    2: "num_experts_per_tok num_experts_per_token moe_num_experts_per_tok moe_k moe_topk "
    "top_k_experts num_key_value_heads linear_num_key_heads mamba_expand index_n_heads",
    1: "moe_num_shared_experts n_shared_experts num_shared_experts num_shared_expert "
    "first_k_dense_replace num_dense_layers mamba_n_groups n_groups eos_token_id",
    4: "num_hidden_layers num_attention_heads qk_rope_head_dim linear_num_value_heads "
    "mamba_dt_rank mamba_d_conv linear_num_heads",
    0: "hidden_size_per_layer_input num_kv_shared_layers pad_token_id",
    32: "hidden_size ffn_hidden_size sliding_window router_hidden_size",
    48: "intermediate_size intermediate_size_mlp",
    64: "vocab_size vocab_size_per_layer_input attention_chunk_size index_topk unpadded_vocab_size",
    128: "max_position_embeddings",
    12: "qk_head_dim",
    None: "bos_token_id",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
NONE = "n_shared_experts pad_token_id bos_token_id eos_token_id head_dim num_local_experts "
MAY_BE_NONE = f"{NONE} num_experts num_experts_per_tok".split()
HALF = ["linear_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
SPECIAL = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "dots1": {"layer_types": ["full_attention"] * 4},
    "qwen3_next": {"layer_types": HALF},
    "bailing_hybrid": {"layer_types": HALF},
    "longcat_flash": {"num_layers": 2, "head_dim": 4, "zero_expert_num": 256},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "gemma4": {"enable_moe_block": True, "moe_intermediate_size": 16, "top_k_experts": 2},
    "glm5_next": {"qk_rope_head_dim": 0, "qk_head_dim": 8},
    "glm4v_moe": {"rope_parameters": ROPE},
    "hy_v4_vl": {"rope_parameters": ROPE},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16]},
    "step3p5": {"sliding_window": 32},
    "zaya": {"num_experts_per_tok": 1},
}


@cache
def kinds():
    """Return model types whose source names experts, one for each language model."""
    models = Path(transformers.__file__).parent / "models"
    speaks, kind_of = {}, {}
    for kind in auto.CONFIG_MAPPING_NAMES:
        folder = auto.model_type_to_module_name(kind)
        if folder not in speaks:
            files = (models / folder).glob("modeling_*.py")
            speaks[folder] = any(re.search(r"\.experts\b|Experts\(", f.read_text()) for f in files)
        if speaks[folder] and not re.search(r"vision|audio|code_predictor", kind):
            kind_of.setdefault(auto.CONFIG_MAPPING[kind]().get_text_config().model_type, kind)
    return list(kind_of.values())


def config_of(kind, changes):
    """Return a tiny configuration of the language model of a type."""
    base = auto.CONFIG_MAPPING[kind]().get_text_config()
    special = SPECIAL.get(base.model_type.removesuffix("_text"), {})
    given = dict(special)
    for name, value in SIZES.items():
        now = setting(base, name)
        may = now is not None or name in MAY_BE_NONE
        if name not in special and may and now is not ... and not isinstance(now, (list, tuple)):
            given[name] = value
    if "kv_lora_rank" in given:
        if "head_dim" not in special:
            given.pop("head_dim", None)
        if "num_key_value_heads" in given:
            given["num_key_value_heads"] = 4
    if all(setting(base, name) not in (..., None) for name in ("n_group", "topk_group")):
        given |= {"n_group": 4, "topk_group": 2}
    # Two names of one setting: what is asked for counts, not the usual size by the other name.
    real = base.attribute_map
    changed = {real.get(name, name) for name in changes}
    given = {name: size for name, size in given.items() if real.get(name, name) not in changed}
    config = type(base)(**given | changes)
    config.bos_token_id = None
    return config


def setting(config, name):
    """Return a setting of a configuration; ... if it has none, "several" if layers differ."""
    try:
        return getattr(config, name, ...)
    except Exception:
        return "several"


# Of models that tests name: three layers, and routers without groups.
NAMED = {
    "qwen3_moe": {"mlp_only_layers": [1]},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
    "deepseek_v3_groups": {"n_group": 4, "topk_group": 2},
}


def build(name, **changes):
    """Build a model of three layers by the name of its architecture."""
    special = {"num_hidden_layers": 3, "intermediate_size": 24, **NAMED.get(name, {})}
    model = build_kind(name.removesuffix("_groups"), **special | changes)
    model.generation_config.eos_token_id = None  # texts go on to the end
    return model


def build_kind(kind, **changes):
    """Build a model whose routers are decided and whose biases and tables are not zero."""
    config = config_of(kind, changes)
    made = class_of(config)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in made(config).parameters())
    if size > LARGEST:
        raise RuntimeError(f"{size} weights are too many for a test, at most {LARGEST}")
    torch.manual_seed(0)
    model = made(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                first = torch.randint(EXPERTS, tensor.shape[:1])
                tensor.copy_(torch.stack([first, (first + 3) % EXPERTS], dim=1))
            if not tensor.is_floating_point() or re.search("inv_freq|rotary|norm", name):
                continue
            if re.search(r"(gate|router).*weight", name):
                tensor.normal_(std=0.5)
            elif "bias" in name:
                tensor.normal_(std=0.1)
            elif "experts" in name:
                tensor.normal_(std=0.2)
    return model


def class_of(config):
    """Return the model class for a configuration, with a head if there is one."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    models = {
        name: model
        for name, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, transformers.PreTrainedModel)
        and model.config_class is type(config)
        and not name.endswith("PreTrainedModel")
    }
    order = ("ForCausalLM", "ForConditionalGeneration", "Model", "")
    return next(models[name] for end in order for name in models if name.endswith(end))


def prompts(rows=3, length=7, *, seed=1):
    """Draw token ids [rows,length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 64, (rows, length), generator=generator)


def outputs(model, tokens=None):
    """Return the logits of a model, or its last hidden state."""
    with torch.no_grad():
        out = model(input_ids=prompts(8, 16) if tokens is None else tokens)
    logits = getattr(out, "logits", None)
    return out.last_hidden_state if logits is None else logits


def placement_for(model):
    """Draw a placement on two devices that the model's routers allow: groups stay whole."""
    layers, rng = moe_layers(model), np.random.default_rng(0)
    runs = np.arange(layers[0].num_experts).reshape(layers[0].expert_groups, -1)
    slots = [[rng.permutation(run) for run in rng.permutation(runs)] for _ in layers]
    return mt.Placement(np.reshape(slots, (len(layers), 2, -1)))


def tensors_of(folder):
    """Read all tensors of a checkpoint."""
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def choices(model, tokens, mask=None):
    """Return expert ids [B,S,L,K] by hooks of the tests' own, the obvious way."""
    chosen = []

    def listen(_module, _given, output):
        (ids,) = (part for part in output if not part.is_floating_point())
        chosen.append(ids.clone())

    handles = [layer.router.register_forward_hook(listen) for layer in moe_layers(model)]
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, 1).unflatten(0, tokens.shape).numpy()


def recorded(model, *passes, observe=capture, **options):
    """Record passes, given as arguments or as calls, by default one pass of the prompts."""
    with torch.no_grad(), observe(model, **options) as watcher:
        for given in passes or ({"input_ids": prompts()},):
            given() if callable(given) else model(**given)
    return watcher


class Gate(torch.nn.Module):
    """A router of a model with its own code, which returns ids before weights."""

    top_k = 2

    def __init__(self, experts, hidden):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(experts, hidden))

    def forward(self, x):
        top = (x @ self.weight.T).softmax(-1).topk(2)
        return top.indices, top.values


class Block(torch.nn.Module):
    """An MoE block of four experts in a list."""

    def __init__(self):
        super().__init__()
        self.top_k, self.gate = 2, Gate(4, 6)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        ids, weights = self.gate(x)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        chosen = every.gather(1, ids[..., None].expand(-1, -1, x.shape[1]))
        return (chosen * weights[..., None]).sum(1)


@contextlib.contextmanager
def ending(error, warning, text=None):
    """Expect an error to come out of a recording, and a warning of what is left of it."""
    with pytest.warns(RuntimeWarning, match=warning), pytest.raises(error, match=text):
        yield


def refused(text, call, *arguments, **named):
    """Expect an error of one line that contains a text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises((ValueError, TypeError), match=re.escape(text)) as caught:
            call(*arguments, **named)
    assert "\n" not in str(caught.value)


def same(a, b):
    """Return whether two sets of tensors are equal bit by bit."""
    pairs = [(a[key], b[key]) for key in a if key in b]
    return a.keys() == b.keys() and all(x.dtype == y.dtype and x.equal(y) for x, y in pairs)
