"""The pages agree with the code: links, the lists that they hold, and tables that come from results."""

import ast
import dataclasses
import doctest
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from litropy import callbacks
from litropy.config_files import packaged_configs
from litropy.kernels.compile_report import DTYPES, KERNELS, TARGETS
from litropy.losses import HeadStats, linear_cross_entropy
from litropy.testing import TINY_CAUSAL_LMS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), ROOT / "kernels" / "README.md", *sorted(DOCS.rglob("*.md"))]


def anchors(page):
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def section(page, heading):
    """Text under a heading."""
    return page.read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert page.parent != DOCS or linked.is_relative_to(DOCS), f"the site cannot link to {target}"
        assert not anchor or anchor in anchors(linked), f"{linked.name} has no heading for #{anchor}"


def test_every_page_is_in_the_navigation():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(path for entry in nav for path in entry.values()) == sorted(path.name for path in DOCS.glob("*.md"))


def test_verified_architectures_are_those_that_are_tested():
    listed = re.findall(r"`(\w+)`", section(DOCS / "language_model.md", "## Verified architectures"))
    assert listed == sorted(TINY_CAUSAL_LMS)


def test_every_packaged_config_is_described():
    pages = "\n".join((DOCS / name).read_text() for name in ("configs.md", "steering.md"))
    listed = re.findall(r"^\| `([\w/]+\.yaml)`", pages, re.MULTILINE)
    assert sorted(listed) == sorted(packaged_configs())


def test_every_callback_is_described():
    text = (DOCS / "callbacks.md").read_text()
    for name in callbacks.__all__:
        assert f"| `{name}` |" in text
        assert f"::: litropy.callbacks.{name}\n" in text


def test_tables_say_what_the_results_say():
    script = ROOT / "benchmarks" / "report.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def examples(page):
    """The examples of a page, one after the other."""
    return "\n".join(re.findall(r"^```pycon\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(examples(page), {}, page.name, str(page), 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0, capsys.readouterr().out


def test_every_option_of_the_loss_has_an_example():
    options = set(inspect.signature(linear_cross_entropy).parameters) - {"input", "linear_weight", "target"}
    assert not {name for name in options if f"{name}=" not in examples(DOCS / "losses.md")}


def test_every_statistic_is_described():
    first_cells = re.findall(r"^\| (`.*?) \|", section(DOCS / "losses.md", "## Statistics"), re.MULTILINE)
    listed = re.findall(r"`(\w+)`", " ".join(first_cells))
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(HeadStats))


def rows_of(text):
    """Cells of the rows of the tables in a text, without their headers."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] not in ("---", "feature")]


def test_every_feature_is_tested():
    """The table of features says yes where a test is named, and that test is there."""
    page = DOCS / "comparison.md"
    features, tests = page.read_text().split("## Where that is tested")
    named = {feature: re.findall(r"`(tests/\S+?)::(\w+)`", cell) for feature, cell in rows_of(tests)}
    assert [row[0] for row in rows_of(features) if row[1] in ("yes", "part")] == list(named)
    for feature, places in named.items():
        assert places, feature
        for path, name in places:
            tree = ast.parse((ROOT / path).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{feature}: {path} has no {name}"


def test_every_kernel_is_in_the_compiled_table_for_every_target():
    wanted = [(kernel.__name__, dtype) for kernel in KERNELS for dtype in DTYPES.values()]
    parts = re.split(r"^### (\w+)$", (DOCS / "compiled_kernels.md").read_text(), flags=re.MULTILINE)[1:]
    assert parts[::2] == list(TARGETS)
    for target, text in zip(parts[::2], parts[1::2], strict=True):
        listed = [(row[0].strip("`"), row[1]) for row in rows_of(text) if row[0] != "kernel"]
        assert listed == wanted, f"{target}: run python benchmarks/compile_kernels.py && python benchmarks/report.py"


def test_images_of_results_are_there():
    for page in PAGES:
        for image in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text()):
            assert (page.parent / image).is_file(), f"{image}: run python benchmarks/report.py"
