"""What Triton looks up of a backend's compiler."""

from triton.backends.compiler import BaseBackend


def _refuse(*args):
    raise RuntimeError("this backend only stands in for Triton's interpreter: TRITON_INTERPRET=1")


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}

    parse_options = add_stages = _refuse
