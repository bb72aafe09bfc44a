"""The repository's shape is part of its contract: what ships, which way imports point, and how long a file may be."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "losses", "callbacks", "recipes")  # imports may only point left
FRONT_DOOR = sorted(path for path in (ROOT / "litropy").glob("*.py"))
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
SHORT_FILES = [
    *FRONT_DOOR,
    *SOURCES,
    *(path for folder in ("configs", "benchmarks", ".ci") for path in (ROOT / folder).rglob("*.py")),
]
MOST_LINES = 400


def name_of(path):
    return str(path.relative_to(ROOT))


def imported_modules(path):
    """Dotted names that a file imports, wherever in the file; ``from a import b`` may mean the module a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_ships():
    on_disk = {".".join(("litropy", *path.parent.relative_to(ROOT).parts)) for path in SOURCES}
    assert set(setuptools_table()["packages"]) == on_disk | {"litropy", "litropy.configs"}
    assert set(setuptools_table()["package-dir"]) >= {"litropy", "litropy.configs", *(f"litropy.{x}" for x in LAYERS)}


def test_kernels_never_hide_hugging_face_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_left(path):
    layer = path.relative_to(ROOT).parts[0]
    right = {f"litropy.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    right |= {f"litropy.{module.stem}" for module in FRONT_DOOR if not module.stem.startswith("__")}
    wrong = {module for module in imported_modules(path) if ".".join(module.split(".")[:2]) in right}
    assert not wrong, f"{layer} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", SHORT_FILES, ids=name_of)
def test_files_are_short(path):
    lines = path.read_text().count("\n")
    assert lines <= MOST_LINES, f"{path.name} has {lines} lines: would two files read better?"


@pytest.mark.parametrize("path", [*FRONT_DOOR, *SOURCES], ids=name_of)
def test_modules_say_what_is_public_and_document_it(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says in its first line what it is for"
    if path.name.startswith("__") and path.parent.name == "litropy":
        return
    public = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
    ]
    assert public, "a module lists its public names in __all__"
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    overloads = {
        id(node) for node in defined.values() if any(getattr(d, "id", "") == "overload" for d in node.decorator_list)
    }
    silent = [
        name
        for name in public[0]
        if (node := defined.get(name)) is not None and id(node) not in overloads and not ast.get_docstring(node)
    ]
    assert not silent, f"no docstring: {silent}"


def test_type_checkers_see_everything():
    links = ROOT / "typings" / "litropy"
    wanted = {path.name: path for path in (ROOT / "litropy").iterdir() if path.is_file()}
    wanted |= {name: ROOT / name for name in (*LAYERS, "configs")}
    wanted = {name: path for name, path in wanted.items() if path.suffix in ("", ".py", ".typed")}
    assert {link.name for link in links.iterdir()} == set(wanted), "link each in typings/litropy"
    for name, path in wanted.items():
        assert (links / name).resolve() == path, f"typings/litropy/{name} points elsewhere"


def run_python(code, folder):
    """Run code in a process of its own, away from the folder tests/litropy, which looks like a package."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_import_is_light(tmp_path):
    heavy = "{'torch', 'lightning', 'triton'} & set(sys.modules) or 'light'"
    run = run_python(f"import sys, litropy; print(litropy.__version__, {heavy})", tmp_path)
    assert run.stdout.split()[1:] == ["light"], run.stdout + run.stderr


def test_packages_import_without_triton_and_datasets(tmp_path):
    code = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name in ("triton", "datasets", "math_verify"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import litropy.losses, litropy.callbacks, litropy.recipes
"""
    run = run_python(code, tmp_path)
    assert run.returncode == 0, run.stderr[-800:]
