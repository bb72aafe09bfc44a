"""Write tables and plots from ``results/*.json`` into README.md and docs/; nothing in them is typed by hand.

    python benchmarks/report.py           # rewrite the marked blocks, draw docs/assets/*.png
    python benchmarks/report.py --check   # fail if a block is not what the results say

A block stands between ``<!-- results: NAME -->`` and ``<!-- end of results -->``; ``BLOCKS`` has the names.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoint_tables
import collapse_tables
import steering_tables
import tables
from tables import ROOT, SHORT_DTYPE, Record, headline, number, provenance, shape

RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def records(benchmark: str) -> list[tuple[Path, Record]]:
    """Recorded results of a benchmark, one file a machine; smoke tests do not count."""
    paths = [path for path in sorted(RESULTS.glob(f"{benchmark}_*.json")) if not path.stem.endswith("_quick")]
    return [(path, json.loads(path.read_text())) for path in paths]


def _missing(benchmark: str) -> str:
    return f"No results are recorded yet; `python benchmarks/{benchmark}.py` measures on your machine."


def linear_head_summary(in_docs: bool) -> str:
    """Plot and table of the headline shape on every machine."""
    parts = []
    for path, record in records("linear_head"):
        image = f"{'' if in_docs else 'docs/'}assets/{path.stem}.png"
        caption = "Milliseconds are medians; MiB is peak memory beyond inputs and gradients."
        parts += [f"![Time and memory of the loss, forward and backward]({image})", tables.linear_head_summary(record)]
        parts.append(f"{shape(headline(record)[0])}. {caption} {provenance(record, path, in_docs)}")
    return "\n\n".join(parts) or _missing("linear_head")


def linear_head(in_docs: bool) -> str:
    """Every case on every machine, and who did not run."""
    parts = []
    for path, record in records("linear_head"):
        parts.append(f"### {record['machine']['hardware']}\n\n{provenance(record, path, in_docs)}")
        parts += [tables.linear_head_case(case, record["baseline"]) for case in record["cases"]]
        if missing := tables.missing_contenders(record["cases"]):
            parts.append(missing)
    return "\n\n".join(parts) or _missing("linear_head")


def _one_table(benchmark: str, render: Callable[[Record], str]) -> Callable[[bool], str]:
    def block(in_docs: bool) -> str:
        parts = [f"{render(record)} {provenance(record, path, in_docs)}" for path, record in records(benchmark)]
        return "\n\n".join(parts) or _missing(benchmark)

    return block


def compile_kernels(in_docs: bool) -> str:
    """The kernels on every target; which machine compiled them does not matter."""
    path = RESULTS / "compile_kernels.json"
    if not path.exists():
        return _missing("compile_kernels")
    record = json.loads(path.read_text())
    caption = f"Compiled by Triton {record['triton']}; where two values stand, with none / all of the options."
    return f"{caption}\n\n{tables.compile_kernels(record)}"


def collapse(in_docs: bool) -> str:
    """Collapses on every machine: numbers, figure and tables."""
    parts = []
    for path, record in records("collapse"):
        image = f"{'' if in_docs else 'docs/'}assets/{path.stem}.png"
        parts.append(f"{collapse_tables.collapse(record, image)} {provenance(record, path, in_docs)}")
    return "\n\n".join(parts) or _missing("collapse")


def steering(in_docs: bool) -> str:
    """What steering does on every machine: numbers, figure and tables."""
    parts = []
    for path, record in records("steering_methods"):
        image = f"{'' if in_docs else 'docs/'}assets/{path.stem}.png"
        parts.append(f"{steering_tables.steering(record, image)} {provenance(record, path, in_docs)}")
    return "\n\n".join(parts) or _missing("steering")


def checkpoint(in_docs: bool) -> str:
    """Compressed checkpoints on every machine: figure and tables."""
    parts = []
    for path, record in records("checkpoint"):
        image = f"{'' if in_docs else 'docs/'}assets/{path.stem}.png"
        parts.append(f"{checkpoint_tables.checkpoint(record, image)}\n\n{provenance(record, path, in_docs)}")
    return "\n\n".join(parts) or _missing("checkpoint")


BLOCKS: dict[str, Callable[[bool], str]] = {
    "linear_head_summary": linear_head_summary,
    "linear_head": linear_head,
    "quickstart_step": _one_table("quickstart_step", tables.quickstart_step),
    "survival": _one_table("survival", tables.survival),
    "attention_entropy": _one_table("attention_entropy", tables.attention_entropy),
    "monitor_cost": _one_table("monitor_cost", tables.monitor_cost),
    "steering_overhead": _one_table("steering_overhead", tables.steering_overhead),
    "checkpoint": checkpoint,
    "compile_kernels": compile_kernels,
    "collapse": collapse,
    "steering": steering,
}


def with_results(text: str, page: Path) -> str:
    """The text of a page with its blocks made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match.group(1)}{BLOCKS[match.group(2)](page.parent != ROOT)}\n{match.group(3)}"

    return _BLOCK.sub(fill, text)


def pages() -> list[Path]:
    """Pages with blocks."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in candidates if _BLOCK.search(path.read_text())]


def draw(path: Path, record: Record) -> None:
    """Bars of time and memory at the headline shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = headline(record)
    names = [result["name"] for result in cases[0]["results"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.45 * len(names) + 1.4), sharey=True, layout="constrained")
    height = 0.8 / len(cases)
    for axis, key, title in zip(
        axes,
        ("median_ms", "peak_extra_mib"),
        ("time, forward + backward [ms]", "memory beyond gradients [MiB]"),
        strict=True,
    ):
        for index, case in enumerate(cases):
            found = {result["name"]: result[key] for result in case["results"]}
            values = [found.get(name) or 0 for name in names]
            places = [row + (index - (len(cases) - 1) / 2) * height for row in range(len(names))]
            bars = axis.barh(places, values, height=height, label=SHORT_DTYPE[case["dtype"]])
            axis.bar_label(bars, [number(value) if value else "" for value in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(f"{shape(cases[0])}; {record['machine']['hardware']}", fontsize=10)
    ASSETS.mkdir(parents=True, exist_ok=True)
    figure.savefig(ASSETS / f"{path.stem}.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something is out of date")
    check = parser.parse_args().check
    stale = [path for path in pages() if with_results(path.read_text(), path) != path.read_text()]
    if check:
        sys.exit(f"Out of date, run python benchmarks/report.py: {[path.name for path in stale]}" if stale else 0)
    for path in stale:
        path.write_text(with_results(path.read_text(), path))
        print(f"Wrote {path.relative_to(ROOT)}")
    for path, record in records("linear_head"):
        draw(path, record)
    for path, record in records("checkpoint"):
        checkpoint_tables.draw(ASSETS / f"{path.stem}.png", record)
    for path, record in records("collapse"):
        collapse_tables.draw(ASSETS / f"{path.stem}.png", record)
    for path, record in records("steering_methods"):
        steering_tables.draw(ASSETS / f"{path.stem}.png", record)


if __name__ == "__main__":
    main()
