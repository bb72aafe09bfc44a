"""Results as Markdown: one function for each benchmark."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Record = dict[str, Any]


def table(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """A Markdown table; numbers, which is all but the first ``texts`` columns, to the right."""
    lines = [header, [*["---"] * texts, *["---:"] * (len(header) - texts)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """A measurement in two digits or more."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def shape(case: Record) -> str:
    """N, D and V of a case."""
    return f"N = {case['tokens']:,}, D = {case['width']:,}, V = {case['vocabulary']:,}"


def provenance(record: Record, path: Path, in_docs: bool) -> str:
    """Where and when something was measured."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "transformers")
    # the site has docs/ as its root, and can't link to files outside it
    relative = path.relative_to(ROOT).as_posix()
    source = f"`{relative}`" if in_docs else f"[JSON]({relative})"
    return f"{machine['hardware']}; {versions}; commit {machine['commit']}, {machine['date']}; {source}."


def headline(record: Record) -> list[Record]:
    """The cases of the last shape: the one that users of large vocabularies have."""
    last = record["cases"][-1]
    return [case for case in record["cases"] if shape(case) == shape(last)]


def linear_head_summary(record: Record) -> str:
    """Time and memory at the headline shape."""
    cases = headline(record)
    header = ["forward + backward"]
    for case in cases:
        header += [f"ms, {SHORT_DTYPE[case['dtype']]}", f"MiB, {SHORT_DTYPE[case['dtype']]}"]
    rows = []
    for name in [result["name"] for result in cases[0]["results"]]:
        row = [name]
        for case in cases:
            result = next((result for result in case["results"] if result["name"] == name), {})
            row += [number(result.get("median_ms")), number(result.get("peak_extra_mib"))]
        rows.append(row)
    return table(header, rows)


def linear_head_case(case: Record, baseline: str) -> str:
    """Everything about one problem."""
    naive = next((result["median_ms"] for result in case["results"] if result["name"] == baseline), None)
    skips = any("surviving_share" in result for result in case["results"])
    header = ["", "median ms", "min ms", "of naive", "extra MiB", "loss", "input gradient", "weight gradient"]
    header += ["tiles kept", "mass skipped"] if skips else []
    rows = []
    for result in case["results"]:
        row = [result["name"], number(result["median_ms"]), number(result["min_ms"])]
        row += [f"{result['median_ms'] / naive:.2f}" if naive else "-", number(result["peak_extra_mib"])]
        row += [f"{result[key]:.1e}" for key in ("loss_error", "input_gradient_error", "weight_gradient_error")]
        if skips and "surviving_share" in result:
            row += [f"{result['surviving_share']:.0%}", f"{result['mean_skipped_mass']:.1e}"]
        elif skips:
            row += ["", ""]
        rows.append(row)
    data = "Random numbers" if case["data"] == "random" else "Trained model"
    return f"**{data}, {shape(case)}, {SHORT_DTYPE[case['dtype']]}**\n\n{table(header, rows)}"


def missing_contenders(cases: list[Record]) -> str:
    """Who did not run, and why; empty if everybody did."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for peer in case["not_run"]:
            where = f"{shape(case)}, {SHORT_DTYPE[case['dtype']]}"
            reasons.setdefault((peer["name"], peer["reason"]), []).append(where)
    lines = []
    for (name, why), where in reasons.items():
        some = f" ({'; '.join(where)})" if len(where) < len(cases) else ""
        lines.append(f"- {name}{some}: `{why}`")
    return "Did not run here:\n\n" + "\n".join(lines) if lines else ""


def quickstart_step(record: Record) -> str:
    """A training step of the quickstart."""
    rows = [[r["name"], number(r["median_ms"]), number(r["peak_extra_mib"])] for r in record["results"]]
    caption = (
        f"{record['parameters'] / 1e6:.1f} M parameters, V = {record['vocabulary']:,},"
        f" {record['batch_size']} x {record['sequence_length']} tokens, fp32."
        " MiB is peak memory beyond parameters and optimiser state."
    )
    return f"{table(['training step', 'median ms', 'MiB'], rows)}\n\n{caption}"


def attention_entropy(record: Record) -> str:
    """Reading the entropy of attention against storing attention, every shape."""
    parts = []
    for case in record["cases"]:
        rows = []
        for result in case["results"]:
            error = result["largest_error"]
            row = [result["name"], number(result["median_ms"]), number(result["peak_extra_mib"])]
            rows.append([*row, "" if error is None else f"{error:.1e}"])
        heads = f"{case['heads']}" + (f" ({case['kv_heads']} of keys)" if case["kv_heads"] != case["heads"] else "")
        caption = f"B = {case['batch']}, H = {heads}, T = {case['length']:,}, D = {case['width']}"
        header = ["", "median ms", "MiB", "largest error, nats"]
        parts.append(f"**{caption}, {SHORT_DTYPE[case['dtype']]}**\n\n{table(header, rows)}")
    return "\n\n".join(parts) + "\n\n"


