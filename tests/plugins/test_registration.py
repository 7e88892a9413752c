"""Registration never raises: an engine starts, whatever names this version of it does not have."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import stand_in_vllm

import moetuner as mt
from moetuner.plugins import sglang, vllm, vllm_ascend
from moetuner.plugins.log import Log

torch = pytest.importorskip("torch")

LOG = logging.getLogger("moetuner.plugins")


def a_sglang():
    """Return the modules of an SGLang by their names, as far as plugins touch it."""

    class HookRegistry:
        hooks: dict = {}  # noqa: RUF012

        @classmethod
        def register(cls, target, hook, kind):
            cls.hooks[target] = hook

    return {
        "sglang.srt.plugins.hook_registry": {
            "HookRegistry": HookRegistry,
            "HookType": SimpleNamespace(AROUND="around"),
        }
    }


def an_ascend():
    """Return the modules of a vllm-ascend by their names, as far as plugins touch it."""

    class PolicyFactory:
        @staticmethod
        def generate_policy(policy_type):
            """Be replaced."""

    return {"vllm_ascend.eplb.core.policy.policy_factory": {"PolicyFactory": PolicyFactory}}


def names_of(modules):
    """Return what can be missing: modules, names in them, keys, and methods of classes."""
    for module, content in modules.items():
        yield (module,)
        for name, value in content.items():
            yield module, name
            inside = value if isinstance(value, dict) else vars(value)
            for key in inside:
                if isinstance(value, dict) or key == "__post_init__" or not key.startswith("_"):
                    yield module, name, key


def remove(modules, missing):
    """Take a name away."""
    module, *names = missing
    if not names:
        modules[module] = None
    elif len(names) == 1:
        del modules[module][names[0]]
    elif isinstance(modules[module][names[0]], dict):
        del modules[module][names[0]][names[1]]
    else:
        delattr(modules[module][names[0]], names[1])


def install(modules, monkeypatch):
    """Let this process import the modules and their packages."""
    for name, content in modules.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            parent = ".".join(parts[:length])
            if parent not in sys.modules or sys.modules[parent] is None:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
                sys.modules[parent].__path__ = []
                sys.modules[parent].__spec__ = SimpleNamespace(submodule_search_locations=[])
        module = None
        if content is not None:
            module = ModuleType(name)
            vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def use(modules, absent=""):
    """Call what plugins put around an engine's names, as far as they are there.

    ``absent`` is what its values do not have.
    """
    content = {name: value for of in modules.values() if of for name, value in of.items()}
    if config := content.get("VllmConfig"):
        config()
    if (states := content.get("EplbState")) is None or not hasattr(states, "add_model"):
        return
    state, layers = states(), []
    state.is_async = True
    if experts := content.get("RoutedExperts"):
        layers = [experts() for _ in range(3)]
    model = stand_in_vllm.model(layers)
    for value in (state, state.parallel_config, model):
        vars(value).pop(absent, None)
    state.add_model(model, None)
    for layer in layers:
        if hasattr(layer, "weight_loader"):
            tensor = torch.zeros(3, 2), torch.zeros(2), "w1_weight", "w1"
            layer.weight_loader(*tensor, 0)
    if hasattr(state, "step"):
        state.step()
    if worker := content.get("Worker"):
        call = worker(state)
        for name in ("reload_weights", "start_weight_update", "sleep", "wake_up"):
            getattr(call, name, lambda: None)()


ENGINES = {
    "vllm": (stand_in_vllm.modules, vllm),
    "sglang": (a_sglang, sglang),
    "vllm-ascend": (an_ascend, vllm_ascend),
}
MISSING = [(engine, name) for engine, (make, _) in ENGINES.items() for name in names_of(make())]
SETTINGS = ["", "REBALANCE", "PLACEMENT", "RECORD", "UPDATES"]


@pytest.fixture
def asked(request, monkeypatch, tmp_path):
    """Set one variable, or none."""
    placement = mt.Placement([[[0, 1, 2], [3, 4, 0]]] * 3)
    placement.save(tmp_path / "placement.json")
    values = {"PLACEMENT": tmp_path / "placement.json", "RECORD": tmp_path}
    if request.param:
        value = values.get(request.param, 1)
        monkeypatch.setenv(f"MOETUNER_{request.param}", str(value))
    for module in (vllm, sglang, vllm_ascend):
        monkeypatch.setattr(module, "LOG", Log(LOG))
    return request.param


@pytest.mark.parametrize("asked", SETTINGS, indirect=True)
@pytest.mark.parametrize(("engine", "missing"), [*MISSING, *((name, None) for name in ENGINES)])
def test_an_engine_starts_without_any_name(engine, missing, asked, monkeypatch):
    """Nothing raises when it registers, nor when the engine calls what was put into it."""
    make, plugin = ENGINES[engine]
    modules = make()
    if missing is not None:
        remove(modules, missing)
    install(modules, monkeypatch)
    for _ in range(2):
        plugin.register()
    use(modules)


ABSENT = ["parallel_config", "is_async", "enable_elastic_ep", "world_size", "moe_layers", "modules"]
ABSENT += ["num_logical_experts", "num_physical_experts", "num_local_physical_experts"]
ABSENT += ["num_expert_groups"]


@pytest.mark.parametrize("asked", SETTINGS, indirect=True)
@pytest.mark.parametrize("absent", ABSENT)
def test_a_model_is_taken_without_any_of_its_names(absent, asked, monkeypatch):
    """What is put around vLLM's methods does not raise where its values have other names."""
    modules = stand_in_vllm.modules()
    install(modules, monkeypatch)
    vllm.register()
    use(modules, absent)


@pytest.mark.parametrize("asked", ["REBALANCE"], indirect=True)
def test_policies_of_other_names_are_one_warning(asked, monkeypatch, caplog):
    """It says which there are; weights that change follow the experts all the same."""
    modules = stand_in_vllm.modules()
    policies = modules["vllm.distributed.eplb.policy"]["EPLB_POLICIES"]
    policies["swift"] = policies.pop("default")
    install(modules, monkeypatch)
    vllm.register()
    vllm.register()
    assert caplog.text.count("vLLM keeps its own policy: ") == 1
    assert "none named default, but swift" in caplog.text
    assert hasattr(modules["vllm.distributed.eplb.eplb_state"]["EplbState"].step, "__wrapped__")


@pytest.mark.parametrize("asked", SETTINGS, indirect=True)
def test_updates_are_followed_where_anything_is_asked_for(asked, monkeypatch):
    """Also by a recording alone, and by the variable of its own; not where it is off."""
    for value in ("", "1", "0"):
        monkeypatch.setenv("MOETUNER_UPDATES", value)
        modules = stand_in_vllm.modules()
        install(modules, monkeypatch)
        vllm.register()
        loader = modules["vllm.model_executor.layers.fused_moe.routed_experts"]["RoutedExperts"]
        follows = hasattr(loader.weight_loader, "__wrapped__")
        assert follows == (value == "1" or bool(value == "" and asked not in ("", "UPDATES")))
