"""Serving: how a model is served, as one value whose fields are each declared once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from moetuner import cost
from moetuner._checks import (
    ArgumentError,
    flag,
    instance,
    one_of,
    positive,
    whole_number,
    window_in,
)
from moetuner._texts import clean
from moetuner.cost import CostModel, cost_model_of, top_k_of
from moetuner.files.cells import counted, digits, percent
from moetuner.frozen import Frozen
from moetuner.placement import Placement
from moetuner.recording import Recording
from moetuner.serving import phases as phase
from moetuner.serving.arrival import Arrival, read_arrival, share_mixed
from moetuner.serving.engines import ENGINES
from moetuner.serving.phases import Phases
from moetuner.serving.regimes import WAYS, Way
from moetuner.serving.settings import ENGINE, GOAL, MACHINE, check_settings, setting
from moetuner.serving.splits import RULES, SPLITS, Rule, Split
from moetuner.statistics import WINDOW, RoutingStatistics, check_recording
from moetuner.topology import Regime, Topology, from_keys

# Where the value of a setting comes from.
Origin = Literal["option", "engine", "placement", "default"]


def _check_cost_model(name: str, value: object) -> None:
    instance(name, value, CostModel, hint=", such as CostModel.preset('h100')")


def _write_arrival(value: Any) -> str:
    """Write the order of traffic, or the weight of mixed windows."""
    if not isinstance(value, str):
        return f"{percent(value)} mixed, the rest as recorded"
    words = {"bursts": "as recorded", "mixed": "many sequences at once, mixed by chance"}
    return words[value]


def _write_phases(value: Mapping[Any, float]) -> str:
    """Write the sizes of windows and their shares of the time."""
    shares = {None if key in (None, "None") else int(key): share for key, share in value.items()}
    return phase.describe(shares)


@dataclass(frozen=True, eq=False, repr=False)
class Serving(Frozen):
    """How a model is served: machine, engine, and the settings that decide where tokens go.

    Every field has a value: a setting that nobody gives has the engine's, the placement's or the
    default value, see ``Serving.resolve``. From a field's declaration follow its option, help and
    check, whether an engine decides it, and how placements' files and pages write it.

    Parameters
    ----------
    topology
        The devices and links.
    engine
        The engine that serves the model, of ``ENGINES``; None if unknown.
    regime
        Path of tokens after a layer. dispatch: they return to their home device, as in today's
        engines, so co-activation saves traffic. follow: they move on to the next expert, as in the
        paper, so transitions cost.
    split
        Rule that splits tokens over an expert's copies: a row of ``moetuner.serving.splits.RULES``.
    arrival
        Order in which traffic arrives: windows as recorded (bursts), windows of many sequences at
        once (mixed), or both: a number from 0 to 1 is the weight of mixed windows.
    cost_model
        Cost model of a layer's time. By default an H100 and the experts of INPUT's model, or of
        DeepSeek-V3 if INPUT's are unknown.
    window
        Tokens whose load is balanced together; None for all at once, or for the windows that counts
        bring.
    phases
        Shares of the serving time, by tokens of a window; None for the windows' own.
    waterfill
        Work of a token's shared expert in that of a routed one, such as 1, where the dispatcher
        gives it to devices that wait.
    top_k
        Routed experts of a token, which ``waterfill`` needs; None if unknown.
    is_ordered
        True if the traffic has an order of arrival: counts have none.
    origin
        Where the value of each setting comes from, by name; defaults are left out.

    Examples
    --------
    >>> import moetuner as mt
    >>> mt.Serving(mt.Topology(8), engine="sglang", split="nearest").split
    'nearest'
    """

    topology: Topology
    _: KW_ONLY
    engine: str | None = None
    regime: Regime = setting(
        "dispatch",
        ENGINE,
        "dispatch; follow for traffic if INPUT has only counts of transitions",
        choices=get_args(Regime),
        by_engine=True,
        label="After a layer, tokens",
        words={name: way.words for name, way in WAYS.items()},
    )
    split: Split = setting(
        "even",
        ENGINE,
        "the engine's, else even",
        choices=SPLITS,
        help="How tokens are split over an expert's copies: "
        f"{', '.join(rule.option_help for rule in RULES.values())}.",
        by_engine=True,
        label="A token's copy of an expert",
        words={name: rule.words for name, rule in RULES.items()},
    )
    arrival: Arrival = setting(
        "bursts",
        GOAL,
        "the engine's, else bursts",
        read=read_arrival,
        metavar="bursts|mixed|W",
        check=lambda _, value: share_mixed(value),
        by_engine=True,
        label="Order of tokens",
        words=_write_arrival,
    )
    cost_model: CostModel | None = setting(
        None,
        MACHINE,
        metavar="FILE|GPU|GPU:HIDDENxINTERMEDIATE",
        check=_check_cost_model,
        to_json=asdict,
        from_json=cost.from_keys,
        label="Times predicted for",
        words=lambda value: clean(str(value.get("name") if isinstance(value, Mapping) else value)),
    )
    window: int | None = WINDOW
    phases: Phases | None = setting(
        None,
        GOAL,
        f"{phase.PREFILL_SHARE:g} for a trace, without --window",
        read=phase.read_prefill_share,
        usual=phase.PREFILL_SHARE,
        flag="--prefill-share",
        metavar="SHARE",
        help="Share of the serving time that is prefill (windows of "
        f"{phase.WINDOWS[1]:,} tokens); the rest is decode ({phase.WINDOWS[0]}).",
        check=lambda _, value: phase.check_phases(value),
        from_json=phase.from_keys,
        label="Placed for",
        words=_write_phases,
    )
    waterfill: float | None = setting(
        None,
        ENGINE,
        metavar="SHARE",
        above=0,
        check=positive,
        label="Given to devices that wait",
        words=lambda value: (
            f"the shared expert's tokens, each {digits(value)} of a routed one's work"
        ),
    )
    top_k: int | None = None
    is_ordered: bool = field(default=True, compare=False)
    origin: Mapping[str, Origin] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        instance("topology", self.topology, Topology, hint=", such as Topology(devices=8)")
        if self.engine is not None:
            one_of("engine", self.engine, ENGINES)
        vars(self)["window"] = window_in(self.window)
        if self.top_k is not None:
            vars(self)["top_k"] = whole_number("top_k", self.top_k)
        flag("is_ordered", self.is_ordered)
        instance("origin", self.origin, Mapping, hint=" of settings, by name")
        check_settings(self)
        if self.phases is not None:
            vars(self)["phases"] = phase.check_phases(self.phases)
        if self.waterfill is not None and self.top_k is None:
            raise ArgumentError(
                "waterfill needs traffic that tells experts per token: a trace, or counts that "
                "name their model, such as 'deepseek-v3'",
                "waterfill",
            )

    @property
    def way(self) -> Way:
        """The way of tokens in the regime."""
        return WAYS[self.regime]

    @property
    def rule(self) -> Rule:
        """The rule of the split."""
        return RULES[self.split]

    @property
    def shared_expert_ratio(self) -> float | None:
        """Work of the shared expert per work of a token's routed ones; None without waterfill."""
        return None if self.waterfill is None else self.waterfill / (self.top_k or 1)

    @classmethod
    def resolve(
        cls,
        topology: Topology,
        traffic: Recording,
        *,
        options: Mapping[str, Any] | None = None,
        engine: str | None = None,
        recorded: Mapping[str, Any] | None = None,
        weight_bits: float | None = None,
        **facts: Any,
    ) -> Serving:
        """Return how traffic is served, with each setting from the first source that has it.

        The sources are the options, the engine of an option, the placement, the placement's engine,
        and the defaults.

        Parameters
        ----------
        topology
            The devices and links.
        traffic
            The traffic. Counts have no order of arrival that an engine could decide.
        options
            Settings that were given, by name.
        engine
            Engine that an option names.
        recorded
            Settings that a placement's file chose, see ``find_choices``.
        weight_bits
            Bits of an expert's weight, for the default cost model.
        facts
            Other fields: ``window``, ``phases``, ``waterfill``, ``top_k``.
        """
        check_recording(traffic)
        options = {} if options is None else options
        recorded = {} if recorded is None else recorded
        for name, values in (("options", options), ("recorded", recorded)):
            instance(name, values, Mapping, hint=" of settings, by name")
        if engine is not None:
            one_of("engine", engine, ENGINES)
        serving_engine = engine or recorded.get("engine")
        is_ordered = traffic.ordered
        sources: list[tuple[Origin, Mapping[str, Any]]] = [
            ("option", options),
            ("engine", get_engine_defaults(engine, is_ordered=is_ordered)),
            ("placement", recorded),
            ("engine", get_engine_defaults(serving_engine, is_ordered=is_ordered)),
        ]
        chosen: dict[str, Any] = {}
        origin: dict[str, Origin] = {}
        for name in (*ENGINE_SETTINGS, "cost_model"):
            for source, settings in sources:
                if name in settings:
                    chosen[name], origin[name] = settings[name], source
                    break
        if "cost_model" not in chosen:
            chosen["cost_model"] = cost_model_of(traffic, weight_bits=weight_bits)
        if facts.get("waterfill") is not None:
            facts["top_k"] = find_top_k(traffic, facts.get("top_k"))
        chosen |= {"engine": serving_engine, "is_ordered": is_ordered, "origin": origin}
        return cls(topology, **chosen, **facts)

    def chosen(self, name: str) -> Any:
        """Return the value of a setting if an option or the placement gave it, else None."""
        one_of("name", name, [field.name for field in fields(self)])
        is_chosen = self.origin.get(name) in ("option", "placement")
        return getattr(self, name) if is_chosen else None

    def facts(self) -> dict[str, Any]:
        """Return the machine and the settings that engines decide, for JSON."""
        machine = {name: getattr(self.topology, name) for name in ("devices", "devices_per_node")}
        machine |= {"topology": self.topology.name, "engine": self.engine}
        model = None if self.cost_model is None else asdict(self.cost_model)
        return machine | {
            "cost_model": model,
            **{name: getattr(self, name) for name in ENGINE_SETTINGS},
        }

    def explain(self, remarks: Sequence[str] = ()) -> list[str]:
        """Write a line on the settings, by their origin; none without an engine."""
        if self.engine is None:
            return []
        engine = ENGINES[self.engine]
        texts = {name: f"{name} {getattr(self, name)}" for name in ENGINE_SETTINGS}
        if not engine.may_copy:
            del texts["split"]
        elif self.origin.get("split") == "engine":
            texts["split"] += f" ({engine.how_split})"
        if not self.is_ordered and "arrival" not in self.origin:
            texts["arrival"] += " (windows of counts, as recorded)"
        by_origin: dict[Origin, list[str]] = {"option": [], "placement": [], "engine": []}
        for name, text in texts.items():
            origin = self.origin.get(name, "default")
            by_origin["engine" if origin == "default" else origin].append(text)
        line = f"For {engine.title}: {', '.join([*by_origin['engine'], *remarks])}"
        if by_origin["option"]:
            line += f"; from your options: {', '.join(by_origin['option'])}"
        if by_origin["placement"]:
            line += f"; from the placement: {', '.join(by_origin['placement'])}"
        return [f"{line}."]

    def differences(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yield the settings that differ from a placement's: name, value then, and value now."""
        instance("settings", settings, Mapping, hint=" of a placement")
        topology = settings.get("topology", self.topology)
        if topology != self.topology:
            then, now = describe_machine(topology), describe_machine(self.topology)
            yield "machine", then, (now if now != then else "of other links")
        if settings.get("engine") in ENGINES and settings["engine"] != self.engine:
            yield "engine", _get_title(settings["engine"]), _get_title(self.engine)
        for name in ENGINE_SETTINGS:
            value = getattr(self, name)
            if settings.get(name, value) != value:
                yield name, str(settings[name]), str(value)
        model = settings.get("cost_model")
        if model is not None and self.cost_model is not None and model != self.cost_model:
            yield "cost model", model.name or "unnamed", self.cost_model.name or "unnamed"


# Settings that an engine decides unless an option does.
ENGINE_SETTINGS = tuple(
    declared.name for declared in fields(Serving) if declared.metadata.get("by_engine")
)
DEFAULTS = {declared.name: declared.default for declared in fields(Serving) if declared.metadata}


def get_engine_defaults(engine: str | None, *, is_ordered: bool = True) -> dict[str, Any]:
    """Return the settings that an engine decides, without ``arrival`` for traffic without order."""
    if engine is None:
        return {}
    names = [name for name in ENGINE_SETTINGS if is_ordered or name != "arrival"]
    return {name: getattr(ENGINES[engine], name, DEFAULTS[name]) for name in names}


def find_choices(settings: Mapping[str, Any], *, is_counted: bool = False) -> dict[str, Any]:
    """Return a placement's settings of serving that differ from the defaults of its engine.

    For counts the default arrival is no choice: their windows always come as recorded.
    """
    names = ["cost_model", *ENGINE_SETTINGS]
    engine = settings.get("engine")
    if engine is not None:
        one_of("settings: engine", engine, ENGINES)
        names.append("engine")
    if is_counted and settings.get("arrival") == DEFAULTS["arrival"]:
        names.remove("arrival")
    by_engine = get_engine_defaults(engine)
    return {
        name: settings[name]
        for name in names
        if name in settings and settings[name] != by_engine.get(name, DEFAULTS.get(name))
    }


def _get_title(engine: str | None) -> str:
    return "none" if engine is None else ENGINES[engine].title


def describe_machine(machine: Topology) -> str:
    """Write the size of a machine, and its name."""
    name = f" ({machine.name})" if machine.name else ""
    devices = counted(machine.node_size, "device")
    if not machine.has_equal_nodes:
        devices = f"{min(machine.node_sizes)} to {devices}"
    return f"{counted(machine.nodes, 'node')} of {devices}{name}"


def find_top_k(traffic: Recording, top_k: int | None = None) -> int | None:
    """Return the routed experts of a token: from sets, the argument, the recording or its model."""
    if isinstance(traffic, RoutingStatistics) and traffic.sets is not None:
        return int(traffic.sets[0].top_k)
    return top_k or top_k_of(traffic)


def find_machine(placement: Placement, machine: Topology | None) -> Topology:
    """Return the given topology, else the placement's, else one node of its devices."""
    instance("placement", placement, Placement)
    if machine is None:
        try:
            return from_keys(placement.settings.get("topology") or {"devices": placement.devices})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"placement: settings: topology: {error}") from None
    instance("topology", machine, Topology, hint=", such as Topology(devices=8)")
    return machine


