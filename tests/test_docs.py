"""The pages agree with the code: links, the lists that they hold, and tables that come from results."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from litropy import callbacks
from litropy.config_files import packaged_configs
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
    listed = re.findall(r"^\| `([\w/]+\.yaml)`", (DOCS / "configs.md").read_text(), re.MULTILINE)
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


def test_images_of_results_are_there():
    for page in PAGES:
        for image in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text()):
            assert (page.parent / image).is_file(), f"{image}: run python benchmarks/report.py"
