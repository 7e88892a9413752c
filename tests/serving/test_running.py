"""What runs, by its name: the slots that its experts and redundant ones take."""

import pytest

from moetuner._checks import ArgumentError
from moetuner.serving.running import Running


@pytest.mark.parametrize(
    ("name", "slots"), [("contiguous", 3), ("round_robin", 3), ("eplb:2", 3), ("eplb:6", 4)]
)
def test_slots_hold_every_expert_and_the_redundant_ones(name, slots):
    """Ten experts, and redundant ones, on four devices, of which the last may have empty slots."""
    assert Running.parse(name).count_slots(10, 4) == slots


@pytest.mark.parametrize(("name", "nearest"), [("eplb", 2), ("eplb:3", 6)])
def test_redundant_experts_fill_all_devices(name, nearest):
    """Others are refused, by their name and with the next number that fills the devices."""
    with pytest.raises(ArgumentError, match=f"^initial {name} must.*; eplb:{nearest} would do$"):
        Running.parse(name).count_slots(10, 4)
