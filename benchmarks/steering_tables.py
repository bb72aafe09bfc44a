"""Results of the steering benchmark as Markdown and as a figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collapse_tables import span
from tables import Record, table

BASELINE = "grpo"
# what the runs are held to: share of entropy that is lost, nats from the target, and how many points that is about
COLLAPSE, HELD, LAST_QUARTER = 0.8, 0.1, 4
# differences that count: answers, and share of right responses
_ANSWERS, _SHARE = 0.1, 0.05
_END = 3  # points that an end is the mean of
_VERDICTS = ("helps", "trades accuracy", "no clear difference", "hurts", "not enough runs")


def runs_of(record: Record, task: str, method: str) -> list[Record]:
    """The runs of a method that are as long as they should be, by seed."""
    batches = record["batches"][task]
    found = [r for r in record["runs"] if (r["task"], r["method"], r["batches"]) == (task, method, batches)]
    return sorted(found, key=lambda run: run["seed"])


def end(run: Record, curve: str) -> float:
    """Mean of the last points of a curve."""
    return statistics.fmean(run["curves"][curve][-_END:])


def kept(run: Record) -> float:
    """Share of the entropy that is left in the end."""
    return end(run, "entropy") / run["curves"]["entropy"][0]


def differences(record: Record, task: str, method: str, curve: str) -> list[float]:
    """A method's ends less those of GRPO with the same seed."""
    baseline = {run["seed"]: end(run, curve) for run in runs_of(record, task, BASELINE)}
    return [end(r, curve) - baseline[r["seed"]] for r in runs_of(record, task, method) if r["seed"] in baseline]


def as_accurate(record: Record, task: str, run: Record) -> float | None:
    """The most distinct right answers that GRPO had with the same seed while it was as accurate as a run's end."""
    share = end(run, "pass_at_1")
    curves = [other["curves"] for other in runs_of(record, task, BASELINE) if other["seed"] == run["seed"]]
    points = [point for c in curves for point in zip(c["pass_at_1"], c["distinct_correct"], strict=True)]
    return max((answers for right, answers in points if right >= share - 1e-9), default=None)


def usual_spread(record: Record, task: str, curve: str) -> float:
    """The median over methods of the standard deviation of their ends: what a seed and chance make of one run."""
    ends = [[end(run, curve) for run in runs_of(record, task, name)] for name in record["methods"][task]]
    return statistics.median([statistics.stdev(values) for values in ends if len(values) > 1] or [0.0])


def clearly(record: Record, task: str, method: str, curve: str, least: float) -> int:
    """1 or -1 if a method's ends differ from GRPO's, by more than chance makes of them; else 0.

    The standard error is that of the differences, and at least that of two means of runs with the usual spread: three
    differences can agree by chance, and all methods are compared with the same three runs.
    """
    values = differences(record, task, method, curve)
    mean, number = statistics.fmean(values), len(values)
    usual = usual_spread(record, task, curve) * math.sqrt(2 / number)
    error = max(statistics.stdev(values) / math.sqrt(number), usual)
    return 0 if abs(mean) < max(least, 2 * error) else 1 if mean > 0 else -1


def verdict(record: Record, task: str, method: str) -> str:
    """What a method changes, against GRPO with the same seeds."""
    share = differences(record, task, method, "pass_at_1")
    if len(share) < 2:
        return "not enough runs"
    more = clearly(record, task, method, "distinct_correct", _ANSWERS)
    righter = clearly(record, task, method, "pass_at_1", _SHARE)
    if more > 0:
        return "helps" if statistics.fmean(share) > -_SHARE else "trades accuracy"
    if righter > 0 and more == 0:
        return "helps"
    return "hurts" if more < 0 or righter < 0 else "no clear difference"


def helps_diversity(record: Record, task: str) -> list[str]:
    """Methods with clearly more distinct right answers than GRPO at equal accuracy."""
    return [
        name
        for name in record["methods"][task]
        if name != BASELINE
        and verdict(record, task, name) == "helps"
        and clearly(record, task, name, "distinct_correct", _ANSWERS) > 0
    ]


