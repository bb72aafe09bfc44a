"""Compressed checkpoints as Markdown and as a figure: one table a case, and who did not run."""

from pathlib import Path

from tables import SHORT_DTYPE, Record, number, table

_HEADER = ["contender", "threads", "size", "encode GB/s", "decode GB/s", "MiB to encode", "MiB to decode"]


# what the figure shows, of one thread: key of a result, title, factor
_PANELS = (
    ("ratio", "size [%]", 100),
    ("encode_gb_per_s", "encode [GB/s]", 1),
    ("decode_gb_per_s", "decode [GB/s]", 1),
)


def checkpoint(record: Record, image: str | None = None) -> str:
    """Every case, how long a step waits, and why contenders or data are not there."""
    parts = [f"![Size and rates of each contender]({image})"] if image and headline(record) else []
    parts += [f"**{_title(case)}**\n\n{_results(case)}" for case in record["cases"]]
    if "saving" in record:
        parts.append(_saving(record["saving"]))
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in record["cases"]:
        for row in case["not_run"]:
            reasons.setdefault((row["name"], row["reason"]), []).append(_short(case))
    absent = [
        f"- {name} ({'; '.join(cases) if len(cases) < len(record['cases']) else 'all'}): `{reason}`"
        for (name, reason), cases in reasons.items()
    ]
    absent += [f"- {row['data']}: `{row['reason']}`" for row in record["missing"]]
    return "\n\n".join([*parts, *(["Not run:\n\n" + "\n".join(absent)] if absent else [])])


def _short(case: Record) -> str:
    apart = f", {case['apart']} steps apart" if case["apart"] else ""
    return f"{case['data']}, {SHORT_DTYPE.get(case['dtype'], 'fp32')}{apart}"


def _title(case: Record) -> str:
    of = "the differences" if case["apart"] else "the words"
    return f"{_short(case)}, {case['bytes'] / 1e6:,.1f} MB; entropy of {of} {case['entropy']:.2%}"


def _results(case: Record) -> str:
    rows = []
    for result in case["results"]:
        rates = [result.get("encode_gb_per_s"), result.get("decode_gb_per_s")]
        memory = [result.get("encode_extra_mib"), result.get("decode_extra_mib")]
        shown = ["-" if rate is None else f"{rate:.2f}" for rate in rates] + [number(value) for value in memory]
        rows.append([result["name"], str(result["threads"]), f"{result['ratio']:.2%}", *shown])
    return table(_HEADER, rows)


def _saving(found: Record) -> str:
    """How long a training step waits for a checkpoint."""
    rows = [[name.removesuffix("_ms"), f"{value:,.1f}"] for name, value in found.items() if name.endswith("_ms")]
    rows = [["copying the tensors alone" if name == "copy" else name, value] for name, value in rows]
    title = f"**How long a step waits for a checkpoint of {found['bytes'] / 1e6:,.1f} MB in float32**"
    return f"{title}\n\n{table(['saved by', 'ms'], rows)}"


def headline(record: Record) -> list[Record]:
    """The cases of the figure: a published model's weights, and what training keeps."""
    return [
        case
        for case in record["cases"]
        if not case["apart"] and case["data"] in ("MiniLM", "quickstart with AdamW") and case["results"]
    ]


def draw(path: Path, record: Record) -> None:
    """Bars of size and rates, one row a case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = headline(record)
    if not cases:
        return
    figure = Figure(figsize=(11, 2.6 * len(cases) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for row, case in zip(figure.subplots(len(cases), len(_PANELS), squeeze=False), cases, strict=True):
        results = [result for result in case["results"] if result["threads"] == 1]
        colours = ["tab:blue" if result["name"].startswith("litropy") else "tab:gray" for result in results]
        for axis, (key, title, factor) in zip(row, _PANELS, strict=True):
            values = [factor * (result.get(key) or 0) for result in results]
            bars = axis.barh(range(len(results)), values, color=colours)
            axis.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], padding=2, fontsize=7)
            axis.set_title(title, fontsize=9)
            axis.set_yticks(range(len(results)), [result["name"] for result in results] if axis is row[0] else [])
            axis.tick_params(labelsize=7)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(_short(case), fontsize=9)
    figure.supxlabel(f"one thread; {record['machine']['hardware']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
