"""Calls for which a device and the host would wait for one another."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FUNCTIONS = "tolist item numpy cpu __bool__ __int__ __index__ __float__ tensor as_tensor from_numpy"
OPERATORS = "nonzero bincount masked_select _local_scalar_dense unique_dim _unique2"


@contextmanager
def waiting():
    """Collect names of these calls, and of operators whose sizes depend on values."""
    names = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.extend({function.__name__}.intersection(FUNCTIONS.split()))
            return function(*args, **kwargs or {})

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            by_mask = name.startswith("index") and any(
                of is not None and of.dtype in (torch.bool, torch.uint8)
                for part in args[1:2]
                for of in (part if isinstance(part, (list, tuple)) else [])
            )
            if name in OPERATORS.split() or by_mask:
                names.append(name)
            return function(*args, **kwargs or {})

    with Operators(), Functions():
        yield names
