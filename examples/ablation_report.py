"""The report of an ablation: a Markdown table, a JSON file and a bar chart, from finished runs.

Scores are means over the seeds with the sample standard deviation. A change against `full` is
taken seed by seed, for two rows of one seed share data order and first weights; where its mean is
smaller than its standard deviation, the row is called "within the spread".
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_chart import Bar, ChartRow, draw_chart
from ablation_runs import Run

from cliptteacher.evaluation import SCORES
from cliptteacher.training.ablations import AblationRow, calibrated
from cliptteacher.training.paper_recipes import Scores
from cliptteacher.training.run import write_json
from cliptteacher.visualize import write_png

SHOWN = ("mIoU(S)", "mIoU(U)", "hIoU")
Values = dict[str, dict[int, float]]  # score -> seed -> percent


def write_report(
    table: str,
    rows: Sequence[AblationRow],
    runs: Mapping[str, Sequence[Run]],
    settings: Mapping[str, Any],
    output: Path,
) -> str:
    """Write table.md, table.json and chart.png; returns the Markdown.

    Args:
        table: its name.
        rows: in the order of the table; the first is the one to compare with.
        runs: of each row, one a seed, finished or not.
        settings: what the command asked for, and the machine.
        output: folder.
    """
    values = {name: collect(runs[name]) for name in runs}
    text = markdown(table, rows, values, settings, problems(runs))
    if settings.get("calibrate"):
        text += calibrated_section(rows, runs, values)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text)
    content = {
        "table": table,
        "settings": {name: as_plain(value) for name, value in settings.items()},
        "rows": [row_as_json(row, values[row.name], values[rows[0].name]) for row in rows],
        "runs": [{**run.summary(), "row": name} for name in runs for run in runs[name]],
    }
    write_json(content, output / "table.json")
    chart_rows = [chart_row(row, values[row.name]) for row in rows]
    title = f"Table {table}" if table.isdigit() else table.capitalize()
    setting = ", ".join([settings["data"], f"base {settings['base']}", *weights_of(settings)])
    note = f"{setting}: mean and standard deviation over seeds"
    write_png(draw_chart(f"{title} on {settings['data']}", note, chart_rows), output / "chart.png")
    return text


def collect(runs: Sequence[Run]) -> Values:
    """The scores of the finished runs of one row."""
    finished = {run.seed: scores for run in runs if (scores := run.scores()) is not None}
    return {
        name: {seed: s[name] for seed, s in finished.items() if s[name] is not None}
        for name in SCORES
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def changes(values: Values, base: Values, score: str) -> list[float]:
    """Differences to the base, of the seeds that both have."""
    own, there = values[score], base[score]
    return [own[seed] - there[seed] for seed in sorted(own.keys() & there.keys())]


def sign(change: float) -> str:
    return "+" if change > 0 else "-" if change < 0 else "0"


def verdict(paper: float | None, found: Sequence[float]) -> str:
    """Compare the sign of a change with that in the paper."""
    if not found:
        return ""
    mean, spread = mean_and_spread(found)
    if spread is not None and abs(mean) <= spread:
        return "within the spread"
    if paper is None:
        return f"{sign(mean)}, not in the paper"
    seeds = "" if spread is not None else ", one seed"
    return ("same sign" if sign(mean) == sign(paper) else "other sign") + seeds


def paper_change(row: AblationRow, base: AblationRow, score: str) -> float | None:
    own, there = row.paper_scores, base.paper_scores
    if own is None or there is None:
        return None
    position = SCORES.index(score)
    return round(own[position] - there[position], 1)


def number(values: Sequence[float], signed: bool = False) -> str:
    """Write mean and spread, "-" without a value."""
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if spread is None else f"{text} ± {spread:.1f}"


def markdown(
    table: str,
    rows: Sequence[AblationRow],
    values: Mapping[str, Values],
    settings: Mapping[str, Any],
    failures: Sequence[str],
) -> str:
    """Write the report for people."""
    parts = [heading(table, settings), "## Scores", *score_table(rows, values)]
    if len(rows) > 1:
        parts += [f"## Change against `{rows[0].name}`", *change_table(rows, values)]
    if any(row.checkpoints_of and row.split for row in rows):
        parts.append(
            "The gamma rows train nothing: they evaluate the students of `full` on the split that "
            "their titles name, so compare them with each other only, and choose gamma there."
        )
    if failures:
        parts += ["## Without a result", *failures]
    return "\n".join(parts) + "\n"


def calibrated_section(
    rows: Sequence[AblationRow], runs: Mapping[str, Sequence[Run]], values: Mapping[str, Values]
) -> str:
    """The same tables with every run at the gamma that its validation scenes choose."""
    own = {row.name: calibrated(row).name for row in rows}
    shown = [row for row in rows if own[row.name] in runs]
    found = {row.name: values[own[row.name]] for row in shown}
    lines = ["\n## Scores at the gamma that the validation split chooses for each run"]
    lines += [
        *score_table(shown, found),
        "Gammas: "
        + "; ".join(
            f"{row.title}: {', '.join(gammas_of(runs[own[row.name]])) or '-'}" for row in shown
        )
        + ".",
    ]
    if len(shown) > 1:
        lines += [f"\n## Change against `{shown[0].name}` at these gammas"]
        lines += change_table(shown, found)
    return "\n".join(lines) + "\n"


def gammas_of(runs: Sequence[Run]) -> list[str]:
    return [f"{run.gamma():g}" for run in runs if run.scores() is not None]


def heading(table: str, settings: Mapping[str, Any]) -> str:
    environment = settings["environment"]
    first, count = settings["seed_start"], settings["seeds"]
    more = " ".join(settings["more"])
    return "\n".join(
        [
            f"# {'Table ' if table.isdigit() else ''}{table} on {settings['data']}\n",
            f"Base: {settings['base']}{f', with `{more}`' if more else ''}. Seeds {first} to "
            f"{first + count - 1}; percent, mean ± standard deviation. The paper's rows: "
            "SegFormer-B0 on PASCAL Context, 20,000 iterations.\n",
            f"Command: `{environment['command']}`; {environment['date'][:10]}, commit "
            f"{environment['commit']}, torch {environment['torch']}, one thread a run.\n",
        ]
    )


def weights_of(settings: Mapping[str, Any]) -> list[str]:
    """The weights of terms that were given to all rows, as flags.

    >>> weights_of({"more": ["--precision", "bf16", "--dice-weight", "1"]})
    ['--dice-weight 1']
    """
    pairs = itertools.pairwise(settings["more"])
    return [f"{flag} {value}" for flag, value in pairs if flag.endswith("-weight")]


def score_table(rows: Sequence[AblationRow], values: Mapping[str, Values]) -> list[str]:
    lines = [
        "",
        f"| row | seeds | {' | '.join(SCORES)} | paper: {' | '.join(SCORES)} |",
        f"|---|---|{'---|' * 8}",
    ]
    for row in rows:
        own = values[row.name]
        ours = [number(list(own[name].values())) for name in SCORES]
        paper = row.paper_scores
        theirs = [f"{score:.1f}" for score in paper] if paper else ["-"] * 4
        cells = [row.title, str(len(own["hIoU"])), *ours, *theirs]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def change_table(rows: Sequence[AblationRow], values: Mapping[str, Values]) -> list[str]:
    base = rows[0]
    head = " | ".join(f"paper {name} | here" for name in SHOWN)
    lines = ["", f"| row | {head} | hIoU: sign |", f"|---|{'---|' * 7}"]
    for row in rows[1:]:
        if row.split is not None:  # another split than that of the base: no comparison
            continue
        cells = [row.title]
        for name in SHOWN:
            theirs = paper_change(row, base, name)
            cells.append("-" if theirs is None else f"{theirs:+.1f}")
            cells.append(number(changes(values[row.name], values[base.name], name), signed=True))
        found = changes(values[row.name], values[base.name], "hIoU")
        cells.append(verdict(paper_change(row, base, "hIoU"), found))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def problems(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Say which runs have no result, and why."""
    lines: list[str] = []
    for name in runs:
        for run in runs[name]:
            if run.scores() is None:
                reason = (run.problem or run.difference() or "not finished").splitlines()
                lines.append(f"- {name} seed {run.seed}: {reason[0]}")
                lines += [f"      {line}" for line in reason[1:]]
    return lines


def row_as_json(row: AblationRow, values: Values, base: Values) -> dict[str, Any]:
    paper: Scores | None = row.paper_scores
    result: dict[str, Any] = {
        "row": row.name,
        "title": row.title,
        "overrides": row.overrides,
        "checkpoints_of": row.checkpoints_of,
        "gamma": row.gamma,
        "paper": None if paper is None else dict(zip(SCORES, paper, strict=True)),
    }
    for name in SCORES:
        found = list(values[name].values())
        mean, spread = mean_and_spread(found) if found else (None, None)
        difference = changes(values, base, name) if row.split is None else []
        result[name] = {"mean": mean, "std": spread, "change_by_seed": difference}
    return result


def chart_row(row: AblationRow, values: Values) -> ChartRow:
    bars: list[Bar] = []
    for name in SHOWN:
        found = list(values[name].values())
        mean, spread = mean_and_spread(found) if found else (None, None)
        paper = row.paper_scores
        bars.append(Bar(mean, spread, paper[SCORES.index(name)] if paper else None))
    return ChartRow(row.title, len(values["hIoU"]), bars)


def as_plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
