"""Traces as recorders write them."""

import json

import numpy as np


def write_lines(trace, path, per="token"):
    """Write JSON lines, a token or a run of a sequence on each."""
    header = {"num_experts": trace.num_experts}
    for name in ("model", "expert_size", "group_names"):
        if getattr(trace, name):
            header[name] = getattr(trace, name)
    ends = np.arange(1, trace.tokens + 1)
    if per == "sequence":
        ends = np.append(np.flatnonzero(np.diff(trace.sequence)) + 1, trace.tokens)
    lines = [header]
    for first, end in zip([0, *ends], ends, strict=False):
        ids = trace.expert_ids[first:end].tolist()
        lines.append({"experts": ids[0]} if per == "token" else {"tokens": ids})
        if trace.sequence is not None:
            lines[-1]["sequence"] = int(trace.sequence[first])
        if trace.group is not None:
            lines[-1]["group"] = trace.group_names[trace.group[first]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
