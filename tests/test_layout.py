"""The house's shape: which package may import which, what the wheel holds, where a file may stand.

import-linter judges the source (its contracts are in setup.cfg); the subprocess tests judge what really gets
imported, which is what L2 promises to a user whose GPU is not pinned yet.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = (ROOT, ROOT / "client", ROOT / "cli")
BESIDE_THE_PACKAGES = {"tests", "bench", "examples", "docs"}
FORBIDDEN_IN_CORE = {"asyncio", "logging", "os", "random", "socket", "subprocess", "threading", "time", "zmq"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def listed_packages() -> set[str]:
    return set(setup_cfg()["options"]["packages"].split())


def folder_of(package: str) -> Path:
    top, *rest = package.split(".")
    moved = dict(line.split(" = ") for line in setup_cfg()["options"]["package_dir"].strip().splitlines())
    return ROOT.joinpath(moved.get(top, top), *rest)


def modules_imported_by(statement: str) -> set[str]:
    """The modules a fresh interpreter holds after `statement` that it did not hold before it."""
    program = (
        "import json, sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, SOURCE_ROOTS))},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def tops(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def modules_of(package: str) -> list[str]:
    return [package] + [
        f"{package}.{path.stem}" for path in sorted(folder_of(package).glob("*.py")) if path.stem != "__init__"
    ]


def test_the_import_laws_hold() -> None:
    """L1, L2, L3, L4: the contracts in setup.cfg, as import-linter judges them."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, SOURCE_ROOTS))},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("law", ["L1", "L2", "L3"])
def test_each_law_has_a_contract(law: str) -> None:
    """L4: deleting a contract is noticed, not only breaking it."""
    config = setup_cfg()
    names = [config[section]["name"] for section in config.sections() if section.startswith("importlinter:contract:")]
    assert any(name.startswith(f"{law}:") for name in names)


def test_importing_the_client_pulls_in_nothing_heavy() -> None:
    """L2"""
    imported = tops(modules_imported_by("import forge_client"))
    assert not imported & {"torch", "numpy", "click", "structlog", "forge_broker", "forge_worker", "forge_cli"}


def test_importing_the_worker_pulls_in_no_torch() -> None:
    """L2: every module of the worker, not only the first."""
    modules = [module for module in modules_of("forge_worker") if not module.endswith("__main__")]
    assert not tops(modules_imported_by("import " + ", ".join(modules))) & {"torch", "forge_broker", "forge_cli"}


def test_importing_the_core_brings_in_no_loop_no_socket_and_no_log() -> None:
    """L3, with all that the core imports in turn. (os and time are in every interpreter before it runs a line.)"""
    imported = tops(modules_imported_by("import " + ", ".join(modules_of("forge_broker.core"))))
    assert not imported & {"asyncio", "logging", "socket", "subprocess", "zmq", "structlog", "torch", "numpy", "click"}


@pytest.mark.parametrize("path", sorted(folder_of("forge_broker.core").glob("*.py")), ids=lambda path: path.name)
def test_a_module_of_the_core_imports_nothing_impure(path: Path) -> None:
    """L3: also not inside a function. `random` may be named in annotations, as the type of what is injected."""
    assert not names_imported(ast.parse(path.read_text("utf-8"))) & FORBIDDEN_IN_CORE


def names_imported(tree: ast.AST) -> set[str]:
    """Top-level names of the modules imported anywhere below `tree`, except under `if TYPE_CHECKING:`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING")) | ast.If(test=ast.Attribute(attr="TYPE_CHECKING")):
                for other in node.orelse:
                    found |= names_imported(ast.Module([other], []))
                continue
            case ast.Import(names=names):
                found |= {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module.partition(".")[0])
            case _:
                found |= names_imported(node)
    return found


def test_annotations_may_name_random_but_code_may_not_import_it() -> None:
    """L3: the check above, checked."""
    annotated = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from random import Random\n"
    assert names_imported(ast.parse(annotated)) == {"typing"}
    assert "random" in names_imported(ast.parse("def choose():\n    import random\n"))
    assert "time" in names_imported(ast.parse(annotated + "else:\n    import time\n"))


def test_the_packages_listed_are_the_packages_on_disk() -> None:
    """L5"""
    on_disk = set()
    for source_root in SOURCE_ROOTS:
        for marker in source_root.glob("forge_*/**/__init__.py"):
            on_disk.add(".".join(marker.parent.relative_to(source_root).parts))
    assert listed_packages() == on_disk
    assert all((folder_of(package) / "__init__.py").is_file() for package in listed_packages())


def test_every_source_root_is_known_to_every_tool() -> None:
    """L5: a tool that was not told finds the installed copy, or nothing."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    roots = {root.relative_to(ROOT).as_posix() for root in SOURCE_ROOTS}
    assert set(tools["pytest"]["ini_options"]["pythonpath"]) == roots
    assert set(tools["ruff"]["src"]) == roots
    in_mypy = {path.removeprefix("$MYPY_CONFIG_FILE_DIR").strip("/") or "." for path in tools["mypy"]["mypy_path"]}
    assert in_mypy == roots
    assert set(tools["pyright"]["extraPaths"]) == roots - {"."}


def test_setup_cfg_and_pyproject_do_not_say_the_same_thing() -> None:
    """L4: setup.cfg knows folders and imports, pyproject.toml everything else."""
    allowed = {"options", "options.package_data", "importlinter"}
    assert {name for name in setup_cfg().sections() if not name.startswith("importlinter:contract:")} == allowed
    assert set(setup_cfg()["options"]) == {"packages", "package_dir", "include_package_data"}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert not {"setuptools", "importlinter"} & set(pyproject["tool"])


def test_no_module_stands_outside_a_package() -> None:
    """L5: what is not in a package is not in the wheel, and works only in the checkout."""
    strays = [path for source_root in SOURCE_ROOTS for path in source_root.glob("*.py")]
    strays += [
        path
        for package in listed_packages()
        for path in folder_of(package).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    ]
    assert not strays


def test_only_the_design_s_folders_stand_at_the_top() -> None:
    """L5: every folder with Python in it is a package, holds packages, or is one of the four beside them."""
    packages = {folder_of(package).relative_to(ROOT).parts[0] for package in listed_packages()}
    with_python = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != "build" and any(path.rglob("*.py"))
    }
    assert with_python <= packages | BESIDE_THE_PACKAGES


def test_the_wheel_holds_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    """L5: built without isolation, so that it needs no network, and from a copy, so that it leaves nothing here."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for package in listed_packages():
        folder = folder_of(package)
        shutil.copytree(
            folder, copy / folder.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "wheel"), str(copy)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    held = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    ours = {path for path in held if path.parts[0].startswith("forge_") and not path.parts[0].endswith(".dist-info")}

    expected = {Path("forge_contract/PROTOCOL.md")}
    for package in listed_packages():
        inside = Path(*package.split("."))
        expected |= {inside / path.name for path in folder_of(package).glob("*.py")}
        if "." not in package:
            expected.add(inside / "py.typed")
    assert ours == expected
    assert any(path.match("*.dist-info/licenses/LICENSE") for path in held)
