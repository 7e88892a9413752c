"""What Triton looks up of a backend's driver: one device, the CPU."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


def _refuse(*args):
    raise RuntimeError("this backend only stands in for Triton's interpreter: TRITON_INTERPRET=1")


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, index):
        return 0

    def set_current_device(self, device):
        pass

    def get_device_properties(self, device=0):
        return {"max_shared_mem": 1 << 16, "multiprocessor_count": 2, "warpSize": 1}

    @property
    def utils(self):
        return self  # Triton asks `driver.active.utils.get_device_properties` too

    map_python_to_cpp_type = get_benchmarker = _refuse
