"""Serving: how a model is served. One value, whose fields are declared once for all who ask."""

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
from moetuner.serving.settings import ENGINE, GOAL, MACHINE, check_settings, setting
from moetuner.serving.splits import RULES, SPLITS, Rule, Split
from moetuner.statistics import WINDOW, RoutingStatistics, check_recording
from moetuner.topology import Regime, Topology, from_keys

# What says a setting.
Origin = Literal["option", "engine", "placement", "default"]


def _check_cost_model(name: str, value: object) -> None:
    instance(name, value, CostModel, hint=", such as CostModel.preset('h100')")


def _write_arrival(value: Any) -> str:
    """Write the order of traffic, or the weight of mixed windows."""
    words = {"bursts": "as recorded", "mixed": "many sequences at once, mixed by chance"}
    return (
        words[value] if isinstance(value, str) else f"{percent(value)} mixed, the rest as recorded"
    )


def _write_phases(value: Mapping[Any, float]) -> str:
    """Write the shares of the windows that a placement is for."""
    shares = {None if key in (None, "None") else int(key): share for key, share in value.items()}
    return phase.describe(shares)


@dataclass(frozen=True, eq=False, repr=False)
class Serving(Frozen):
    """How a model is served: on which machine, by which engine, and what that does to tokens.

    It is definite: what nobody gave is the engine's, the placement's or the default, see
    ``Serving.resolve``. A field is declared here alone. Its option and help, its check, what an
    engine decides, how a placement's file and a page have it, and how it may differ from what a
    placement was computed for, all come of the declaration.

    Parameters
    ----------
    topology
        The devices and links.
    engine
        Who serves the model, of ``ENGINES``; None where nobody says it.
    regime
        What tokens do after a layer. dispatch: they return to their home device, as in today's
        engines, so co-activation saves traffic. follow: they move on to the next expert, as in the
        paper, so transitions cost.
    split
        How tokens are split over an expert's copies: a row of ``moetuner.serving.splits.RULES``.
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
        Routed experts of a token, which ``waterfill`` needs; None where not known.
    is_ordered
        Whether the traffic has an order of arrival: counts have none.
    origin
        What said a setting, by its name; defaults are not in it.

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
        words={"dispatch": "go home", "follow": "go on to the next expert"},
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
    def rule(self) -> Rule:
        """What the split does."""
        return RULES[self.split]

    @property
    def shared_expert_ratio(self) -> float | None:
        """Work of a token's shared expert in that of its routed ones; None without waterfill."""
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
        """Return how traffic is served, by the first of these that says it.

        That is an option, the engine of an option, the placement, its engine, or the default.

        Parameters
        ----------
        topology
            The devices and links.
        traffic
            What is served. Counts have no order of arrival that an engine could decide.
        options
            Settings that were given, by name.
        engine
            Who serves the model, as an option gives it.
        recorded
            What a placement's file chose of serving, see ``find_choices``.
        weight_bits
            Bits of an expert's weight, for the cost model where nobody gives one.
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
        serves = engine or recorded.get("engine")
        is_ordered = traffic.ordered
        sources: list[tuple[Origin, Mapping[str, Any]]] = [
            ("option", options),
            ("engine", get_engine_defaults(engine, is_ordered=is_ordered)),
            ("placement", recorded),
            ("engine", get_engine_defaults(serves, is_ordered=is_ordered)),
        ]
        chosen: dict[str, Any] = {}
        origin: dict[str, Origin] = {}
        for name in (*ENGINE_SETTINGS, "cost_model"):
            for says, known in sources:
                if name in known:
                    chosen[name], origin[name] = known[name], says
                    break
        if "cost_model" not in chosen:
            chosen["cost_model"] = cost_model_of(traffic, weight_bits=weight_bits)
        if facts.get("waterfill") is not None:
            facts["top_k"] = find_top_k(traffic, facts.get("top_k"))
        return cls(topology, engine=serves, **chosen, is_ordered=is_ordered, origin=origin, **facts)

    def chosen(self, name: str) -> Any:
        """Return a setting that an option or the placement says; None where neither does."""
        one_of("name", name, [own.name for own in fields(self)])
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

    def explain(self, more: Sequence[str] = ()) -> list[str]:
        """Write in a line what the engine decides, and who decides else; none without an engine."""
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
        said: dict[Origin, list[str]] = {"option": [], "placement": [], "engine": []}
        for name, text in texts.items():
            origin = self.origin.get(name, "default")
            said["engine" if origin == "default" else origin].append(text)
        line = f"For {engine.title}: {', '.join([*said['engine'], *more])}"
        if said["option"]:
            line += f"; from your options: {', '.join(said['option'])}"
        if said["placement"]:
            line += f"; from the placement: {', '.join(said['placement'])}"
        return [f"{line}."]

    def differences(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yield what a placement was computed for otherwise: its name, then, and now."""
        instance("settings", settings, Mapping, hint=" of a placement")
        was = settings.get("topology", self.topology)
        if was != self.topology:
            then, now = describe_machine(was), describe_machine(self.topology)
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
ENGINE_SETTINGS = tuple(own.name for own in fields(Serving) if own.metadata.get("by_engine"))
DEFAULTS = {own.name: own.default for own in fields(Serving) if own.metadata}


