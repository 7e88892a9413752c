"""Options that say how traffic is served: by which engine, or point by point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import click

from moetuner.cli import options
from moetuner.cli.options.machine import cost_model_for, parse_cost_model
from moetuner.cli.options.traffic import Traffic
from moetuner.cost import CostModel
from moetuner.evaluation.arrival import share_mixed
from moetuner.evaluation.copies import SPLITS
from moetuner.formats.engines import ENGINES
from moetuner.presets import GPUS
from moetuner.topology import Topology

Value = TypeVar("Value")

# What is served where neither an option nor an engine says it.
DEFAULTS = {"regime": "dispatch", "split": "even", "arrival": "bursts"}


@dataclass(frozen=True)
class Serving:
    """How traffic is served, as far as options say it; what they do not say is the engine's."""

    engine: str | None = None
    cost_model: CostModel | str | None = None
    regime: Any = None
    split: Any = None
    arrival: Any = None

    @property
    def is_given(self) -> bool:
        """Whether any option says it."""
        return any(getattr(self, each.name) is not None for each in fields(self))

    def value(self, name: str) -> Any:
        """Return the regime, split or arrival: the one given, else the engine's, else a default."""
        given = getattr(self, name)
        if given is not None:
            return given
        return DEFAULTS[name] if self.engine is None else getattr(ENGINES[self.engine], name)

    def arguments(self, traffic: Traffic) -> dict[str, Any]:
        """Return the arguments of ``evaluate`` and ``audit`` that say the same."""
        model = cost_model_for(self.cost_model, traffic)
        return {"cost_model": model, **{name: self.value(name) for name in DEFAULTS}}

    def settings(self, topology: Topology, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return them, and the machine, for JSON."""
        model = arguments["cost_model"]
        return {
            "devices": topology.devices,
            "devices_per_node": topology.devices_per_node,
            "topology": topology.name,
            "for": self.engine,
            **arguments,
            "cost_model": None if model is None else asdict(model),
        }

    def explain(self, more: Sequence[str] = ()) -> str:
        """Write in a line what ``--for`` has set, and what it left as the user set it."""
        assert self.engine is not None
        of = ENGINES[self.engine]
        made, yours = [], []
        for name in DEFAULTS:
            if name == "split" and not of.may_copy:
                continue
            text = f"{name} {self.value(name)}"
            if getattr(self, name) is not None:
                yours.append(text)
            else:
                made.append(f"{text} ({of.how_split})" if name == "split" else text)
        line = f"For {of.title}: {', '.join([*made, *more])}"
        return line + (f"; as you said: {', '.join(yours)}." if yours else ".")


def parsed(
    parse: Callable[[str], Value], rule: str
) -> Callable[[click.Context, click.Parameter, str | None], Value | None]:
    """Make a callback that reads a value, and names the rule where it cannot."""

    def callback(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> Value | None:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError:
            raise click.BadParameter(f"must be {rule}, got '{value:.60}'") from None

    return callback


def _arrival(value: str) -> str | float:
    found: str | float = value if value in ("bursts", "mixed") else float(value)
    share_mixed(found)
    return found


# In the order of help.
serving_list = (
    click.option(
        "--for",
        "engine",
        type=click.Choice(list(ENGINES)),
        help="Engine that loads the placement. It sets regime, split and arrival where other "
        "options do not; where a placement is computed, also equal slots, all of them full.",
    ),
    click.option(
        "--cost-model",
        callback=parse_cost_model,
        shell_complete=options.completing(*GPUS, files=True),
        metavar="FILE|GPU",
        help="What time is made of: a file, or a common GPU and an expert's hidden and "
        "intermediate sizes, such as h100:4096x1024 (in 8 bits).  [default: h100; sizes of INPUT's "
        "model, else of DeepSeek-V3]",
    ),
    click.option(
        "--regime",
        type=click.Choice(["follow", "dispatch"]),
        help="What moves: tokens fan out from their home device and come back, as in today's "
        "engines (dispatch), or move on from expert to expert, as in the paper (follow).  "
        "[default: dispatch; follow for traffic where INPUT has counts of transitions alone]",
    ),
    click.option(
        "--split",
        type=click.Choice(SPLITS),
        help="How tokens are split over an expert's copies: by hash (even, vLLM), to the nearest "
        "(SGLang), or in turns (round_robin, TensorRT-LLM).  [default: even, or the engine's]",
    ),
    click.option(
        "--arrival",
        callback=parsed(_arrival, "bursts, mixed, or the weight of mixed from 0 to 1"),
        metavar="bursts|mixed|W",
        help="Windows as recorded, of many sequences at once, or both with the weight of mixed "
        "ones.  [default: bursts, or the engine's]",
    ),
)
serving_options = options.gathered("serving", Serving, serving_list)
