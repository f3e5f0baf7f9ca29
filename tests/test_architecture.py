"""The house rules, by reading every module: who may import whom, and what may be nowhere."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import framemesh
from launch.process import child_environment

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "workers", "gateway", "launch")
MODULES = sorted(path for package in (*PACKAGES, "bench") for path in (ROOT / package).rglob("*.py"))
MODULES.append(ROOT / "framemesh.py")

GATEWAY_LIBRARY = ("gateway.mesh", "gateway.tokenize", "gateway.media")
"""The half of the gateway without HTTP: what launch may use."""
ALLOWED = {
    "runtime": ("runtime",),
    "workers": ("runtime", "workers"),
    "gateway": ("runtime", "gateway"),
    "launch": ("runtime", "launch", *GATEWAY_LIBRARY),
}
PRIVATE = ("runtime.engine", "runtime.scheduler", "runtime.request", "runtime.fairness", "runtime.batching")
"""runtime's own; only runtime and the benchmarks look inside."""
HEAVY = {"torch", "diffusers", "transformers", "accelerate"}


def imports_of(path):
    """Dotted names of everything a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name, roots):
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        top = name.partition(".")[0]
        if package in ALLOWED and top in PACKAGES:
            parents = {root.rpartition(".")[0] for root in GATEWAY_LIBRARY} if package == "launch" else set()
            assert is_below(name, ALLOWED[package]) or name in parents, f"{package} may not import {name}"
        if package not in {"runtime", "bench"}:
            assert not is_below(name, PRIVATE), f"{name} is private to runtime"
        if package not in {"workers", "bench"}:
            assert top not in HEAVY, f"{package} may not import {name}"
        if package != "bench" and name_of(path) != "runtime/wire.py":
            assert top != "zmq", "only runtime/wire.py imports zmq"
        if package not in {"gateway", "bench"}:
            assert top not in {"fastapi", "starlette", "pydantic", "uvicorn", "sqlalchemy"}, f"{name} is the gateway's"
        assert top not in {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, f"{name} can run code on loading"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_owns(path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring
    assert len(docstring.splitlines()[0]) > 15
    if path.name == "__init__.py":
        assert len(tree.body) == 1, "an __init__ holds a docstring and no re-exports"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_unpickled_and_no_forward_is_replaced(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, f"line {node.lineno}: torch.{node.attr} pickles"
        # Training compiles its own model's blocks; what serves leaves every forward alone.
        if isinstance(node, ast.Assign) and "demo" not in path.parts:
            targets = [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
            assert "forward" not in targets, f"line {node.lineno}: a forward is replaced"


def test_no_test_folder_shadows_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} & set(PACKAGES)


def test_the_four_names_are_ours():
    for name in PACKAGES:
        module = __import__(name)
        assert Path(module.__file__).parent == ROOT / name


def test_a_strangers_package_in_the_working_directory_is_not_picked_up(tmp_path):
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a stranger was imported')")
    for module in ("runtime", "gateway", "launch"):
        command = [sys.executable, "-P", "-m", module, "--help"]
        done = subprocess.run(
            command, cwd=tmp_path, env=child_environment({}), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["launch.cli", "launch.generator", "gateway.app", "gateway.mesh", "runtime.engine"])
def test_light_processes_stay_light(module):
    script = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"{module} pulls in {done.stdout.strip()}"


def test_the_public_names_are_these():
    assert set(framemesh.__all__) == {
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
    }


def test_one_step_of_the_engine_fits_on_a_screen():
    tree = ast.parse((ROOT / "runtime" / "engine.py").read_text())
    engine = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine")
    step = next(node for node in engine.body if isinstance(node, ast.FunctionDef) and node.name == "step")
    assert step.end_lineno - step.lineno < 40
