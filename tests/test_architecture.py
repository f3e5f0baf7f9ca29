"""The house rules, held by reading every module: who imports whom, what nobody imports, and that nobody shadows us."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.process import child_environment, python_module

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "workers", "gateway", "launch")
LIBRARY_HALF = ("gateway.mesh", "gateway.tokenize", "gateway.media")
"""What of the gateway speaks no HTTP."""
MAY_IMPORT = {
    "runtime": ("runtime",),
    "workers": ("workers", "runtime"),
    "gateway": ("gateway", "runtime"),
    "launch": ("launch", "runtime", *LIBRARY_HALF),
    "framemesh": ("launch", "runtime", *LIBRARY_HALF),
}
PRIVATE = tuple(
    f"runtime.{name}"
    for name in (
        "engine",
        "scheduler",
        "planner",
        "running",
        "request",
        "fairness",
        "batching",
        "memory",
        "predictions",
        "status",
    )
)
"""The scheduler's own half of runtime/."""
DRIVES_THE_PRIVATE_HALF = ("bench.simulate", "bench.plan")
"""What measures the pure scheduler without a mesh."""
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "yunchang", "einops")
HTTP_EDGE = ("fastapi", "pydantic", "starlette", "uvicorn", "sqlalchemy")
PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
PICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "send_pyobj",
    "recv_pyobj",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "read_pickle",
    "to_pickle",
}
PUBLIC_NAMES = [
    "Client",
    "Completed",
    "FramemeshError",
    "Frames",
    "Generator",
    "InvalidInput",
    "Progress",
    "RequestFailed",
    "Result",
    "SamplingParams",
    "StartFailed",
]


def modules_of(*folders):
    return sorted(file for folder in folders for file in (REPO / folder).rglob("*.py"))


PRODUCT = [REPO / "framemesh.py", *modules_of(*PACKAGES)]
EVERYTHING = [*PRODUCT, *modules_of("bench", "tests")]


def name_of(file):
    """The dotted name of a module, that of a package for its __init__."""
    parts = file.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports_of(tree):
    """Every dotted name that is imported anywhere in a module, down to the imported thing itself."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in names)


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def calls_of(tree):
    """Dotted names of everything that is called, and the last part alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            dotted = ast.unparse(node.func)
            yield from {dotted, dotted.rpartition(".")[2]}


def importers(files, *packages):
    """module -> what it imports of these packages."""
    found = {name_of(file): [name for name in imports_of(tree_of(file)) if within(name, *packages)] for file in files}
    return {module: names for module, names in found.items() if names}


# ---- the rules can see -------------------------------------------------------------------------------------------


def test_every_way_to_import_is_seen():
    source = """
import torch.nn as nn, zmq
from gateway import app, mesh as m
from . import here
from ..up import there
def late():
    from runtime.scheduler import Scheduler
    torch.load(x); self.socket.send_pyobj(y)
"""
    tree = ast.parse(source)
    assert set(imports_of(tree)) == {
        "torch.nn",
        "zmq",
        "gateway.app",
        "gateway.mesh",
        "..here",
        "..up.there",
        "runtime.scheduler.Scheduler",
    }
    assert {"torch.load", "send_pyobj"} <= set(calls_of(tree))
    assert within("gateway.mesh.Mesh", *LIBRARY_HALF)
    assert not within("gateway.meshes", *LIBRARY_HALF)


def test_the_rules_look_at_all_of_us():
    names = {name_of(file) for file in PRODUCT}
    assert {"framemesh", "runtime.engine", "gateway.mesh", "launch.cli", "workers.executor", "runtime.models"} <= names
    assert set(PACKAGES) == {path.parent.name for path in REPO.glob("*/__main__.py")}, "one folder is one process"


# ---- who imports whom --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = [file for file in PRODUCT if within(name_of(file), package)]
    assert files
    ours = importers(files, *PACKAGES, "framemesh", "bench", "tests")
    wrong = {
        module: names for module, names in ours.items() if not all(within(name, *MAY_IMPORT[package]) for name in names)
    }
    assert wrong == {}


def test_the_library_half_of_the_gateway_does_not_lean_on_the_http_half():
    files = [file for file in PRODUCT if within(name_of(file), *LIBRARY_HALF)]
    assert {"gateway.mesh", "gateway.tokenize", "gateway.media.mp4"} <= {name_of(file) for file in files}
    wrong = {
        module: [name for name in names if not within(name, *LIBRARY_HALF)]
        for module, names in importers(files, "gateway").items()
    }
    assert not any(wrong.values()), wrong


def test_the_private_half_of_runtime_is_private():
    packages = [*PRODUCT, *modules_of("bench")]
    strangers = [file for file in packages if not within(name_of(file), "runtime", *DRIVES_THE_PRIVATE_HALF)]
    assert importers(strangers, *PRIVATE) == {}


def test_modules_are_imported_by_their_own_names():
    relative = {name_of(file): [n for n in imports_of(tree_of(file)) if n.startswith(".")] for file in EVERYTHING}
    assert not any(relative.values()), relative
    dynamic = {name_of(file) for file in PRODUCT if {"__import__", "import_module"} & set(calls_of(tree_of(file)))}
    assert dynamic == set()


