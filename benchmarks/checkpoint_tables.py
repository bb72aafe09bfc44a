"""Compressed checkpoints as Markdown: one table a case, and who did not run."""

from tables import SHORT_DTYPE, Record, number, table

_HEADER = ["contender", "threads", "size", "encode GB/s", "decode GB/s", "MiB to encode", "MiB to decode"]


def checkpoint(record: Record) -> str:
    """Every case, and why contenders or data are not there."""
    parts = [f"**{_title(case)}**\n\n{_results(case)}" for case in record["cases"]]
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
