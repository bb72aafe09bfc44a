"""Results of the collapse benchmark as Markdown and as a figure."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tables import Record, table

# what the runs are held to
SOON, HEALTHY_ENTROPY, RECOVERED = 60, 0.8, 0.5
# nats by which a loss is behind, and share by which it may be above the healthy one to count as reaching it
BEHIND, AS_GOOD = 0.1, 0.01
_WARN, _CRITICAL = 1, 2


def runs_of(record: Record, *names: str) -> list[Record]:
    """The runs of some scenarios that are as long as they should be."""
    steps = {name: record["scenarios"][name]["steps"] for name in names}
    return [run for run in record["runs"] if steps.get(run["scenario"]) == run["steps"]]


def first_alarm(run: Record, level: int = _WARN, rule: str = "") -> Record | None:
    """The first alarm of a run from a level on."""
    return next((a for a in run["alarms"] if a["level"] >= level and rule in a["rule"]), None)


def lead_time(run: Record) -> int | None:
    """Steps from the first alarm to the step at which the loss shows it; None if one of them is missing."""
    alarm = first_alarm(run)
    return None if alarm is None or run["loss_shows"] is None else run["loss_shows"] - alarm["raised"]


def healthy_run(record: Record, seed: int) -> Record | None:
    """The longest healthy run of a seed."""
    runs = [run for run in record["runs"] if (run["scenario"], run["seed"]) == ("healthy", seed)]
    return max(runs, key=lambda run: run["steps"], default=None)


def healthy_losses(record: Record, run: Record) -> list[float] | None:
    """Training losses of the healthy run of the same seed, as far as the run goes; None for other data or depths."""
    scenario, healthy = (record["scenarios"][name] for name in (run["scenario"], "healthy"))
    if any(scenario[key] != healthy[key] for key in ("task", "layers")):
        return None
    number, twin = len(run["train_loss"]), healthy_run(record, run["seed"])
    return twin["train_loss"][:number] if twin is not None and len(twin["train_loss"]) >= number else None


def behind_healthy(record: Record, run: Record) -> float | None:
    """By how many nats the last losses are above those of the healthy run."""
    healthy = healthy_losses(record, run)
    return None if healthy is None else _last(run["train_loss"]) - _last(healthy)


def falls_behind(record: Record, run: Record) -> int | None:
    """After how many steps the mean of the last 20 losses is first behind that of the healthy run."""
    healthy = healthy_losses(record, run) or []
    for blocks in range(2, len(healthy) + 1):
        if _last(run["train_loss"][:blocks]) - _last(healthy[:blocks]) > BEHIND:
            return blocks * record["every_n_steps"]
    return None


def _last(losses: Sequence[float]) -> float:
    return sum(losses[-2:]) / 2


def at_step(run: Record, curve: str, step: int) -> float:
    """The last point of a curve that is not after a step."""
    return max(zip(run["curves"]["step"], run["curves"][curve], strict=True), key=lambda p: (p[0] <= step, p[0]))[1]


def span(values: Iterable[Any], style: str = "{:.0f}") -> str:
    """The smallest and the largest of some numbers; a dash where they are missing."""
    known = list(values)
    if not known or all(value is None for value in known):
        return "-"
    if None in known:
        return f"{span([value for value in known if value is not None], style)} in {sum(v is not None for v in known)}"
    low, high = style.format(min(known)), style.format(max(known))
    return low if low == high else f"{low} to {high}"


def alarms_table(record: Record) -> str:
    """When alarms came and the loss showed it, of runs without remedies."""
    header = ["run", "rate", "runs x steps", "first alarm", "by the rule", "critical", "the loss shows it", "lead time"]
    header += ["behind healthy"]
    rows = []
    for name, scenario in record["scenarios"].items():
        runs = runs_of(record, name)
        if scenario["kind"] not in ("healthy", "works", "collapse") or not runs:
            continue
        alarms = [first_alarm(run) for run in runs]
        rules = sorted(set().union(*map(_first_rules, runs)))
        critical = [first_alarm(run, _CRITICAL) for run in runs]
        row = [scenario["title"], f"{scenario['learning_rate']:g}", f"{len(runs)} x {scenario['steps']}"]
        row += [span(_raised(alarms)), ", ".join(rules) or "-", span(_raised(critical))]
        row += [span(run["loss_shows"] for run in runs), span(map(lead_time, runs))]
        behind = [falls_behind(record, run) for run in runs]
        rows.append([*row, span(behind) if scenario["kind"] == "collapse" else "-"])
    return table(header, rows)


def _raised(alarms: Iterable[Record | None]) -> list[int | None]:
    return [None if alarm is None else alarm["raised"] for alarm in alarms]


def _first_rules(run: Record) -> set[str]:
    """All rules that raised their alarms together with the first one."""
    return {f"`{alarm['rule']}`" for alarm in run["alarms"] if alarm["raised"] == run["alarms"][0]["raised"]}


def ends_table(record: Record) -> str:
    """How runs end, and what remedies change."""
    header = ["run", "rate", "runs x steps", "loss", "above healthy", "attention entropy", "of one head", "max logit"]
    header += ["warned", "critical"]
    rows = []
    for name, scenario in sorted(record["scenarios"].items(), key=lambda item: item[1]["learning_rate"]):
        runs = runs_of(record, name)
        if not runs:
            continue
        row = [scenario["title"], f"{scenario['learning_rate']:g}", f"{len(runs)} x {scenario['steps']}"]
        row += [span((run["end"]["train_loss"] for run in runs), "{:.2f}")]
        row += [span((behind_healthy(record, run) for run in runs), "{:+.2f}") if name != "healthy" else "-"]
        row += [span((run["end"][key] for run in runs), "{:.2f}") for key in ("entropy", "least_entropy")]
        row.append(span((run["end"]["logit"] for run in runs), "{:,.0f}"))
        rows.append([*row, *(str(sum(first_alarm(run, level) is not None for run in runs)) for level in (1, 2))])
    return table(header, rows)


def numbers_table(record: Record) -> str:
    """What was to be reached, and whether it was."""
    kinds = {name: scenario["kind"] for name, scenario in record["scenarios"].items()}
    collapses = runs_of(record, *[name for name, kind in kinds.items() if kind == "collapse"])
    healthy, works = runs_of(record, "healthy"), runs_of(record, "copy", "sharp")
    sigma = [run for run in runs_of(record, "sigma_reparam") if behind_healthy(record, run) is not None]
    recovered = runs_of(record, "recovery", "recovery_2_layers")
    ranks = runs_of(record, "rank_collapse")

    first = list(map(first_alarm, collapses))
    false_alarms, steps = (sum(run[key] for run in healthy) for key in ("number_of_alarms", "steps"))

    def soon(run: Record) -> bool:
        alarm = first_alarm(run)
        return alarm is not None and alarm["raised"] <= SOON

    def in_time(run: Record) -> bool:
        lead = lead_time(run)
        return first_alarm(run) is not None and (lead is None or lead > 0)

    def ends(runs: Iterable[Record], key: str) -> str:
        return span((run["end"][key] for run in runs), "{:.2f}")

    def by_rank(run: Record) -> bool:
        alarm = first_alarm(run, rule="representation_rank")
        return alarm is not None and at_step(run, "entropy", alarm["raised"]) > HEALTHY_ENTROPY

    rows = [
        _number(f"collapses alarmed within {SOON} steps", collapses, soon, f"after {span(_raised(first))}"),
        _number("and before the loss shows it", collapses, in_time, f"lead time {span(map(lead_time, collapses))}"),
        _number(
            "no alarm in healthy runs", healthy, lambda run: not run["alarms"], f"{false_alarms} in {steps:,} steps"
        ),
        _number(
            "no critical alarm where attention is sharp and the model learns",
            works,
            lambda run: first_alarm(run, _CRITICAL) is None,
            f"loss {ends(works, 'train_loss')}",
        ),
        _number(
            "post-LN rank collapse caught while attention looks healthy",
            ranks,
            by_rank,
            f"attention entropy {ends(ranks, 'entropy')}, effective rank {ends(ranks, 'rank')} of 64",
        ),
        _number(
            "SigmaReparam at the collapsing rate reaches the healthy loss",
            sigma,
            lambda run: (behind_healthy(record, run) or 0.0) <= AS_GOOD * run["end"]["train_loss"],
            f"{span((behind_healthy(record, run) for run in sigma), '{:+.3f}')} nats",
        ),
        _number(
            f"recovery_actions() bring entropy back above {RECOVERED}",
            recovered,
            lambda run: run["end"]["entropy"] > RECOVERED,
            f"{span(map(_at_critical, recovered), '{:.2f}')} at the alarm, {ends(recovered, 'entropy')} at the end",
        ),
    ]
    return table(["to be reached", "reached in", "measured"], rows, texts=3)


def _at_critical(run: Record) -> float | None:
    alarm = first_alarm(run, _CRITICAL)
    return None if alarm is None else at_step(run, "entropy", alarm["raised"])


def _number(what: str, runs: Sequence[Record], reached: Callable[[Record], bool], measured: str) -> list[str]:
    if not runs:
        return [what, "not run", "-"]
    good = sum(map(reached, runs))
    return [what, f"{'all' if good == len(runs) else f'**only {good}**'} of {len(runs)} runs", measured]


def incomplete(record: Record) -> str:
    """The runs that are still to be made; empty if there are none."""
    missing = [(scenario, len(runs_of(record, name))) for name, scenario in record["scenarios"].items()]
    texts = [
        f"{scenario['title']} ({made} of {scenario['seeds']})" for scenario, made in missing if made < scenario["seeds"]
    ]
    return f"Not all runs have been made yet: {', '.join(texts)}." if texts else ""


def collapse(record: Record, image: str) -> str:
    """Everything about the runs of one machine."""
    commits = ", ".join(dict.fromkeys(run["commit"] for run in record["runs"]))
    parts = [numbers_table(record), f"![Attention entropy, loss and alarms]({image})", alarms_table(record)]
    parts += [ends_table(record), incomplete(record), f"Runs were made at commit {commits}."]
    return "\n\n".join(part for part in parts if part)


# name, label and colour of the lines in each column of the figure
_PANELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "entropy collapse, rate 0.03": (
        ("collapse", "no remedy", "#c44e52"),
        ("recovery", "recovery_actions()", "#4c72b0"),
        ("sigma_reparam", "SigmaReparam()", "#8172b2"),
        ("healthy", "healthy, rate 0.003", "#55a868"),
    ),
    "rank collapse, post-LN": (("rank_collapse", "no remedy", "#c44e52"), ("healthy", "healthy", "#55a868")),
    "sharp attention that learns": (("copy", "copying", "#dd8452"), ("sharp", "sharp initialisation", "#937860")),
}


def draw(path: Path, record: Record, seed: int = 0) -> None:
    """Draw attention entropy and loss over steps, with the first alarms, of one seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (title, lines) in zip(figure.subplots(2, len(_PANELS)).T, _PANELS.items(), strict=True):
        column[0].set_title(title, fontsize=10)
        found = [(_run(record, name, seed), *style) for name, *style in lines]
        shown = [(run, label, colour) for run, label, colour in found if run is not None]
        longest = max((run["steps"] for run, *_ in shown if run["scenario"] != "healthy"), default=0)
        for run, label, colour in shown:
            points = sum(step <= longest for step in run["curves"]["step"])
            steps = run["curves"]["step"][:points]
            column[0].plot(steps, run["curves"]["entropy"][:points], color=colour, label=label)
            column[1].plot(steps, run["curves"]["loss"][:points], color=colour)
            _mark(column, run, record["scenarios"][run["scenario"]]["kind"], colour)
            if run["scenario"] == "rank_collapse":
                share = [rank / 64 for rank in run["curves"]["rank"][:points]]
                column[0].plot(steps, share, color=colour, linestyle="--", label="effective rank / 64")
        column[0].set_ylim(-0.03, 1.03)
        column[1].set_xlabel("optimiser step")
        for axis in column:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        if shown:
            column[0].legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("attention entropy / ln n")
    figure.axes[len(_PANELS)].set_ylabel("held-out loss [nats]")
    note = "triangle: first warning, cross: first critical alarm, dotted: the loss alone would tell"
    figure.supxlabel(f"{note}; seed {seed}, {record['machine']['hardware']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _run(record: Record, name: str, seed: int) -> Record | None:
    if name == "healthy":
        return healthy_run(record, seed)
    return next((run for run in runs_of(record, name) if run["seed"] == seed), None)


def _mark(column: Any, run: Record, kind: str, colour: str) -> None:
    for level, marker in ((_WARN, "^"), (_CRITICAL, "X")):
        alarm = first_alarm(run, level)
        if alarm is not None and alarm["level"] == level:
            for axis, curve in zip(column, ("entropy", "loss"), strict=True):
                value = at_step(run, curve, alarm["raised"])
                axis.plot([alarm["raised"]], [value], marker, color=colour, markersize=8, markeredgecolor="black")
    if run["loss_shows"] is not None and kind == "collapse":
        column[1].axvline(run["loss_shows"], color=colour, linestyle=":", linewidth=1)
