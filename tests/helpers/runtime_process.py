"""Processes that have the runtime and not torch."""

import os
import subprocess
import sys


class Child(subprocess.Popen):
    def communicate(self, input=None, timeout=None):
        """As of any process, but one that takes too long is ended, so that it does not run on after its test."""
        try:
            return super().communicate(input, timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def run_python(code, *arguments, **environment):
    """A process that has the runtime as `_runtime`, without torch."""
    from memkernels import _runtime

    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_runtime', {_runtime.__file__!r})\n"
        "_runtime = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(_runtime)\n"
    )
    return Child(
        [sys.executable, "-c", load + code, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
