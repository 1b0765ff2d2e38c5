"""What the documents name is there: files, headings, commands, and names of the package."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

from memkernels import cli
from memkernels.bench import registry

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/design").glob("*.md"))]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "memkernels", "tests")
ROOMS = ("memkernels", "nn", "offload", "ops", "optim", "quant")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request):
    return request.param


def code_of(text):
    """What stands in code blocks and between backticks."""
    return [*FENCED.findall(text), *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))]


def anchors_of(path):
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def found(text, pattern):
    return [match for code in code_of(text) for match in re.findall(pattern, code)]


def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path), target


def test_paths_are_those_of_files(document):
    paths = found(document.read_text(), rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]+(?![\w<*{{])")
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_names_are_those_of_the_package(document):
    names = found(document.read_text(), rf"(?<![\w./-])(?:{'|'.join(ROOMS)})(?:\.[A-Za-z]\w*)+")
    missing = []
    for name in names:
        try:
            pkgutil.resolve_name(name if name.startswith("memkernels.") else f"memkernels.{name}")
        except (AttributeError, ImportError):
            missing.append(name)
    assert missing == []


def test_commands_can_be_called(document):
    text = document.read_text()
    modules, commands = (
        found(text, pattern) for pattern in (r"python -m (memkernels\.[\w.]+)", r"python -m memkernels (\w+)")
    )
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    assert set(commands) <= set(cli._COMMANDS)
    benchmarks = found(text, r"python -m memkernels\.bench (\w+)")
    assert set(benchmarks) <= set(registry.find(ROOT / "benchmarks"))
