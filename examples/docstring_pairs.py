"""Pairs of texts that every machine has: names of Python's standard library, and the docstrings that go with them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

Pair = tuple[str, str]
# Shorter docstrings say too little to be told from others.
_FEWEST_WORDS = 8


def docstring_pairs(files: Iterable[Path], known: Iterable[Pair] = ()) -> list[Pair]:
    """(qualified name, docstring) of the classes and functions in the files, in order.

    A docstring that came before, here or in `known`, is left out: two names would each be right for it.
    """
    seen = {text for _, text in known}
    pairs = []
    for path in files:
        for name, text in _documented(ast.parse(path.read_bytes()), path.stem):
            if len(text.split()) >= _FEWEST_WORDS and text not in seen:
                seen.add(text)
                pairs.append((name, text))
    return pairs


def _documented(node: ast.AST, prefix: str) -> Iterator[Pair]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}"
            if text := ast.get_docstring(child):
                yield name, " ".join(text.split())
            yield from _documented(child, name)
        else:
            yield from _documented(child, prefix)
