"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    f"litropy.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
    for folder in ("kernels", "losses", "callbacks", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
] + sorted(f"litropy.{path.stem}" for path in (ROOT / "litropy").glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=flags, extraglobs={"torch": torch})
    assert failed == 0, f"{failed} examples of {name} are wrong: python -m doctest shows them"