def monitor_cost(record: Record) -> str:
    """What each monitor adds to a step."""
    header = ["", "probes", "probe, ms", "standard error", "between, ms", "amortised, ms", "of a step", "MiB"]
    rows = []
    for result in record["results"]:
        every = result.get("every_n_steps")
        between = result.get("between_probes_ms")
        rows.append(
            [
                result["name"],
                f"1 in {every}" if every else "",
                number(result["probe_extra_ms"]),
                number(result["probe_extra_error_ms"]),
                "" if between is None else f"{between:.2f}",
                f"{result['amortised_ms']:.2f}",
                f"{result['amortised_share']:.2%}",
                number(result["peak_extra_mib"]),
            ]
        )
    caption = (
        f"{record['model']}, {record['parameters'] / 1e6:.0f} M parameters, {record['batch_size']} x"
        f" {record['sequence_length']} tokens, fp32; a step without monitors takes {number(record['step_ms'])} ms."
        f" A heat-map takes {number(record['heatmap_ms'])} ms, once in 2,000 steps at most. MiB is peak memory beyond"
        " that of an unwatched step."
    )
    return f"{table(header, rows, texts=2)}\n\n{caption}"


def steering_overhead(record: Record) -> str:
    """What each steering method adds to a step of GRPO, the dearest first."""
    rows = []
    for result in sorted(record["results"], key=lambda result: -result["of_step"]):
        of_update = result["of_update"]
        rows.append(
            [
                result["name"] if " " in result["name"] else f"`{result['name']}`",
                result["beside"] if " " in result["beside"] else f"`{result['beside']}`",
                result["reason"] or "",
                f"{result['added_ms']:.1f}",
                f"{result['error_ms']:.1f}",
                f"{result['of_step']:.1%}",
                "" if of_update is None else f"{of_update:.1%}",
            ]
        )
    model = record["model"]
    caption = (
        f"{record['parameters'] / 1e6:.1f} M parameters, V = {model['vocab_size']:,}, fp32,"
        f" {record['prompts'] * record['group_size']} responses of {record['length']} tokens, two optimiser steps;"
        f" a step of GRPO takes {number(record['step_ms'])} ms, its update {number(record['update_ms'])} ms."
    )
    header = [
        "fragment",
        "compared with",
        "takes by its nature",
        "added, ms",
        "standard error",
        "of a step",
        "of an update",
    ]
    return f"{table(header, rows, texts=3)}\n\n{caption}"


def survival(record: Record) -> str:
    """The share of tiles that survive, for every order of the vocabulary and every tile."""
    cases, tolerances = record["cases"], record["tolerances"]
    header = ["order of the vocabulary", "tile", *[f"{case['data']}, {tol:g}" for case in cases for tol in tolerances]]
    shares: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for row in case["rows"]:
            key = row["order"], f"{row['tile'][0]} x {row['tile'][1]}"
            shares.setdefault(key, []).append(f"{row['surviving_share']:.1%}")
    about = "; ".join(
        f"{case['data']}: {shape(case)}, loss {case['loss']:.2f} nats, entropy {case['mean_entropy']:.2f} nats"
        for case in cases
    )
    return f"{table(header, [[*key, *row] for key, row in shares.items()], texts=2)}\n\n{about}."


def compile_kernels(record: Record) -> str:
    """What each kernel takes on each target: without options / with all of them."""
    header = ["kernel", "dtype", "registers", "spilled bytes", "shared memory", "instruction", "loads"]
    rows: dict[str, dict[tuple[str, str], dict[str, Record]]] = {}
    for row in record["rows"]:
        of_target = rows.setdefault(row["target"], {})
        of_target.setdefault((row["kernel"], row["dtype"]), {})[row["options"]] = row
    parts = []
    for target, kernels in rows.items():
        lines = []
        for (kernel, dtype), by_options in kernels.items():
            pair = [by_options["none"], by_options["all"]]
            keys = ("registers", "spills", "shared_memory", "matrix_instruction", "loads")
            both = [" / ".join(dict.fromkeys(f"{row[key]}" for row in pair)) for key in keys]
            lines.append([f"`{kernel}`", SHORT_DTYPE[dtype], *both])
        limit = f"A program may use {record['shared_memory_limit'][target]:,} bytes of shared memory."
        parts.append(f"### {target}\n\n{limit}\n\n{table(header, lines, texts=2)}")
    return "\n\n".join(parts)
