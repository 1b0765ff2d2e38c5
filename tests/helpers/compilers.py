"""Backends of torch.compile for what takes long to compile: whole models, blocks, and layers with adapters."""

import pytest

# "aot_eager" traces and derives, which is what depends on this package, and generates no code, which takes a minute.
on_every_compiler = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
