"""What is refused, and in which words: the argument, the rule and the value, in one line.

``test_arguments`` tries every argument with everything; here is what messages say of what is of the
right kind and wrong all the same, and of files.
"""

import json
import re
import struct
import zipfile

import numpy as np
import pytest
from make import in_turns, random_ids, trace_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import moetuner as mt
from moetuner import router_groups  # noqa: F401 - for the table
from moetuner.counting import total  # noqa: F401 - for the table
from moetuner.placement import blocks
from moetuner.plugins import rebalance_experts  # noqa: F401 - for the table
from moetuner.plugins.vllm_ascend import count_loads  # noqa: F401 - for the table

IDS = random_ids(50, 3, 2, 8)
NAN = float("nan")


def trace(ids=IDS, num_experts=8, **labels):
    """Make a trace."""
    return trace_of(ids, num_experts, **labels)


def put(token, layer, value, dtype=np.uint8):
    """Give ids of which one is another."""
    ids = IDS.astype(dtype)
    ids[token, layer, 1] = value
    return ids


def load(table, **fields):
    """Make a load table."""
    return mt.RoutingStatistics.from_load(np.asarray(table), **fields)


def problem(of=None, **rules):
    """Make a problem of six experts on four devices."""
    return mt.Problem(PAIRS if of is None else of, mt.Topology(4), **rules)


def fit(tokens, experts, times):
    """Fit a cost model."""
    return mt.CostModel.fit(tokens, experts, times, token_bytes=1)


