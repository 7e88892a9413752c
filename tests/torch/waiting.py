"""Calls for which a device and the host would wait for one another."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FUNCTIONS = "tolist item numpy cpu __bool__ __int__ __index__ __float__ tensor as_tensor from_numpy"
OPERATORS = "nonzero bincount masked_select _local_scalar_dense unique_dim _unique2"


class Waiting(TorchFunctionMode):
    """Names of the calls, and of operators whose sizes depend on values, wherever they are."""

    def __enter__(self):
        """Begin to listen."""
        self.names = []
        self.inside = _Operators(self.names)
        self.inside.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        """End."""
        super().__exit__(*error)
        self.inside.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Note and call."""
        if function.__name__ in FUNCTIONS.split():
            self.names.append(function.__name__)
        return function(*args, **kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note and call."""
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            of is not None and of.dtype in (torch.bool, torch.uint8)
            for part in args[1:2]
            for of in (part if isinstance(part, (list, tuple)) else [])
        )
        if name in OPERATORS.split() or by_mask:
            self.names.append(name)
        return function(*args, **kwargs or {})
