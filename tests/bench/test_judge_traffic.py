"""What SimGrid is given is what evaluate counts; what it says is what links allow."""

from xml.etree import ElementTree

import judge_traffic as judge
import make
import numpy as np
import pytest

import moetuner as mt

TOPOLOGY = mt.Topology(8, tiers=(mt.Tier(4, 400e9, 1e-6), mt.Tier(8, 50e9, 5e-6)))
MODEL = mt.CostModel(0, 0, 0, 0, 2880, combine_bytes=5760)


@pytest.fixture(scope="module")
def trace() -> mt.RoutingTrace:
    return make.trace(256, 3, experts=16, labelled=False)


def test_bytes_are_rows_of_tokens_from_their_homes(trace):
    """Every token sends one row to each distinct device of its experts but its own."""
    placement = judge.placements(trace, TOPOLOGY)["random"]
    out, back = judge.exchanged(placement, trace, MODEL)
    expected = np.zeros((3, 8, 8))
    device_of = placement.device_of
    for token, layers in enumerate(trace.expert_ids):
        for layer, experts in enumerate(layers):
            for device in set(device_of[layer, experts]) - {token // 32}:
                expected[layer, token // 32, device] += 2880
    assert np.array_equal(out, expected)
    assert np.array_equal(back, 2 * expected.swapaxes(1, 2))
    evaluated = mt.evaluate(placement, trace, TOPOLOGY, home="blocks", window=None)
    assert out.sum() == 2880 * evaluated.traffic["dispatch"].sum()


def test_windows_are_parts_of_the_trace(trace):
    """The first and the last window begin and end the trace."""
    first, last = judge.windows(trace, 100, 2)
    assert np.array_equal(first.expert_ids, trace.expert_ids[:100])
    assert np.array_equal(last.expert_ids, trace.expert_ids[-100:])
    assert [window.tokens for window in judge.windows(trace, 1000, 1)] == [256]


def test_a_route_has_the_latency_and_the_bandwidth_of_its_tier():
    """Of every pair of devices, in SimGrid's own format."""
    zone = ElementTree.fromstring(judge.platform(TOPOLOGY)).find("zone")
    links = {link.get("id"): link for link in zone.iter("link")}
    assert len(zone.findall("route")) == 8 * 7
    for route in zone.iter("route"):
        a, b = int(route.get("src")), int(route.get("dst"))
        used = [links[part.get("id")] for part in route]
        assert [link.get("id")[-2:] for link in used] == [f"-{a}", f"-{b}"]
        latency = sum(float(link.get("latency")[:-1]) for link in used)
        assert latency == pytest.approx(TOPOLOGY.latency[a, b])
        assert {link.get("bandwidth") for link in used} == {f"{TOPOLOGY.bandwidth[a, b]:.0f}Bps"}


def test_simgrid_takes_as_long_as_the_busiest_port():
    """On one tier, where flows of a device share its port; two exchanges are timed apart."""
    pytest.importorskip("simgrid", reason="SimGrid is not installed")
    one = np.zeros((8, 8))
    one[0, 4] = one[1, 4] = 1e6
    seconds = judge.simulated(TOPOLOGY, [one, 3 * one], judge.FABRICS["RDMA"][0])
    assert seconds == pytest.approx([5e-6 + 2e6 / 50e9, 5e-6 + 6e6 / 50e9], rel=1e-6)
    default = judge.simulated(TOPOLOGY, [one], judge.FABRICS["default"][0])
    told = judge.told(TOPOLOGY, *judge.FABRICS["default"][1]).levels[1]
    assert default == pytest.approx([told.latency + 2e6 / told.bandwidth], rel=1e-6)
