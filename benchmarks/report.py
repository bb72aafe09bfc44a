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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

Record = dict[str, Any]


def records(benchmark: str) -> list[tuple[Path, Record]]:
    """Recorded results of a benchmark, one file a machine; smoke tests do not count."""
    paths = [path for path in sorted(RESULTS.glob(f"{benchmark}_*.json")) if not path.stem.endswith("_quick")]
    return [(path, json.loads(path.read_text())) for path in paths]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def _shape(case: Record) -> str:
    return f"N = {case['tokens']:,}, D = {case['width']:,}, V = {case['vocabulary']:,}"


def _provenance(record: Record, path: Path, in_docs: bool) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "transformers")
    # the site has docs/ as its root, and can't link to files outside it
    source = f"`{_relative(path)}`" if in_docs else f"[JSON]({_relative(path)})"
    return f"{machine['hardware']}; {versions}; commit {machine['commit']}, {machine['date']}; {source}."


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def headline(record: Record) -> list[Record]:
    """The cases of the shape with the most logits a byte of weight: the one that users of large vocabularies have."""
    last = record["cases"][-1]
    return [case for case in record["cases"] if _shape(case) == _shape(last)]


def linear_head_summary(in_docs: bool) -> str:
    """Plot and table of the headline shape on every machine."""
    parts = []
    for path, record in records("linear_head"):
        cases = headline(record)
        names = [result["name"] for result in cases[0]["results"]]
        header = ["forward + backward"]
        for case in cases:
            header += [f"ms, {SHORT_DTYPE[case['dtype']]}", f"MiB, {SHORT_DTYPE[case['dtype']]}"]
        rows = []
        for name in names:
            row = [name]
            for case in cases:
                result = next((result for result in case["results"] if result["name"] == name), {})
                row += [_number(result.get("median_ms")), _number(result.get("peak_extra_mib"))]
            rows.append(row)
        image = (
            f"![Time and memory of the loss, forward and backward]({'' if in_docs else 'docs/'}assets/{path.stem}.png)"
        )
        caption = f"{_shape(cases[0])}. Milliseconds are medians; MiB is peak memory beyond inputs and gradients."
        parts.append("\n\n".join([image, table(header, rows), f"{caption} {_provenance(record, path, in_docs)}"]))
    return "\n\n".join(parts) or _missing("linear_head")


def linear_head(in_docs: bool) -> str:
    """Every case on every machine, and who did not run."""
    parts = []
    for path, record in records("linear_head"):
        parts.append(f"### {record['machine']['hardware']}\n\n{_provenance(record, path, in_docs)}")
        for case in record["cases"]:
            naive = next((r["median_ms"] for r in case["results"] if r["name"] == record["baseline"]), None)
            header = ["", "median ms", "min ms", "of naive", "extra MiB", "input gradient", "weight gradient"]
            rows = [
                [
                    result["name"],
                    _number(result["median_ms"]),
                    _number(result["min_ms"]),
                    f"{result['median_ms'] / naive:.2f}" if naive else "-",
                    _number(result["peak_extra_mib"]),
                    f"{result['input_gradient_error']:.1e}",
                    f"{result['weight_gradient_error']:.1e}",
                ]
                for result in case["results"]
            ]
            parts.append(f"**{_shape(case)}, {SHORT_DTYPE[case['dtype']]}**\n\n{table(header, rows)}")
        missing = {peer["name"]: peer["reason"] for case in record["cases"] for peer in case["not_run"]}
        if missing:
            parts.append("Did not run here:\n\n" + "\n".join(f"- {name}: `{why}`" for name, why in missing.items()))
    return "\n\n".join(parts) or _missing("linear_head")


def quickstart_step(in_docs: bool) -> str:
    """A training step of the quickstart."""
    parts = []
    for path, record in records("quickstart_step"):
        rows = [[r["name"], _number(r["median_ms"]), _number(r["peak_extra_mib"])] for r in record["results"]]
        size = f"{record['parameters'] / 1e6:.1f} M parameters, V = {record['vocabulary']:,}"
        caption = (
            f"{size}, {record['batch_size']} x {record['sequence_length']} tokens, fp32."
            " MiB is peak memory beyond parameters and optimiser state."
        )
        header = ["training step", "median ms", "MiB"]
        parts.append(f"{table(header, rows)}\n\n{caption} {_provenance(record, path, in_docs)}")
    return "\n\n".join(parts) or _missing("quickstart_step")


def _missing(benchmark: str) -> str:
    return f"No results are recorded yet; `python benchmarks/{benchmark}.py` measures on your machine."


BLOCKS: dict[str, Callable[[bool], str]] = {
    "linear_head_summary": linear_head_summary,
    "linear_head": linear_head,
    "quickstart_step": quickstart_step,
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
            axis.bar_label(bars, [_number(value) if value else "" for value in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(f"{_shape(cases[0])}; {record['machine']['hardware']}", fontsize=10)
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


if __name__ == "__main__":
    main()
