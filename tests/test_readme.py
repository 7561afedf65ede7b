"""What the documents promise is so: the README's program runs, links lead somewhere, tables say what the code says."""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import forge_client
from forge_broker.core import replicas, requests, workers
from forge_contract import errors
from forge_contract.config import AutoscalingConfig, BrokerConfig, EndpointOptions, ServiceConfig

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("forge_contract/*.md")]
)
PACKAGES = ("forge_contract", "forge_broker", "forge_worker", "client/forge_client", "cli/forge_cli")


def blocks(document: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for found, block in fenced if found == language]


def test_the_readmes_example_runs_as_written(tmp_path: Path) -> None:
    """A1, A9: as a script of its own, in an empty folder, with nothing started before."""
    (example,) = blocks(README, "python")
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['long', 'short']\nlong\n"
    assert not done.stderr


def test_the_readme_names_two_commands_that_the_makefile_has() -> None:
    (commands,) = (block for block in blocks(README, "") if block.startswith("make "))
    targets = re.findall(r"^make (\w+)", commands, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{document.name} links to {target}, and {found.name} has {anchors(found)}"


def anchors(document: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readmes_map_names_folders_that_exist_and_leaves_none_out() -> None:
    text = README.read_text(encoding="utf-8")
    folders = set(re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in folders), folders
    with_code = {
        path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0][0] != "."
    }
    assert with_code - {"build", "dist"} <= {folder.split("/")[0] for folder in folders}


@pytest.mark.parametrize("config", [ServiceConfig, EndpointOptions, AutoscalingConfig, BrokerConfig])
def test_the_guides_tables_have_every_field_with_its_default(config: Any) -> None:
    section = GUIDE.read_text(encoding="utf-8").split(f"### {config.__name__}\n")[1].split("\n### ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert list(told) == list(fields)
    assert {name: ast.literal_eval(default) for name, default in told.items()} == fields


def test_the_guide_names_only_errors_that_there_are() -> None:
    section = GUIDE.read_text(encoding="utf-8").split("## Errors\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([A-Z]\w+)`", section))
    assert len(named) > 15
    assert all(issubclass(getattr(errors, name), errors.ForgeError) for name in named)


def test_the_guide_tells_every_built_in_router() -> None:
    section = GUIDE.read_text(encoding="utf-8").split("## Routers\n")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+Router)` \|", section, re.MULTILINE))
    assert named == {name for name in forge_client.__all__ if name.endswith("Router")} - {"Router"}


def test_the_guides_code_is_python_and_takes_only_what_the_package_has() -> None:
    known = set(forge_client.__all__)
    for block in blocks(GUIDE, "python"):
        tree = compile(block, str(GUIDE), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "forge_client":
                assert {alias.name for alias in node.names} <= known


@pytest.mark.parametrize(
    ("title", "moves"), [("Request", requests.MOVES), ("Worker", workers.MOVES), ("Replica", replicas.MOVES)]
)
def test_the_architectures_tables_of_lives_are_the_codes(
    title: str, moves: Mapping[enum.Enum, Mapping[enum.Enum, enum.Enum]]
) -> None:
    """C3."""
    section = ARCHITECTURE.read_text(encoding="utf-8").split(f"### {title}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| ([\w ]+) \| (.*?) ?\|$", section, re.MULTILINE)[1:]
    told = {state: dict(move.split(" → ") for move in row.split("; ") if move) for state, row in rows}
    assert told == {
        state.value: {move.value: after.value for move, after in row.items()} for state, row in moves.items()
    }


def test_the_architecture_has_a_line_for_every_file() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8").split("## Every file\n")[1].split("\n## ")[0]
    told: dict[str, set[str]] = {}
    folder = ""
    for line in text.splitlines():
        if heading := re.match(r"`([\w/]+)/`", line):
            folder = heading[1]
        for name in re.findall(r"`((?:\w+/)?\w+\.py)`", line):
            told.setdefault(str((Path(folder) / name).parent), set()).add(Path(name).name)
    there: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                there.setdefault(str(path.parent.relative_to(ROOT)), set()).add(path.name)
    assert told == there
