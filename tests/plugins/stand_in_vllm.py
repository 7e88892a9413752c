"""A stand-in for vLLM: its classes and modules, as far as plugins touch them."""

from types import SimpleNamespace

import pytest

WIDTH = 2  # numbers of an expert


def model(layers=(), *, modules=None, experts=5, slots=6, ranks=2):
    """Make a model of so many experts in so many slots; its modules are its layers if not given."""
    return SimpleNamespace(
        moe_layers=layers,
        modules=lambda: layers if modules is None else modules,
        num_logical_experts=experts,
        num_physical_experts=slots,
        num_local_physical_experts=slots // ranks,
        num_expert_groups=1,
    )


def policy():
    """Make a class of vLLM's policies, which counts how often it is asked."""
    torch = pytest.importorskip("torch")

    class Policy:
        calls = 0

        @classmethod
        def rebalance_experts(
            cls, weight, replicas, groups, nodes, ranks, old=None
        ) -> "torch.Tensor":
            """Answer with experts in turn."""
            cls.calls += 1
            assert replicas % ranks == 0
            return torch.arange(replicas).repeat(len(weight), 1) % weight.shape[1]

        @classmethod
        def preserve_intragpu_slots(cls):
            """Be kept."""

    return Policy


def engine():
    """Make vLLM's classes, as far as plugins touch them."""
    torch = pytest.importorskip("torch")

    class RoutedExperts:
        """One layer on one rank: slots of so many experts, and what loads them."""

        def __init__(self, local=3, first=0, experts=5, slots=6):
            self.weight = torch.zeros(local, WIDTH)
            self.first = first
            self.moe_config = SimpleNamespace(num_logical_experts=experts, num_experts=slots)

        def weight_loader(
            self,
            param,
            loaded_weight,
            weight_name,
            shard_id,
            expert_id,
            return_success=False,
        ):
            """Load a slot, if it is here; or all of them."""
            local = expert_id - self.first
            here = 0 <= local < len(param)
            if loaded_weight.dim() == param.dim():
                param.copy_(loaded_weight)
            elif here:
                param[local] = loaded_weight
            return here if return_success else None

    class EplbState:
        """Models by their hash, what was drained before which step, and how weights moved."""

        policy = None
        moves = True

        def __init__(self, rank=0, workers=1, *, elastic=False, backend="naive"):
            self.model_states, self.is_async = {}, False
            self.done, self.rearranged = [], []
            self.parallel_config = SimpleNamespace(
                world_size=workers, rank=rank, enable_elastic_ep=elastic, all2all_backend=backend
            )

        def add_model(self, model, model_config, model_name="tiny"):
            """Take a model, its experts in order; tests take away what models may not have."""
            experts = getattr(model, "num_logical_experts", 5)
            slots = torch.arange(getattr(model, "num_physical_experts", 6)) % experts
            running = slots.repeat(len(getattr(model, "moe_layers", ())) or 3, 1)
            self.model_states[id(model)] = SimpleNamespace(
                model=model,
                model_name=model_name,
                physical_to_logical_map=running,
                rebalanced=False,
            )

        def step(self, is_dummy=False):
            """Note a step."""
            self.done.append("step")

        def drain_async(self):
            """Note that what is staged is dropped."""
            self.done.append("drain")

        def rearrange(self, is_profile=False):
            """Note that weights move, and whether beside the steps; ask the policy if there is one.

            Without an effect of its map in a profile, and where ``moves`` is not set.
            """
            self.rearranged.append(self.is_async)
            for state in self.model_states.values() if self.policy else ():
                model, running = state.model, state.physical_to_logical_map
                load = torch.ones(len(running), model.num_logical_experts, dtype=torch.int64)
                ranks = model.num_physical_experts // model.num_local_physical_experts
                sizes = model.num_physical_experts, model.num_expert_groups, 1, ranks
                decided = self.policy.rebalance_experts(load, *sizes, running)
                if self.moves and not is_profile:
                    running.copy_(decided)

    class Worker:
        """Loads weights, sleeps and wakes up."""

        def __init__(self, states, rank=0):
            self.model_runner, self.rank = SimpleNamespace(eplb_state=states), rank
            self.did = []

        def reload_weights(self, *arguments, **named):
            """Note it."""
            self.did.append("reload")
            return "reloaded"

        def start_weight_update(self):
            """Note it."""
            self.did.append("start")

        def sleep(self, level=1):
            """Lose all that was allocated at the load."""
            for state in self.model_runner.eplb_state.model_states.values():
                if level == 2:
                    state.physical_to_logical_map.zero_()

        def wake_up(self, tags=None):
            """Note it."""
            self.did.append("wake")

    return SimpleNamespace(RoutedExperts=RoutedExperts, EplbState=EplbState, Worker=Worker)


def modules():
    """Make vLLM's modules by their names."""
    classes = engine()

    class VllmConfig:
        def __init__(self, is_balanced=True, policy="default"):
            eplb_config = SimpleNamespace(policy=policy)
            self.parallel_config = SimpleNamespace(enable_eplb=is_balanced, eplb_config=eplb_config)
            getattr(self, "__post_init__", lambda: None)()

        def __post_init__(self):
            """Be wrapped."""

    return {
        "vllm.distributed.eplb.policy": {"EPLB_POLICIES": {"default": policy()}},
        "vllm.distributed.eplb.eplb_state": {"EplbState": classes.EplbState},
        "vllm.model_executor.layers.fused_moe.routed_experts": {
            "RoutedExperts": classes.RoutedExperts
        },
        "vllm.v1.worker.gpu_worker": {"Worker": classes.Worker},
        "vllm.config": {"VllmConfig": VllmConfig},
    }
