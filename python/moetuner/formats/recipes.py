"""Write the commands that bring a placement to an engine, and back."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from moetuner.cost import weight_bits_of
from moetuner.formats import WRITERS
from moetuner.placement import Placement
from moetuner.serving.engines import ENGINES
from moetuner.serving.recipes import Recipe


def list_serving_recipes(
    engine: str | None,
    placement: Placement,
    file: str | Path = "placement.json",
    *,
    nodes: int = 1,
    split: str | None = None,
    hidden_layers: str = "N",
    dense_layers: str = "A-B",
    note: str = "",
    model: str | None = None,
) -> list[Recipe]:
    """Return the commands that export the placement of a file to an engine, and serve it there.

    ``hidden_layers`` and ``dense_layers`` are texts for the options of export; ``note`` says where
    they are guessed. The command tells an engine to split tokens as the placement assumes, if the
    engine can.
    """
    export = ("moetuner", "export", str(file), "--to")
    if engine is None:
        return [Recipe((*export, "eplb", "--out", "experts.npz"))]
    layers = {"hidden_layers": hidden_layers, "dense_layers": dense_layers}
    recipes = []
    for name, writer in WRITERS.items():
        if writer.engine == engine:
            hints = [("--" + hint.replace("_", "-"), layers[hint]) for hint in writer.hints]
            words = (name, *chain(*hints), "--out", f"experts{writer.suffixes[0]}")
            recipes.append(Recipe((*export, *words), note if hints else ""))
    capabilities = ENGINES[engine]
    if capabilities.serve:
        slots = placement.devices * placement.slots_per_device
        serve = capabilities.make_serve_recipe(
            placement.devices,
            slots - placement.num_experts,
            placement=str(file),
            model=model or "MODEL",
            nodes=nodes,
            split=split,
            bits=weight_bits_of(model or placement.model),
        )
        recipes.append(serve)
    if capabilities.renumbers:
        words = (engine, "--checkpoint", "MODEL", "--out", "MODEL-placed")
        recipes.append(Recipe((*export, *words)))
    return recipes


def find_way_back(engine: str | None) -> str:
    """Return how an engine is started without its placement again."""
    return "start the engine without the map" if engine is None else ENGINES[engine].go_back