def last_quarter(run: Record, curve: str = "entropy") -> list[float]:
    """The points of a curve in the last quarter of a run."""
    points = run["curves"][curve]
    return points[-max(1, len(points) // LAST_QUARTER) :]


def held(run: Record, target: float | str) -> bool:
    """Whether the entropy is near the target at every point of the last quarter."""
    wanted = run["curves"]["entropy"][0] if target == "start" else float(target)
    return all(abs(entropy - wanted) < HELD for entropy in last_quarter(run))


def collapses(run: Record) -> bool:
    """Whether the entropy falls by as much as it should without steering."""
    return kept(run) <= 1 - COLLAPSE


def facts_table(record: Record) -> str:
    """What was to be reached, and in how many runs it was."""
    tasks = list(record["methods"])
    rows = [[f"GRPO loses {COLLAPSE:.0%} of its entropy"], ["more distinct right answers at equal accuracy"]]
    targets = {name: None for task in tasks for name, about in record["methods"][task].items() if about["target"]}
    rows.append(["methods that help / trade accuracy / make no clear difference / hurt"])
    rows += [[f"`{name}` holds its target within {HELD} nats"] for name in targets]
    for task in tasks:
        baseline = runs_of(record, task, BASELINE)
        lost = span((100 * (1 - kept(run)) for run in baseline), "{:.0f} %")
        rows[0].append(_reached(len(list(filter(collapses, baseline))), len(baseline), lost))
        better = helps_diversity(record, task)
        rows[1].append(", ".join(f"`{name}`" for name in better) or "**none**")
        said = [verdict(record, task, name) for name in record["methods"][task] if name != BASELINE]
        rows[2].append(" / ".join(str(said.count(kind)) for kind in _VERDICTS[:4]))
        for row, name in zip(rows[3:], targets, strict=True):
            target, runs = record["methods"][task][name]["target"], runs_of(record, task, name)
            if target == "start":
                text = f"from {span((run['curves']['entropy'][0] for run in runs), '{:.2f}')}"
            else:
                text = f"H* = {target:g}"
            seen = span((entropy for run in runs for entropy in last_quarter(run)), "{:.2f}")
            row.append(_reached(sum(held(run, target) for run in runs), len(runs), f"{text}, last quarter {seen}"))
    return table(["to be reached", *tasks], rows, texts=1 + len(tasks))


def _reached(good: int, of: int, measured: str) -> str:
    if not of:
        return "not run"
    return f"{'all' if good == of else f'**only {good}**'} of {of}: {measured}"


def _spread(runs: Sequence[Record], curve: str) -> str:
    values = [end(run, curve) for run in runs]
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def methods_table(record: Record, task: str) -> str:
    """How every method ends at a task: those that help first, by their distinct right answers."""
    header = ["method", "changed in the fragment", "runs", "entropy", "of its start", "pass@1"]
    header += [f"distinct-correct@{record['k']}", "GRPO's when as accurate", "against GRPO"]
    rows = []
    for name, about in record["methods"][task].items():
        runs = runs_of(record, task, name)
        if not runs:
            continue
        changes = ", ".join(f"`{key.split('.')[-1]}: {value:g}`" for key, value in about["changes"].items()) or "-"
        share = f"{statistics.fmean(map(kept, runs)):.0%}"
        row = [f"`{name}`", changes, str(len(runs)), _spread(runs, "entropy"), share]
        row += [_spread(runs, curve) for curve in ("pass_at_1", "distinct_correct")]
        known = [best for run in runs if (best := as_accurate(record, task, run)) is not None]
        row.append(f"{statistics.fmean(known):.2f}" if known and name != BASELINE else "-")
        said = verdict(record, task, name)
        answers = statistics.fmean(end(run, "distinct_correct") for run in runs)
        order = (name != BASELINE, _VERDICTS.index(said), -answers)
        rows.append((order, [*row, "-" if name == BASELINE else said]))
    return table(header, [row for _, row in sorted(rows)], texts=2)


def incomplete(record: Record) -> str:
    """How many runs are still to be made; empty if there are none."""
    missing = [
        f"{task}, `{name}` ({made} of {record['seeds']})"
        for task, methods in record["methods"].items()
        for name in methods
        if (made := len(runs_of(record, task, name))) < record["seeds"]
    ]
    return f"Not all runs have been made yet: {'; '.join(missing)}." if missing else ""


def steering(record: Record, image: str) -> str:
    """Everything about the runs of one machine."""
    parts = [facts_table(record), f"![Entropy, distinct right answers and accuracy over batches]({image})"]
    for task in record["methods"]:
        runs = [run for run in record["runs"] if run["task"] == task]
        minutes = sum(run["cpu_seconds"] for run in runs) / 60
        parts += [f"### {task.capitalize()}", methods_table(record, task)]
        parts.append(f"{len(runs)} runs of {record['batches'][task]} batches, {minutes:.0f} minutes of processor time.")
    commits = ", ".join(dict.fromkeys(run["commit"] for run in record["runs"]))
    parts += [incomplete(record), f"Runs were made at commit {commits}."]
    return "\n\n".join(part for part in parts if part)


# colours of the lines in the figure
_LINES = {
    "grpo": "#222222",
    "clip_higher": "#937860",
    "clip_cov-here": "#dd8452",
    "kl_cov-here": "#55a868",
    "reference_kl": "#da8bc3",
    "entropy_bonus-here": "#8172b2",
    "skywork-here": "#4c72b0",
    "entropy_target-here": "#c44e52",
}
_ROWS = {"entropy": "entropy [nats a token]", "distinct_correct": "distinct-correct@{k}", "pass_at_1": "pass@1"}


def draw(path: Path, record: Record) -> None:
    """Draw curves of some methods: means over seeds, between the lowest and the highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    tasks = list(record["methods"])
    for column, task in zip(figure.subplots(len(_ROWS), len(tasks), squeeze=False).T, tasks, strict=True):
        column[0].set_title(f"{task}, {record['batches'][task]} batches", fontsize=10)
        for axis, (curve, title) in zip(column, _ROWS.items(), strict=True):
            for name, colour in _LINES.items():
                _line(axis, runs_of(record, task, name), curve, name, colour)
            axis.set_ylabel(title.format(k=record["k"]))
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel("batch of responses")
    figure.axes[0].legend(frameon=False, fontsize=8)
    seeds = f"means over {record['seeds']} seeds, shaded from lowest to highest"
    figure.supxlabel(f"{seeds}; {record['machine']['hardware']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _line(axis: Any, runs: Sequence[Record], curve: str, label: str, colour: str) -> None:
    if not runs:
        return
    points = list(zip(*(run["curves"][curve] for run in runs), strict=True))
    batches = runs[0]["curves"]["batch"]
    axis.plot(batches, [statistics.fmean(point) for point in points], color=colour, label=label)
    axis.fill_between(batches, list(map(min, points)), list(map(max, points)), color=colour, alpha=0.15, linewidth=0)
