"""The rules of the house: what may import what, and what every test and name must have."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import concurrency_patterns

PACKAGE = Path(concurrency_patterns.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
ROOF = {"compose", "observe", "testing"}
# What an extra installs, for the one module that may import it: inside of a function, so that
# the module itself works without it.
OPTIONAL = {"observe": {"prometheus_client", "opentelemetry"}}
PATTERNS = sorted(set(MODULES) - ROOF - {"errors"})
# The half of a pattern that another process runs: a module of its own, so that it starts quickly.
HALVES = {"process_pool": {"process_worker"}}
TESTS = sorted(Path(__file__).parent.rglob("test_*.py"))


def imports_of_ours(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in ours if node.level == 1}


def packages_imported(tree: ast.AST) -> set[str]:
    """Return the packages other than ours that are imported anywhere below."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("module", PATTERNS)
def test_a_pattern_imports_errors_and_timeout_and_nothing_else_of_ours(module):
    """The patterns stand side by side and know nothing of each other."""
    assert imports_of_ours(module) - HALVES.get(module, set()) <= {"errors", "timeout"}


def test_what_a_worker_process_runs_imports_nothing_of_ours_and_no_asyncio():
    """A worker process loads none of what only its parent needs."""
    tree = ast.parse((PACKAGE / "process_worker.py").read_text(encoding="utf-8"))

    assert imports_of_ours("process_worker") == set()
    assert "asyncio" not in packages_imported(tree)


def test_errors_is_the_foundation():
    """The module of the exceptions imports nothing of ours."""
    assert imports_of_ours("errors") == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_the_standard_library(module):
    """Nothing outside of the standard library is needed at run time."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    inside = {name for function in functions for name in packages_imported(function)}

    assert packages_imported(tree) - inside <= sys.stdlib_module_names
    assert inside <= sys.stdlib_module_names | OPTIONAL.get(module, set())


def test_the_package_imports_without_the_optional_libraries():
    """Importing everything loads nothing that an extra installs."""
    program = (
        "import sys, concurrency_patterns\n"
        f"print({set().union(*OPTIONAL.values())!r} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "set()\n"


@pytest.mark.parametrize("module", PATTERNS)
def test_a_pattern_can_be_copied_with_what_it_imports(module, tmp_path):
    """The file of a pattern, with errors.py and timeout.py beside it, works in another package."""
    copied = tmp_path / "mine"
    copied.mkdir()
    (copied / "__init__.py").touch()
    for name in {module, "errors"} | imports_of_ours(module):
        shutil.copy(PACKAGE / f"{name}.py", copied)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        f"import mine.{module} as copy\n"
        "assert all(hasattr(copy, name) for name in copy.__all__)\n"
        "assert 'concurrency_patterns' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    """What a module exports is documented."""
    loaded = importlib.import_module(f"concurrency_patterns.{module}")
    bare = [
        name
        for name in loaded.__all__
        if callable(getattr(loaded, name)) and not getattr(loaded, name).__doc__
    ]

    assert bare == []


def test_the_package_exports_what_its_modules_export():
    """Each public name of the package comes from a module that exports it, in sorted order."""
    exported = concurrency_patterns.__all__
    offered = set()
    for module in MODULES:
        offered |= set(importlib.import_module(f"concurrency_patterns.{module}").__all__)

    assert exported == sorted(exported, key=str.casefold) or exported == sorted(exported)
    assert set(exported) <= offered


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_every_test_says_in_one_line_what_behaviour_it_proves(path):
    """Each test function has a docstring of one line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]
    without = [
        node.name for node in functions if len((ast.get_docstring(node) or "").splitlines()) != 1
    ]

    assert functions
    assert without == []


LEFT_BEHIND = {
    "a task that runs": (
        "asyncio.create_task(asyncio.sleep(1))",
        "Leak: still running: sleep",
    ),
    "an error that nobody has seen": (
        "asyncio.create_task(fail()); await asyncio.sleep(1)",
        "Leak: Task exception was never retrieved: OSError",
    ),
}


@pytest.mark.parametrize(("line", "told"), LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_t35_an_asynchronous_test_that_leaves_something_behind_fails(line, told, tmp_path):
    """T35: each test is failed by a task that it leaves running, and by an error left unseen."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_leak.py").write_text(
        f"import asyncio\nasync def fail(): raise OSError\nasync def test_leak(): {line}\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert told in done.stdout
