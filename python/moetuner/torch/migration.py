"""Migration: put another placement in force on all ranks, or on none.

First the weights of all layers that change arrive in spare buffers, one layer after the other. Only
when every rank has said that all of its own are there does any rank copy them into their slots and
route to them. Should a rank be lost between those two, the next step's headers stop the others
before they send a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from moetuner.placement import Placement
from moetuner.torch.agreement import Agreement, NoRoomError, fingerprint
from moetuner.torch.expert_parallel import ExpertParallelMoE
from moetuner.torch.transfer import Spares, moves


def migrate(
    layers: Sequence[ExpertParallelMoE],
    target: Placement,
    *,
    agreement: Agreement,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Move weights and switch; every rank calls it between two steps, with the same target.

    Parameters
    ----------
    layers
        The layers of this rank, by number.
    target
        The placement to be; the same sizes as the one in force.
    agreement
        Channel of the same ranks.
    group
        The ranks, for the weights.

    Raises
    ------
    ValueError
        If the target has other sizes.
    MoveError
        On every rank that is left, if one fails, differs or is lost; no layer has switched.
        ``NoRoomError`` if a rank has no memory for what would arrive, so a part may fit. After
        a loss the group cannot be used any more, after other failures it can.
    """
    current = layers[0].placement
    if (target.num_experts, target.slots.shape) != (current.num_experts, current.slots.shape):
        raise ValueError(
            f"target must have {current.num_experts} experts and slots "
            f"{list(current.slots.shape)} like the placement in force, "
            f"got {target.num_experts} and {list(target.slots.shape)}"
        )
    spares: list[Spares] = []
    plan = fingerprint(current.slots.tobytes(), target.slots.tobytes())
    try:
        for number, layer in enumerate(layers):
            steps = moves(current.slots[number], target.slots[number], layer.devices_per_node)
            spares.append(Spares(layer.experts.weights(), steps, layer.rank))
    except Exception as error:
        # The others must not wait for this rank's weights.
        agreement.reach("room for a move", plan, error, NoRoomError)
    agreement.reach("room for a move", plan, kind=NoRoomError)
    for number, spare in enumerate(spares):
        if not spare.plan:
            continue
        failure = None
        try:
            spare.fill(group, agreement.timeout.total_seconds())
        except Exception as error:
            failure = error
        agreement.reach(f"the weights of layer {number}", plan, failure)
    for layer, spare in zip(layers, spares, strict=True):
        spare.put(layer.experts.weights())
        layer.switch(target)