SEQUENCES = trace(sequence=np.arange(50) // 10, group=np.arange(50) % 2, group_names=["a", "b"])
COUNTED = mt.RoutingStatistics.from_trace(SEQUENCES, sets=True)
PAIRS = mt.RoutingStatistics(np.ones((2, 3, 6), int), np.ones((2, 6, 6), int))
ONES = np.ones((1, 2, 4))
GROUPS = load([[[1] * 4], [[0] * 4]], group=[0, 1], group_names=("code", "law", "none"))
ALONE = load([[[1] * 4]], group=[0], group_names=("code",))
SETS = mt.ExpertSets([[0, 1]], [1])
TIERS = [mt.Tier(4, 2), mt.Tier(6, 1)]
WIDE = trace(np.zeros((4, 9, 1), np.uint16), 1 << 16)
NODES = mt.Topology(4, 2)
TWICE = mt.Placement([[[0, 1], [0, -1]]])
RUNS = in_turns(3, 6, 4)
WIDER = mt.Placement.from_assignment(np.tile(np.arange(6) // 3, (3, 1)), 4)

TWELVE = mt.RoutingStatistics.from_load(np.ones((2, 3, 12)))


SIXTEEN = load(np.ones((2, 3, 16)))
IN_BLOCKS = blocks(3, 8, 4)
ON_ALL_DEVICES = mt.Placement([[[*range(8)]] * 2] * 3)


def phased(phases):
    """Make a problem of windows of 512 tokens that stand for windows of other sizes."""
    return mt.Problem(load(np.full((8, 1, 8), 128), window=512), NODES, phases=phases)


def surviving(slots, survive="device"):
    """Make a problem of sixteen experts on four devices that may be lost."""
    return mt.Problem(SIXTEEN, mt.Topology(4), slots_per_device=slots, survive=survive)


def plan(traffic=(9, 1, 1, 1), **changes):
    """Plan changes of four devices with two slots each."""
    running = mt.Placement([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    return mt.plan(running, load([[traffic]]), **changes)


def rows(**options):
    """Count the rows that are sent between four devices."""
    return mt.dispatch_rows(IN_BLOCKS, SEQUENCES, **options)


def advise(traffic=SEQUENCES, **options):
    """Advise on four devices in two nodes."""
    return mt.advise(traffic, NODES, **options)


def engine(name, devices=4, **given):
    """Ask for the settings of an engine."""
    return mt.engine_settings(name, TWELVE, mt.Topology(devices), **given)


def count(*, ids=IDS, sample=None, **labels):
    """Count a trace of known sequences and groups."""
    known = {"sequence": np.arange(50) // 10, "group": np.arange(50) % 2}
    known["group_names"] = ["a", "b"]
    return mt.count(trace(ids, **{**known, **labels}), sample=sample)


def count_table(window=None, **fields):
    """Count a load table."""
    return mt.count(load([[[3, 1]], [[2, 2]]], window=window, **fields))


class Elsewhere:
    """An array of another library that numpy cannot read, as a tensor on a GPU is."""

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 tensor to numpy. Use Tensor.cpu() first.")


# A call, and what its error says.
WRONG = r"""
trace(Elsewhere()) | got an Elsewhere: can't convert cuda:0 tensor to numpy.
trace(put(7, 2, 8)) | expert_ids: token 7, layer 2: expert id 8 is not below num_experts 8
trace(put(49, 1, -1, int)) | expert_ids: token 49, layer 1: expert id -1 is negative
trace(put(3, 1, 1 << 40, int)) | token 3, layer 1: expert id 1099511627776 is not below num_experts
trace(num_experts=1) | expert_ids must have a top-k from 1 to num_experts (1), got 2
trace(IDS[:, :0]) | expert_ids must have at least one layer, got 0
trace(IDS[:, :, :0]) | top-k from 1 to num_experts (8), got 0
trace(num_experts=1 << 17) | num_experts must be from 1 to 65536, got 131072
trace(sequence=np.arange(50) << 40) | sequence must be from -2147483648
trace(group=[2] * 50, group_names=["a", "b"]) | from 0 to 1, an index into group_names, got 2 at 0
trace(group=[0] * 4 + [-1] + [0] * 45, group_names=["a", "b"]) | got -1 at 4
trace().select(groups=[0]) | the trace has no groups
trace().select(sequences=[0]) | the trace has no sequences
trace().concat(trace(IDS[:, :2])) | traces must have the same layers, experts and top_k
trace().save("a.npz") | saved as .safetensors, got .npz
mt.RoutingStatistics.from_trace(WIDE) | counts must fit 16 GiB, got
load(ONES, model="a") + load(ONES, model="b") | same model, got 'a' and 'b'
load(ONES, window=4) + load(ONES, window=8) | same window, got 4 and 8
load(ONES, window=4) + load(ONES) | same window, got 4 and None
load(ONES, expert_size=(4, 8)) + load(ONES, expert_size=(8, 4)) | expert_size, got (4, 8) and
load(ONES, group=[0], group_names=["a"]) + load(ONES) | both have groups, or none
mt.ExpertSets([[0, -1]], [1]) | ids of expert sets must be [sets, top_k] from 0 to 65535, got int64
mt.ExpertSets([[0, 1]], [1, 2]) | counts of expert sets must be whole numbers [1] like their ids
mt.ExpertSets([[0, 0]], [1]) | ids of an expert set must differ
SETS + mt.ExpertSets([[1]], [1]) | same number of experts, got 2 and 1
mt.Topology(6, 4) | devices_per_node must divide devices (6), got 4
mt.Topology(6, [4, 3]) | devices_per_node must add up to devices (6), got [4, 3]
mt.Topology(6, [6, 0]) | devices_per_node of node 1 must be from 1 to 8192, got 0
mt.Topology(6, tiers=TIERS) | each size a multiple of the one before and the last all 6 devices
mt.Topology(4, 2, tiers=TIERS[:1]) | devices_per_node must be left out where tiers are given, got 2
mt.Topology(2, link_cost=[[0, NAN], [1, 0]]) | link_cost must be finite, got nan from device 0 to 1
mt.Topology(2, link_cost=[[0, 1], [-1, 0]]) | must be at least 0, got -1 from device 1 to 0
mt.Topology(2, link_cost=[[0, 1], [1, 2]]) | must be 0 from a device to itself, got 2 from device 1
mt.Topology(2, link_cost=[[0, 1], [2, 0]]) | in both directions, got 1 from device 0 to 1 and 2 back
mt.Topology(2, link_cost=[[0, 0], [0, 0]]) | link_cost must be above 0 for some pair of devices
fit([1, 2, 3], [1, 1, 1], [1, 2, 3]) | fit needs at least 8 different pairs of tokens and experts
fit([1, 2, 3, 4], [1, 1, 1], [1, 2, 3]) | must be [n] each, got [[4], [3]
fit([1, 2, 3, -4], [1] * 4, [1] * 4) | tokens must be from 0 to 1e+30, got -4.0 at 3
fit([1] * 4, [1] * 4, [1, 0, 1, 1]) | microseconds must be from 1e-30 to 1e+30, got 0.0 at 1
mt.Placement([[[0, 1], [2, 2]]]) | layer 0, device 1: expert 2 has two slots
mt.Placement([[[0, 1], [2, 3]], [[0, 1], [2, -1]]]) | layer 1: expert 3 has no slot
mt.Placement([[[0, 1], [2, -2]]]) | layer 0, device 1: expert id -2
TWICE.device_of | this placement has replicas
TWICE.diff(TWICE, topology=NODES) | topology must have 2 devices like the placements, got 4
TWICE.diff(mt.Placement([[[0, 1]]])) | same layers, devices and experts, got (1, 2, 2) and (1, 1, 2)
problem(slots_per_device=1) | slots_per_device must be at least 2 for 6 experts on 4 devices, got 1
problem(slots_per_device=[1, 1, 1, 1]) | must add up to at least 6, a slot for each expert, got 4
problem(slots_per_device=[2, 2, 3, -1]) | of device 3 must be from 0 to 65536, got -1
problem(slots_per_device=2, extra_slots=2) | slots_per_device and extra_slots cannot both
problem(extra_slots=1000) | extra_slots must be at most 54, where every device has every expert
problem(groups="minimax") | groups needs windows with groups; these statistics have none
problem(GROUPS, groups={"poems": 1}) | groups names 'poems', which is none of code, law, none
problem(GROUPS, groups={"law": 1}) | groups names 'law', which has no tokens
problem(GROUPS, groups={"none": 1}) | groups names 'none', which has no tokens
problem(ALONE, groups={"code": 0}) | groups leaves no window with a weight above 0
problem(forbidden=[(9, 0, 0)]) | forbidden: layer (None for all) must be from 0 to 2, got 9
problem(pinned=[(0, e, 1) for e in range(3)]) | pinned puts 3 experts of layer 0 on device 1, which
problem(pinned=[(0, 0, d) for d in range(4)]) | leaves 4 slots of layer 0 for the 5 experts that are
problem(forbidden=[(1, 3, d) for d in range(4)]) | leaves no device for expert 3 of layer 1
problem(forbidden=[(1, e, d) for e in range(3) for d in (0, 2, 3)]) | 2 slots in layer 1, on 1, for
problem(forbidden=[(None, e, d) for e in range(6) for d in (1, 3)]) | 4 slots in layer 0, on 0, 2,
mt.solve(problem(), effort="more") | effort must be one of brief, default, thorough, got 'more'
mt.solve(problem(), move_budget=1) | move_budget and move_cost need initial
mt.solve(problem(), "lpt", initial=RUNS) | initial needs method joint or heuristic, got 'lpt'
mt.pareto(problem(), RUNS, expert_bytes=0) | expert_bytes must be a positive number of bytes, got 0
mt.pareto(problem(), TWICE) | initial must have 3 layers, 6 experts and 4 devices like the problem
mt.solve(problem(), initial=WIDER) | initial has 3 experts of layer 0 on device 0, which has 2 slots
rebalance_experts([[1, 2]], 3, 1, 1, 2) | num_replicas must be a multiple of num_ranks (2)
rebalance_experts([[1, 2, 3]], 2, 1, 1, 2) | and at least the 3 experts, got 2
rebalance_experts([[1, -2]], 2, 1, 1, 2) | weight must be finite and at least 0
rebalance_experts([[1, NAN]], 2, 1, 1, 2) | weight must be finite
rebalance_experts([1, 2], 2, 1, 1, 2) | weight must be [layers, experts]
rebalance_experts([[1, 2]], 2, 1, 1, 2, [[0.5, 1.5]]) | old_map must be integers [1, slots], got
rebalance_experts([[1, 2]], 2, 1, 1, 2, [[0, 1], [1, 0]]) | old_map must be integers [1, slots], got
rebalance_experts([[8, 1]], 1 << 40, None, 1, 1) | num_replicas must be
rebalance_experts([[8, 1]], 1 << 40, None, 1, 1 << 38) | num_replicas must be
count_loads(np.array([[[0, 1], [2, 1 << 40]]]), ONES) | must hold experts below the 4 slots
mt.balance([1, 2], devices=2, slots_per_device=1) | load must be [layers, experts]
mt.balance([[1, -2]], devices=2, slots_per_device=1) | of at least 0, got -2 in layer 0
mt.balance([[1, 2]], devices=2, slots_per_device=[1, 0]) | must add up to at least 2, a slot for
mt.balance([[1, 2]], devices=2, slots_per_device=1, speed=[1, 0]) | speed of device 1 must be a
engine("vllm", slots_per_device=2) | slots_per_device must be from 3 to 12 for 12 experts on 4
engine("vllm", slots_per_device=13) | slots_per_device must be from 3 to 12
engine("vllm", slots_per_device=(3, 3, 3, 4)) | got 3 to 4: 4 on every device would do
engine("vllm", extra_slots=13) | got 13: 12 or 24 would
engine("vllm", 5, extra_slots=0) | got 0: 9 would
engine("vllm", extra_slots=12, slots_per_device=4) | cannot both
engine("megatron", 5) | as Megatron-Core has no copies of experts, got 5: 4 or 6 would
engine("megatron", slots_per_device=4) | must be from 3 to 3 for 12 experts
engine("megatron", router_groups=3) | router_groups must divide 4 devices, got 3
problem(slots_per_device=10**9) | from 1 to 65536
mt.Topology(10**6) | from 1 to 8192
mt.Placement.from_assignment([[0, 1]], 10**12) | from 1 to 65536
mt.Placement([[[0, 1, -1], [-1, -1, -1]]]).filled() | layer 0, device 0: 3 slots cannot be filled
problem(slots_per_device=7, fill_slots=True) | fill_slots cannot fill the 7 slots of device 0
problem(slots_per_device=6, forbidden=[(0, 1, 1)], fill_slots=True) | fill the 6 slots of device 1
problem(split="lp", objective="traffic") | split 'lp' balances load, so objective must be
problem(split="lp", max_imbalance=2) | split 'lp' balances load, so objective must be
problem(trace(), groups="minimax") | groups needs a trace with groups; this one has none
surviving(7) | two slots for each of 16 experts, 32 in all, got 28 in layer 0
surviving([20, 2, 2, 2]) | 32 in all, got 22 in layer 0
surviving(8, "node") | survive node needs devices_per_node: there is one node
surviving(8, "rack") | survive must be one of device, node, got 'rack'
plan(without=3) | without must be a list of devices, got 3
plan(without=[0, 1, 2]) | at least 2 devices of 2 slots, or slots_per_device=4, got 1
plan(fewer=4) | fewer must be from 0 to 3, got 4
plan(retire=1) | retire must be a list of devices, got 1
plan(without=[1], retire=[1]) | retire must name devices that are not lost, got 1
plan(slots_per_device=1) | slots_per_device must be from 2 to 4, got 1
plan(join=-1) | join must be from 0 to
plan(more_copies=-1) | more_copies must be
plan(topology=mt.Topology(3)) | topology must have 4 devices like running, got 3
plan((1, 2, 3), without=[]) | 1 layers of 4 experts like running, got 1 of 3
rows(home=np.full(50, 4)) | home must be from 0 to 3, got 4 to 4
rows(home=np.zeros(3, dtype=int)) | home must be integers [50], got int64 [3]
rows(home="anywhere") | got 'anywhere'
rows(position=[0.5]) | position must be integers [50], got float64 [1]
rows(split="best") | split must be one of even, nearest, got 'best'
rows(devices_per_node=3) | devices_per_node must divide the devices (4), got 3
mt.dispatch_rows(IN_BLOCKS, trace(num_experts=9)) | 3 layers and 9 experts
mt.evaluate(IN_BLOCKS, COUNTED, home="blocks") | home needs a trace
mt.evaluate(IN_BLOCKS, SEQUENCES, mt.Topology(2)) | must have 2 devices like the topology, got 4
mt.evaluate(IN_BLOCKS, trace(num_experts=9)) | must have 9 experts like the input, got 8
mt.evaluate(ON_ALL_DEVICES, SEQUENCES, split="lp") | counts for split 'lp', which divides windows
mt.audit(IN_BLOCKS, SEQUENCES, baseline=blocks(3, 9, 4)) | 8 experts like the input, got 9
mt.audit(IN_BLOCKS, SEQUENCES, window=0) | window must be at least 1
mt.audit(IN_BLOCKS, trace(IDS[:0])) | traffic must have tokens to audit, got a trace of 0
mt.audit(IN_BLOCKS.with_names(settings={"topology": {"nodes": 2}}), SEQUENCES) | keys must be out of
advise(trace(IDS[:1])) | traffic must have two tokens
advise(load([[[0, 0]]] * 9)) | traffic must have tokens
advise(copies=()) | at least one number of slots
advise(initial=TWICE) | initial must have 3 layers
advise(initial="lpt") | initial must be contiguous, round_robin, eplb or eplb:N
advise(trace(), by_group=True) | by_group needs traffic of two groups
advise(prefill_share=0.5) | prefill_share needs a trace of at least 8,192 tokens
advise(prefill_share=2) | prefill_share must be a share from 0 to 1
advise(unseen=load(np.ones((1, 3, 8)))) | unseen must be
advise(unseen=trace(IDS[:, :1])) | got 1 layers of 8
phased({512: 0.5, 700: 0.5}) | of 512 tokens each, got 700
phased({256: 1.0}) | phases must be of whole windows of the traffic, which are of 512 tokens
phased({512: -1}) | phases: share of windows of 512 tokens must be a number of at least 0
phased({512: 0.0}) | phases must have a share above 0
phased({0: 1.0}) | phases: tokens of a window must be
mt.evaluate(IN_BLOCKS, SEQUENCES, mt.Serving(NODES), split="nearest") | in the serving, or give a
mt.advise(SEQUENCES, mt.Serving(NODES), engine="vllm") | engine must be in the serving
mt.count(SEQUENCES, sample=0) | sample must be from 1
mt.count(count(), sample=9) | sample must be 1,048,576, with which this recording was counted, got 9
count() + SEQUENCES | add what moetuner.count returns
SEQUENCES + SEQUENCES | add what moetuner.count returns
count_table() + load([[[3, 1]]]) | add what moetuner.count returns
count() + count(model="other", sample=60) | must have samples of the same size, got 1,048,576 and 60
count(model="one") + count(model="two") | must have the same model, got 'one' and 'two'
count() + count(group_names=["b", "a"]) | the same groups in the same order, got a, b; and b, a
count() + count(group=None, group_names=None) | groups in the same order, got a, b; and no groups
mt.count(SEQUENCES, time=-1) | time must be from 0
mt.count(count(), time=1) | time must be None, as this recording was counted before, got 1
count() + count(ids=IDS[:, :2]) | must have the same layers, got 3 and 2
count() + count(ids=IDS[..., :1]) | must have the same top_k, got 2 and 1
count_table(window=2) + count_table(window=4) | must have the same window, got 2 and 4
count_table(window=2) + count_table() | must have the same window, got 2 and None
total([count(), count_table()]) | must be of one kind, got a trace and counts
total([]) | recordings must be at least one counted recording, got none
rebalance_experts([[4, 3, 2, 1]], 6, None, 1, 2, dead=[2]) | dead must be from 0 to 1, got 2
problem().violations(mt.Placement([[[0], [1]]])) | like the problem, got 1, 2 and 2
"""
CASES = [line.split(" | ") for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("call", "words"), CASES)
def test_what_is_wrong_is_said(call, words, tmp_path, monkeypatch):
    """One line, which has these words."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        eval(call, globals())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def packed(header, body=b"\0\1\2\0"):
    """Give a safetensors file of a header and what comes behind it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, end=4, dtype="U8"):
    """Give a safetensors header of ids."""
    return {"expert_ids": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


def npy(header):
    """Give an .npy file of a header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + IDS.tobytes()


def of_ids(kind="|u1", order=False, shape=(50, 3, 2)):
    """Give an .npy file that says this of its ids."""
    return npy(f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}")


def table(at=17, value=1.0, shape=(2, 3, 4)):
    """Give loads of which one is another."""
    return np.where(np.arange(np.prod(shape)).reshape(shape) == at, value, 1.0)


def tensors(metadata=None, **arrays):
    """Give a writer of safetensors."""
    metadata = metadata and {key: str(value) for key, value in metadata.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return lambda path: save_file(arrays, path, metadata=metadata)


def npz(**arrays):
    """Give a writer of an .npz."""

    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write


def bomb(claimed, real):
    """Give a writer of an .npz whose ids have ``real`` zeros and say that they have ``claimed``."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({claimed}, 1, 1), }}"

    def write(path):
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("expert_ids.npy", "w") as file,
        ):
            file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode())
            for _ in range(real >> 20):
                file.write(bytes(1 << 20))

    return write


def statistics(about=None, **changes):
    """Give a writer of saved statistics with some tables changed; None leaves one out."""

    def write(path):
        COUNTED.save(path)
        arrays = load_file(path) | changes
        arrays = {name: array for name, array in arrays.items() if array is not None}
        tensors({"format": "moetuner.statistics", "version": "1"} | (about or {}), **arrays)(path)

    return write


def counted(numbers=None, **changes):
    """Give a writer of a counted trace with some numbers and tables of its population changed."""

    def write(path):
        COUNTED_TRACE.save(path)
        with safe_open(path, "np") as file:
            about = dict(file.metadata())
        arrays = load_file(path) | {
            f"population.{name}": array for name, array in changes.items() if array is not None
        }
        for name in [name for name, array in changes.items() if array is None]:
            del arrays[f"population.{name}"]
        about["population"] = (
            numbers
            if isinstance(numbers, str)
            else json.dumps(json.loads(about["population"]) | (numbers or {}))
        )
        save_file(arrays, path, about)

    return write


def placed(**fields):
    """Give a placement's file with some fields replaced."""
    good = {"schema": "moetuner.placement/1", "num_experts": 2, "slots": [[[0], [1]]]}
    return json.dumps(good | fields).encode()


COUNTED_TRACE = count() + count(ids=IDS[::-1])
COACTIVATION = np.zeros((3, 8, 8), np.uint64)
COACTIVATION[1, 0, 2] = 1
BAD_ID = put(40, 1, 9)
SET_IDS = np.concatenate([of.ids for of in COUNTED.sets])
COST = '{"schema": "moetuner.cost_model/1", '
READ = {
    "trace": lambda path: list(mt.RoutingTrace.load(path, num_experts=8).shards()),
    "trace of 3": lambda path: mt.RoutingTrace.load(path, num_experts=3),
    "trace as it is": mt.RoutingTrace.load,
    "counts": mt.RoutingStatistics.load,
    "topology": mt.Topology.load,
    "cost": mt.CostModel.load,
    "placement": mt.Placement.load,
}
# Who reads it, what is in a file, and what the error says of it.
FILES = r"""
trace | tensors(weight=IDS) | must hold a tensor 'expert_ids', got ['weight']
trace | statistics() | format must be moetuner.trace version 1, got moetuner.statistics
trace | tensors({"format": "moetuner.trace", "version": 2}, expert_ids=IDS) | moetuner.trace version
trace as it is | tensors(expert_ids=IDS) | num_experts is needed
trace as it is | npz(expert_ids=IDS) | num_experts is needed
trace as it is | of_ids() | num_experts is needed
trace | tensors(expert_ids=IDS.astype(np.float32)) | must be integers [tokens, layers, top_k], got
trace | tensors(expert_ids=BAD_ID) | expert_ids: token 40, layer 1: expert id 9 is not below
trace of 3 | packed('{"a": 1}') | a: data_offsets must be two sizes, got None
trace of 3 | packed("{" + '"a":[' * 5000) | header: must be JSON
trace of 3 | packed(entry([4, 1, 1], -4)) | must be two sizes
trace of 3 | packed(entry([1 << 40, 1, 1])) | must have 1099511627776 bytes, got 4
trace of 3 | packed(entry([2, 1, 1], 4, "BF16")) | dtype must be one of
trace of 3 | packed({"__metadata__": {"a": 1}}) | metadata must be texts
trace | of_ids("|O") | never loaded
trace | of_ids(shape=(99, 3, 2)) | file must have
trace | of_ids(order=True, shape=(1 << 45, 3, 2)) | file must
trace | npy("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (5,)}") | must be integers
trace | npz(expert_ids=IDS, group_names=np.array(["a", None])) | got Python objects (pickle is never
trace as it is | npz(expert_ids=IDS, num_experts=np.float64(8)) | num_experts must be one integer
trace | npz(expert_ids=IDS, num_experts=8, model=[1, 2]) | model must be one text, got int64 [2]
trace | npz(load=table()) | holds a load table
trace | bomb(1 << 40, 1 << 20) | must have 1099511627776 bytes, got 1048576
trace | bomb(300 << 20, 300 << 20) | .npz must not expand more than 100 times
counts | npz(load=table(value=NAN)) | load must be whole counts of at least 0, got nan at [1, 1, 1]
counts | npz(load=table(value=0.5)) | load must be whole counts of at least 0, got 0.5 at [1, 1, 1]
counts | npz(load=-table().astype(int)) | load must be whole counts of at least 0, got -1 at [0
counts | npz(load=np.full((2, 3, 4), 1 << 63, np.uint64)) | must add up to less than 2**63, got a
counts | npz(load=table(), group=[0, 1, 2]) | group must be integers [2], got int64 [3]
counts | npz(expert_ids=IDS) | holds a trace, not a load table; RoutingTrace.load reads it
counts | of_ids() | must be saved statistics (safetensors) or a load table (.npz)
counts | tensors({"a": "b"}, load=table()) | format must be moetuner.statistics version 1, got None
counts | statistics({"window": "0"}) | window must be at least 1, got 0
counts | statistics({"group_names": "3"}) | group_names must be a list of names, got 3
counts | statistics(load=None) | must hold a tensor 'load'
counts | statistics(load=np.ones((1, 2, 8), np.uint64)) | transitions must be [1, 8, 8], got [2
counts | statistics(coactivation=COACTIVATION) | symmetric with a zero diagonal, layer 1 is not
counts | statistics(set_ids=None) | expert sets must have set_ids, set_counts, sets_per_layer, got
counts | statistics(sets_per_layer=np.array([1, 1, 1])) | sets_per_layer must add up to
counts | statistics(set_counts=np.ones(1, np.uint64)) | set_counts must be
counts | statistics(set_ids=SET_IDS + 7) | sets must have expert ids below 8, layer 0
counts | statistics(set_ids=SET_IDS * 1.0) | ids of expert sets must be
counts | statistics(sets_per_layer=np.array([len(SET_IDS)])) | sets must be those of 3 layers, got 1
counts | lambda path: SEQUENCES.save(path) | format must be moetuner.statistics version 1, got
trace | counted("{") | population must be JSON
trace | counted("[]") | population must be numbers by name, got
trace | counted({"more": 1}) | population must have no 'more'
trace | counted({"sample": 0}) | sample must be
trace | counted({"limit": 1}) | stretches of a population must have hashes below 1
trace | counted({"sequences": -1}) | sequences must be
trace | counted({"unreadable": "2"}) | unreadable must be an integer, got '2'
trace | counted(recording_hashes=np.array([2, 1])) | recording_hashes of a population must rise
trace | counted(recording_hashes=np.array([1, 2])) | and have the recording of every stretch
trace | counted(rows=np.array([1, 1])) | rows of a population must be those of its stretches
trace | counted(load=np.zeros((2, 3, 8), int)) | 2 of each of 50 tokens, got 0 at [0, 0]
trace | counted(load=np.full((2, 3, 8), 1 << 60)) | load of a population must add up to less
trace | counted(stretch_rows=np.array([1 << 63, 100 + (1 << 63)], "u8")) | must add up to less than
trace | counted(stretch_highest=np.array([1, 1 << 32])) | must be below 4294967296, got 4294967296
trace | counted(load=None) | population must have 'load'
trace | counted(load=-np.ones((2, 3, 8))) | load of a population must be counts of 3 dimensions
trace | counted(load=np.ones((1, 3, 8), int)) | tables of a population must fit
trace | counted(load=np.ones((2, 3, 9), int)) | population must have load [2, 3, 8] and 100 rows
trace | counted(stretch_rows=np.array([50, 51])) | and 100 rows in its stretches, got
trace | counted(stretch_place=np.array([0])) | tables of a population must fit
trace | counted(labels=np.array([7])) | population must have a label for every sequence, got 1
topology | "" | Topology.__init__() missing 1 required positional argument: 'devices'
topology | "{" | must be a JSON object or TOML
topology | '{"gpus": 8}' | keys must be out of
topology | "nodes = 2\ndevices = 2" | got 'nodes' (nodes needs preset)
topology | '{"devices": 2, "tiers": [3]}' | must be a mapping, not int
topology | '{"devices": 2, "tiers": [{"devices": 2}]}' | argument: 'bandwidth'
cost | "" | not a cost model
cost | b"\xff" | not a cost model
cost | COST + '"gpu": 1}' | keys must be out of
cost | COST + '"base_us": 1}' | missing 4 required positional arguments
placement | b"[1]" | schema must be
placement | placed(schema="moetuner.placement/9") | schema must be 'moetuner.placement/1', got
placement | placed(slots=[[[0], [0]]]) | layer 0: expert 1 has no slot
placement | placed(slots=[[[0], [1, 2]]]) | slots must be an array
placement | placed(slots=[[[0], [10**30]]]) | slots must be integers
placement | placed(num_experts=None) | num_experts must be an integer, got None
placement | placed(num_experts=0) | num_experts must be from 1
placement | placed(objective="12") | objective must be a finite number, got '12'
placement | placed() * 2 | must hold one placement, got 2
"""
FILE_CASES = [line.split(" | ") for line in FILES.strip().splitlines()]


@pytest.mark.parametrize(("reader", "content", "words"), FILE_CASES)
def test_what_is_wrong_with_a_file_is_said(reader, content, words, tmp_path):
    """One line that begins with its name; sizes are checked before anything is allocated."""
    path, of = tmp_path / "file", eval(content, globals())
    if callable(of):
        of(path)
    else:
        path.write_bytes(of.encode() if isinstance(of, str) else of)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        READ[reader](path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("of", [SEQUENCES, PAIRS], ids=["trace", "counts"])
def test_every_truncation_is_noticed(of, tmp_path):
    """A file cut anywhere, or with more behind it, does not load."""
    path = tmp_path / "a.safetensors"
    of.save(path)
    whole = path.read_bytes()
    for part in (*(whole[:length] for length in range(0, len(whole), 3)), whole + b"x"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"a\.safetensors: "):
            type(of).load(path)
