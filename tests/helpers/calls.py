"""Which operators of adapters and products a call comes to."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Names of the operators that multiply, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name.startswith("lora_") or name in ("mm", "addmm"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