def test_only_workers_import_torch():
    light = [file for file in PRODUCT if not within(name_of(file), "workers")]
    assert importers(light, *HEAVY) == {}


def test_only_wire_imports_zmq():
    assert set(importers([*PRODUCT, *modules_of("bench")], "zmq")) == {"runtime.wire"}


def test_only_the_gateway_imports_its_http_and_database():
    strangers = [file for file in PRODUCT if not within(name_of(file), "gateway")]
    assert importers(strangers, *HTTP_EDGE) == {}
    library = [file for file in PRODUCT if within(name_of(file), *LIBRARY_HALF)]
    assert importers(library, *HTTP_EDGE) == {}


def test_nothing_is_pickled():
    files = [*PRODUCT, *modules_of("bench")]
    assert importers(files, *PICKLES) == {}
    calls = {name_of(file): PICKLING_CALLS & set(calls_of(tree_of(file))) for file in files}
    assert not any(calls.values()), calls
    allowed = [
        name_of(file)
        for file in files
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert allowed == []


def test_no_wait_forgets_a_cancel():
    """Before Python 3.12 `asyncio.wait_for` does, if what it waits for comes together with the cancel: a task that was
    told to end goes on, and its server never stops. `asyncio.timeout` does not."""
    assert [name_of(file) for file in PRODUCT if "asyncio.wait_for" in set(calls_of(tree_of(file)))] == []


# ---- how modules look --------------------------------------------------------------------------------------------


def test_every_module_says_what_it_owns():
    silent = [name_of(file) for file in EVERYTHING if not (ast.get_docstring(tree_of(file)) or "").strip()]
    assert silent == []


def test_an_init_holds_a_docstring_and_nothing_else():
    full = [name_of(file) for file in EVERYTHING if file.name == "__init__.py" and len(tree_of(file).body) != 1]
    assert full == []


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for package in PACKAGES for file in (REPO / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_tests_are_no_packages_and_hide_nobody():
    assert list((REPO / "tests").rglob("__init__.py")) == []
    names = {file.stem for file in (REPO / "tests").rglob("*.py")}
    names |= {folder.name for folder in (REPO / "tests").rglob("*") if folder.is_dir()}
    assert names & {*PACKAGES, "framemesh", "bench", *HEAVY, *HTTP_EDGE, *sys.stdlib_module_names} == set()


def test_the_sdk_is_a_fixed_list_of_names():
    import framemesh

    assert sorted(framemesh.__all__) == PUBLIC_NAMES
    assert all(hasattr(framemesh, name) for name in PUBLIC_NAMES)
    imported = [name.rpartition(".")[2] for name in imports_of(tree_of(REPO / "framemesh.py"))]
    assert sorted(imported) == PUBLIC_NAMES, "re-exports only"
    kinds = {type(node) for node in tree_of(REPO / "framemesh.py").body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}


# ---- who we are at run time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PACKAGES, "framemesh"])
def test_the_packages_are_ours(name):
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve().is_relative_to(REPO)


@pytest.fixture
def trap(tmp_path):
    """A working directory with strangers of our names."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('raise SystemExit("a stranger was imported")\n')
    return tmp_path


def start(command, cwd, environment):
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def unsafe_environment():
    return {name: value for name, value in child_environment({}).items() if name != "PYTHONSAFEPATH"}


def test_the_trap_works(trap):
    ran = start([sys.executable, "-m", "runtime", "--help"], trap, unsafe_environment())
    assert "a stranger was imported" in ran.stderr


def test_children_are_not_shadowed_by_the_working_directory(trap):
    ran = start(python_module("runtime", "--help"), trap, unsafe_environment())
    assert ran.returncode == 0, ran.stderr
    assert "--bind" in ran.stdout


def test_nor_are_their_children(trap):
    """torchrun starts the ranks without -P; the environment has to be enough. A stranger's PYTHONPATH comes last."""
    environment = child_environment({})
    environment["PYTHONPATH"] += f"{os.pathsep}{trap}"
    ran = start([sys.executable, "-m", "runtime", "--help"], trap, environment)
    assert ran.returncode == 0, ran.stderr


def test_the_environment_of_children_keeps_ours_first(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert child_environment({})["PYTHONPATH"] == f"{REPO}{os.pathsep}elsewhere"
    assert child_environment({"RANK": "3"})["RANK"] == "3"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gateway.mesh", (*HEAVY, *HTTP_EDGE)),
        ("gateway.app", HEAVY),
        ("launch.cli", (*HEAVY, *HTTP_EDGE)),
        ("launch.generator", (*HEAVY, *HTTP_EDGE)),
        ("runtime.engine", (*HEAVY, *HTTP_EDGE, "numpy", "tokenizers")),
        ("workers.seat", HEAVY),
        ("framemesh", (*HEAVY, *HTTP_EDGE)),
    ],
)
def test_light_processes_stay_light(module, heavy):
    code = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    ran = start([sys.executable, "-c", code], REPO, child_environment({}))
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr
