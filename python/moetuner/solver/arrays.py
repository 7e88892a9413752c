"""Names of the arrays that modules of the solver hand on; brackets in docstrings say their axes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Expert ids by layer, device and slot; -1 where a slot is empty.
Slots = NDArray[np.int32]
