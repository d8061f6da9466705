"""Draw a comparison, and write one HTML page that needs nothing beside it. Making the report is `summary.py`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.compare.results import CompareReport, EdgeRows, Pages, Split
from fedsoda_hub.compare.tables import markdown
from fedsoda_hub.report.page import page, picture_of
from fedsoda_hub.report.pictures import BLUE, GREEN, GREY, ORANGE, RED, Picture, draw_layers, plain

COLORS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito's


def write_pages(report: CompareReport, plans: Mapping[str, LayerPlan], to: Path) -> Pages:
    """Write compare.md, compare.html and a PNG for each picture into the directory `to`, and return their paths.

    Args:
        plans: the layer plan of each variant that prunes, with the distances that its groups were chosen by.

    Raises:
        UsageProblem: `to` cannot be written.
        DiskFull: the disk has no space left; no file is half written.
    """
    pictures = draw(report, plans)
    text = markdown(report)
    parts = [picture_of(one.title, one.title, one.png, one.caption) for one in pictures]
    try:
        for one in pictures:
            write_durably(to / f"{_file_name(one.title)}.png", one.png)
        write_durably(to / "compare.md", text.encode())
        write_durably(to / "compare.html", page("Comparison", [_html(text), *parts]).encode())
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageProblem(f"--out {to} cannot be written ({error.strerror}); name a directory you may write to") from (
            error
        )
    return Pages(
        report=str(to / "compare.html"),
        markdown=str(to / "compare.md"),
        pictures=[str(to / f"{_file_name(one.title)}.png") for one in pictures],
    )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name.lower())


def draw(report: CompareReport, plans: Mapping[str, LayerPlan]) -> list[Picture]:
    """Draw each split's accuracy and rows, then the layers of each plan; all pictures have different titles."""
    found: list[Picture] = []
    for split, of in report.splits.items():
        seed = report.compare.seeds[0]
        dealt = report.dealt[split][f"{seed}"]
        by_label = " by label" if _labels(dealt) else ""
        found += [
            Picture(
                f"Accuracy, {split}",
                "Accuracy of the plug-in, mean over seeds, by round and by the bytes that all edges sent and received up "
                "to then (without the bundle). Dashed: the full model untouched; dotted: central training.",
                draw_accuracy(of),
            ),
            Picture(f"Split {split}", f"Rows of each edge{by_label}, seed {seed}.", draw_split(dealt)),
        ]
    return found + [
        Picture(
            f"Layers, {variant}",
            "Angular distance between the outputs of two layers, in units of pi, and the chosen groups.",
            draw_layers(plan),
        )
        for variant, plan in plans.items()
    ]


def draw_accuracy(of: Split) -> Figure:
    """Draw a split's accuracy by round, and beside it by bytes."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for number, (name, row) in enumerate(of.variants.items()):
        judged = [(one, one.accuracy) for one in row.by_round if one.accuracy is not None]
        percent = [100 * accuracy for _, accuracy in judged]
        rounds = [float(one.round) for one, _ in judged]
        megabytes = [(one.bytes_up + one.bytes_down) / 1e6 for one, _ in judged]
        for axes, places in ((by_round, rounds), (by_bytes, megabytes)):
            axes.plot(places, percent, color=COLORS[number % len(COLORS)], marker="o", markersize=3, label=name)
    for axes in (by_round, by_bytes):
        for baseline, line in ((of.baselines.untouched, "--"), (of.baselines.central, ":")):
            if baseline is not None:
                axes.axhline(100 * baseline.mean, color=GREY, linestyle=line, linewidth=1)
        axes.set_xlim(left=0)
        plain(axes)
    by_round.set_ylabel("accuracy (%)")
    by_round.set_xlabel("round")
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_bytes.set_xlabel("MB sent and received by all edges")
    by_bytes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_split(dealt: Mapping[str, EdgeRows]) -> Figure:
    """Draw a bar of rows for each edge, divided by label if there are few labels."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    axes: Axes = figure.add_subplot()
    places, labels = range(len(dealt)), _labels(dealt)
    below = [0.0] * len(dealt)
    for number, label in enumerate(labels or [""]):
        height = [one.labels.get(label, 0) if labels else one.rows for one in dealt.values()]
        axes.bar(places, height, bottom=below, color=COLORS[number % len(COLORS)], label=label.replace("$", "\\$"))
        below = [low + high for low, high in zip(below, height, strict=True)]
    if len(dealt) <= 20:
        axes.set_xticks(places, list(dealt), rotation=45 if len(dealt) > 8 else 0)
    axes.set_ylabel("rows")
    if labels:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axes)
    return figure


def _labels(dealt: Mapping[str, EdgeRows]) -> list[str]:
    return sorted({label for one in dealt.values() for label in one.labels})


def _html(text: str) -> str:
    """Convert the Markdown that `tables.markdown` writes to HTML: headings, tables, lists and paragraphs."""
    made: list[str] = []
    for block in text.strip().split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            made.append(f"<h{level}>{escape(lines[0][level:].strip())}</h{level}>")
        elif lines[0].startswith("|"):
            rows = [[escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            made.append(_html_table(rows[0], rows[2:]))
        elif lines[0].startswith("- "):
            made.append("<ul>" + "".join(f"<li>{escape(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            made.append(f"<p>{escape(' '.join(lines))}</p>")
    return "\n".join(made)


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
