"""The names of SGLang's kernel package, whose CPU build is on no registry; calling one fails.

On a CPU without AMX the engine imports these names and calls none of them.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

    return missing
