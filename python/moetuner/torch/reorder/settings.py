"""Read what a model's configuration says about the order of its experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetuner._checks import whole_number
from moetuner.router_groups import check_whole, count_groups
from moetuner.torch.models import SIZE_NAMES
from moetuner.torch.reorder.plan import Order

Config = Any
"""Settings as ``config.json`` has them, or a configuration of transformers; None if unknown."""

SIZES, LAYERS = (*SIZE_NAMES, "moe_num_experts"), ("num_hidden_layers", "num_layers")

# Settings of stored weights: their groups are not those of routers.
STORED = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a configuration that matter to the order of experts.

    Attributes
    ----------
    groups
        Numbers of groups among which routers choose first.
    hidden_layers
        Layers of the language model, dense ones included; None if the configuration has no number.
    """

    groups: tuple[int, ...] = ()
    hidden_layers: int | None = None

    def check_order(self, order: Order) -> None:
        """Raise unless an order [L,E] keeps the groups of every layer whole."""
        for groups in self.groups:
            for layer, positions in enumerate(order):
                check_whole(positions, groups, f"layer {layer}")


def read_settings(config: Config, names: Iterable[str]) -> ModelSettings:
    """Read a configuration and those within it; any of them may be the one with the experts.

    ``names`` of tensors may show that a configuration is needed.
    """
    if config is None:
        if any(name.endswith("e_score_correction_bias") for name in names):
            raise ValueError(
                "config is needed: a router with e_score_correction_bias may be limited to groups "
                "(config={'n_group': 1} if it is not)"
            )
        return ModelSettings()
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise TypeError(f"config must be a configuration or its settings, got {type(config)}")
    models = list(_list_nested(fields))
    # Files leave out defaults of a model within another one.
    configurations = [make_configuration(model) for model in models if "model_type" in model]
    models += [
        model
        for configuration in configurations
        if configuration is not None
        for model in _list_configurations(configuration)
    ]
    groups = {count_groups(model) for model in models} - {1}
    with_experts = [model for model in models if any(model.get(name) for name in SIZES)]
    layers = (model.get(name) for model in (*with_experts, *models) for name in LAYERS)
    hidden = (whole_number("config's num_hidden_layers", n) for n in layers if n is not None)
    return ModelSettings(tuple(sorted(groups)), next(hidden, None))


def make_configuration(fields: Mapping[str, Any]) -> Any:
    """Return the configuration of transformers with these settings; None if it has none."""
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    kind = str(fields.get("model_type"))
    models = [getattr(transformers, str(name), None) for name in fields.get("architectures") or ()]
    kinds = [getattr(model, "config_class", None) for model in models]
    kinds += [CONFIG_MAPPING[kind]] if kind in CONFIG_MAPPING else []
    with _quiet(transformers):
        for configuration in kinds:
            try:
                if configuration is not None and configuration.model_type == kind:
                    return configuration.from_dict(_decode(fields))
            except Exception:  # code of others may have other settings by the same name
                continue
    return None


def make_empty_model(config: Config) -> Any:
    """Return the model of transformers with this configuration, on the meta device."""
    full = config if hasattr(config, "to_dict") else make_configuration(config)
    model_class = None if full is None else _find_class(full)
    if model_class is None:
        raise ValueError(
            "names is needed, the names of all tensors of the checkpoint: this transformers has no "
            "model for config"
        )
    import transformers

    with _quiet(transformers), torch.device("meta"):
        model: nn.Module = model_class(full)
    return model


def _decode(value: Any) -> Any:
    """Return settings with numbers that JSON does not have, such as infinity, decoded."""
    if isinstance(value, Mapping):
        is_number = value.keys() == {"__float__"}
        return float(value["__float__"]) if is_number else {k: _decode(v) for k, v in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _find_class(config: Any) -> Any:
    """Return the class of a model; None if transformers has none."""
    import transformers

    library: Any = transformers
    for name in getattr(config, "architectures", None) or ():
        if (model_class := getattr(library, str(name), None)) is not None:
            return model_class
    for kind in ("CausalLM", "ImageTextToText", "Seq2SeqLM", ""):
        name = f"AutoModelFor{kind}" if kind else "AutoModel"
        mapping = getattr(library, name)._model_mapping
        if type(config) in mapping:
            model_class = mapping[type(config)]
            return model_class[0] if isinstance(model_class, tuple) else model_class
    return None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence what transformers logs about configurations."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _list_nested(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield settings and those within them."""
    yield fields
    for name, value in fields.items():
        if isinstance(value, Mapping) and name not in STORED:
            yield from _list_nested(value)


def _list_configurations(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield settings by all their names, and those of the models within."""
    fields = config.to_dict()
    names = dict(config.attribute_map)
    yield fields | {name: fields[real] for name, real in names.items() if real in fields}
    for name in config.sub_configs:
        if hasattr(model := getattr(config, name, None), "to_dict"):
            yield from _list_configurations(model)