def refuse_keywords(**keywords: Any) -> None:
    """Raise for a keyword that is given beside a serving, unless it has its default."""
    defaults = {field.name: field.default for field in fields(Serving)}
    for name, value in keywords.items():
        if value is not None and value != defaults[name]:
            raise ArgumentError(f"{name} must be in the serving, or give a topology", name)


def make_serving(
    traffic: Recording,
    machine: Topology | Serving | None,
    placement: Placement | None = None,
    *,
    cost_model: CostModel | str | None = "model",
    **settings: Any,
) -> Serving:
    """Return how traffic is served, from the arguments of a public call.

    Parameters
    ----------
    traffic
        The traffic, whose model decides the cost model "model".
    machine
        The topology, to which keywords add the other settings; or a serving, without keywords.
    placement
        Gives the topology if ``machine`` is None.
    cost_model, settings
        Fields of ``Serving``, as keywords.
    """
    if placement is not None:
        instance("placement", placement, Placement)
    if isinstance(machine, Serving):
        refuse_keywords(cost_model=None if cost_model == "model" else cost_model, **settings)
        return machine
    topology = machine if placement is None else find_machine(placement, machine)
    check_recording(traffic)
    if isinstance(cost_model, str) and cost_model == "model":
        cost_model = cost_model_of(traffic)
    if settings.get("waterfill") is not None:
        positive("waterfill", settings["waterfill"])
        settings.setdefault("top_k", find_top_k(traffic))
    return Serving(
        topology,  # type: ignore[arg-type]  # Serving checks it
        cost_model=cost_model,  # type: ignore[arg-type]
        is_ordered=traffic.ordered,
        **settings,
    )