def get_engine_defaults(engine: str | None, *, is_ordered: bool = True) -> dict[str, Any]:
    """Return the settings that an engine decides of traffic, which may have no order of arrival."""
    if engine is None:
        return {}
    names = [name for name in ENGINE_SETTINGS if is_ordered or name != "arrival"]
    return {name: getattr(ENGINES[engine], name, DEFAULTS[name]) for name in names}


def find_choices(settings: Mapping[str, Any], *, is_counted: bool = False) -> dict[str, Any]:
    """Return what a placement's settings chose of serving, beyond what its engine decides.

    Of traffic that is counted already nobody chose that its windows come as they were recorded.
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
    return f"{counted(machine.nodes, 'node')} of {devices}{name}"


def find_top_k(traffic: Recording, top_k: int | None = None) -> int | None:
    """Return routed experts of a token: as its sets, as given, as recorded, or as its model."""
    if isinstance(traffic, RoutingStatistics) and traffic.sets is not None:
        return int(traffic.sets[0].top_k)
    return top_k or top_k_of(traffic)


def find_machine(placement: Placement, machine: Topology | None) -> Topology:
    """Return the topology if there is one, else the placement's, else one node of its devices."""
    instance("placement", placement, Placement)
    if machine is None:
        try:
            return from_keys(placement.settings.get("topology") or {"devices": placement.devices})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"placement: settings: topology: {error}") from None
    instance("topology", machine, Topology, hint=", such as Topology(devices=8)")
    return machine


def refuse_keywords(**keywords: Any) -> None:
    """Raise for a keyword beside a serving, which says it already; defaults are no keywords."""
    defaults = {own.name: own.default for own in fields(Serving)}
    for name, value in keywords.items():
        if value is not None and value != defaults[name]:
            raise ArgumentError(f"{name} must be in the serving, or give a topology", name)


def make_serving(
    traffic: Recording,
    said: Topology | Serving | None,
    placement: Placement | None = None,
    *,
    cost_model: CostModel | str | None = "model",
    **settings: Any,
) -> Serving:
    """Return how traffic is served, by what a public call was given.

    Parameters
    ----------
    traffic
        What is served: its model has the experts of the cost model "model".
    said
        The machine, for which the keywords say the rest; or all of it, without keywords.
    placement
        Has the machine where ``said`` is None.
    cost_model, settings
        Fields of ``Serving``, as keywords.
    """
    if placement is not None:
        instance("placement", placement, Placement)
    if isinstance(said, Serving):
        refuse_keywords(cost_model=None if cost_model == "model" else cost_model, **settings)
        return said
    machine = said if placement is None else find_machine(placement, said)
    if isinstance(cost_model, str) and cost_model == "model":
        check_recording(traffic)
        cost_model = cost_model_of(traffic)
    if settings.get("waterfill") is not None:
        positive("waterfill", settings["waterfill"])
        check_recording(traffic)
        settings.setdefault("top_k", find_top_k(traffic))
    return Serving(
        machine,  # type: ignore[arg-type]  # Serving checks it
        cost_model=cost_model,  # type: ignore[arg-type]
        is_ordered=traffic.ordered,
        **settings,
    )
