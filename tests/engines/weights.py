"""Weights that change in vLLM's workers, as frameworks for reinforcement learning change them.

`Workers` is a `worker_extension_cls`; `register` adds the transfer engine `disk`, which does with a
file what vLLM's own do with a stream from a trainer.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.down_proj\.weight")


def tensors(folder: str | Path, pattern: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors of a checkpoint whose names match."""
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file is no dictionary
            if re.search(pattern, name):
                yield name, file.get_tensor(name)


class Workers:
    """What a worker does besides vLLM's own."""

    model_runner: Any
    vllm_config: Any

    def load_directly(self, folder: str, pattern: str = "") -> None:
        """Load tensor by tensor with the model's own method, as verl, OpenRLHF and TRL do."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            for pair in tensors(folder, pattern):
                model.load_weights([pair])

    def wrong_slots(self, folder: str) -> int:
        """Count slots of this rank whose weights are not those of the expert in the map."""
        from vllm.distributed.parallel_state import get_ep_group

        (state,) = self.model_runner.eplb_state.model_states.values()
        local = state.model.num_local_physical_experts
        first = get_ep_group().rank_in_group * local
        experts: dict[int, dict[int, torch.Tensor]] = {}
        for name, tensor in tensors(folder, r"experts\.\d+\.down_proj"):
            layer, expert = map(int, EXPERT.search(name).groups())
            experts.setdefault(layer, {})[expert] = tensor
        wrong = 0
        for number, layer in enumerate(sorted(experts)):
            shape = (local, *experts[layer][0].shape)
            (down,) = (of for of in state.model.expert_weights[number] if self._is(of, shape))
            for slot, expert in enumerate(
                state.physical_to_logical_map[number, first : first + local].tolist()
            ):
                wrong += not torch.equal(down[slot].reshape(shape[1:]), experts[layer][expert])
        return wrong

    @staticmethod
    def _is(weight: torch.Tensor, shape: tuple[int, ...]) -> bool:
        """Whether this is the weight of so many experts: vLLM flattens them."""
        return len(weight) == shape[0] and weight[0].numel() == math.prod(shape[1:])

    def lose_all(self) -> None:
        """Lose what a sleep of level 2 discards on a GPU, and bring back what the plugin keeps."""
        from moetuner.plugins.log import Log
        from moetuner.plugins.updates import MAPS, bring_maps, keep_maps

        keep_maps(self, Log(logging.getLogger("vllm.moetuner")))
        with torch.no_grad():
            for parameter in self.model_runner.get_model().parameters():
                parameter.zero_()
        with torch.inference_mode():  # Some were made while the engine served.
            for state in self.model_runner.eplb_state.model_states.values():
                for name in MAPS:
                    getattr(state, name).zero_()
        bring_maps(self)


def register() -> None:
    """Make the transfer engine `disk` known, once."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import reload

    @dataclass
    class Start(WeightTransferInitInfo):
        """Nothing to agree on."""

    @dataclass
    class Part(WeightTransferUpdateInfo):
        """The tensors of a checkpoint whose names match."""

        folder: str = ""
        pattern: str = ""

    class Disk(WeightTransferEngine):
        """Reads a checkpoint where others receive one."""

        init_info_cls, update_info_cls = Start, Part

        def init_transfer_engine(self, init_info: Start) -> None:
            """Do nothing."""

        def start_weight_update(self) -> None:
            """Begin to load layer by layer."""
            reload.initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            """Put in force what was loaded."""
            reload.finalize_layerwise_reload(self.model, self.model_config)

        def update_weights(self, update_info: dict[str, str]) -> None:
            """Load one part; vLLM's own would wait for a GPU as well."""
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Part) -> None:
            """Load one part."""
            self.model.load_weights(tensors(update_info.folder, update_info.pattern))

        def shutdown(self) -> None:
            """Do nothing."""

    WeightTransferEngineFactory.register_engine("disk", Disk)
