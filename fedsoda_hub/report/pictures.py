"""Draw a run's history: loss, accuracy, alignment, layers, bytes, contributions. What is drawn was recorded.

Putting pictures on a page is `page.py`'s.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.report.history import STAGES, History, date

# The colours of Okabe and Ito, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
MODELS = {"full": ("full model untouched", GREY), "sub_llm": ("sub-LLM", ORANGE), "plug_in": ("plug-in", BLUE)}
DOTS_PER_INCH = 144


@dataclass(frozen=True)
class Picture:
    """A figure with its title and caption."""

    title: str
    caption: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        """The figure as a PNG file."""
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
        return out.getvalue()


def draw(history: History, plan: LayerPlan | None) -> dict[str, Picture]:
    """Draw every picture that there is data for, by name."""
    found: dict[str, Picture] = {}
    if history.closed:
        found["loss"] = Picture(
            "Loss",
            "Training loss as the edges report it: the mean of a round weighted by examples, and that of each edge "
            "(dots). Bytes are those of all edges in both directions, without the bundle.",
            draw_loss(history),
        )
    if history.evaluated:
        found["accuracy"] = Picture(
            "Accuracy",
            f"Accuracy on the run's evaluation data ({history.evaluated[-1].result.num_examples} rows). "
            "[task] eval_every says how often the hub judges.",
            draw_accuracy(history),
        )
    if any(history.cross_terms.values()):
        found["cross_term"] = Picture(
            "What averaging A and B apart loses",
            "What averaging A and B apart loses of the mean of the edges' products B A: the norm of the difference over "
            "that of the mean. FFA-LoRA and RoLoRA lose nothing; FlexLoRA does not average A and B.",
            draw_cross_terms(history),
        )
    if history.public_kl and history.public_kl["pruned"]:  # exactly 0 with a full emulator, which is not aligned
        found["alignment"] = Picture(
            "Alignment",
            "Public KL, full model to sub-LLM, in nats on held-out public blocks: after pruning, as stored, "
            "after alignment; then before and after each realignment.",
            draw_alignment(history),
        )
    if plan is not None and plan.distances:
        found["layers"] = Picture(
            "Layers",
            "Angular distance between the outputs of two layers, in units of pi. Each box is a chosen group, from the "
            "layer that is kept (across) to the last one that is removed (up). The strip shows what became of every "
            "layer.",
            draw_layers(plan),
        )
    if history.traffic and history.closed:  # before that, only greetings have travelled
        found["bytes"] = Picture(
            "Bytes by edge and round",
            "What each edge sent and received in each round (websocket payload and framing). In an empty field the edge "
            "was not connected.",
            draw_bytes(history),
        )
    if history.rounds:
        found["contributions"] = Picture(
            "Who contributed when",
            "When updates were accepted: one dot each, its area the number of examples. Grey bands are open rounds; "
            "a cross is an invited edge that sent none.",
            draw_contributions(history),
        )
    return found


def draw_loss(history: History) -> Figure:
    """Draw the loss of each round, and of each edge in it."""
    rounds = history.closed
    losses = [float("nan") if one.loss is None else one.loss for one in rounds]

    def curves(axes: Axes, places: Sequence[float]) -> None:
        dots = [
            (place, update.loss) for place, one in zip(places, rounds, strict=True) for update in one.updates.values()
        ]
        axes.scatter([x for x, _ in dots], [y for _, y in dots], s=10, color=GREY, alpha=0.6, label="one edge")
        axes.plot(places, losses, color=BLUE, marker="o", markersize=4, label="weighted mean")

    figure, _ = _over_rounds_and_bytes(history, [one.number for one in rounds], curves, "training loss (nats per id)")
    return figure


def draw_accuracy(history: History) -> Figure:
    """Draw the accuracy of the three models where the hub judged them."""

    def curves(axes: Axes, places: Sequence[float]) -> None:
        for name, (label, color) in MODELS.items():
            percent = [100 * record.result.accuracy[name] for record in history.evaluated]
            if name == "full":
                axes.axhline(percent[-1], color=color, linestyle="--", label=label)
            else:
                axes.plot(places, percent, color=color, marker="o", markersize=4, label=label)

    numbers = [record.round for record in history.evaluated]
    figure, first = _over_rounds_and_bytes(history, numbers, curves, "accuracy (%)")
    first.set_ylim(0, 100)
    return figure


def draw_cross_terms(history: History) -> Figure:
    """Draw what averaging lost in each round."""

    def curve(axes: Axes, places: Sequence[float]) -> None:
        percent = [100 * share for share in history.cross_terms.values()]
        axes.plot(places, percent, color=BLUE, marker="o", markersize=4, label="all modules")

    figure, first = _over_rounds_and_bytes(history, list(history.cross_terms), curve, "lost by averaging (%)")
    first.set_ylim(bottom=0)
    return figure


def _over_rounds_and_bytes(
    history: History, numbers: Sequence[int], curves: Callable[[Axes, Sequence[float]], None], what: str
) -> tuple[Figure, Axes]:
    """Draw curves over the rounds `numbers`, and beside them over the bytes of all edges up to each round.

    Returns:
        the figure, and its axes of rounds.
    """
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    curves(by_round, numbers)
    curves(by_bytes, [history.bytes_until(number) / 1e6 for number in numbers])
    by_round.set_ylabel(what)
    by_round.set_xlabel("round")
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_bytes.set_xlabel("MB sent and received by all edges")
    by_bytes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (by_round, by_bytes):
        axes.set_xlim(left=0)
        plain(axes)
    return figure, by_round


def draw_alignment(history: History) -> Figure:
    """Draw public KL by stage of preparation, and before and after each realignment."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    stages = [(stage, history.public_kl[stage]) for stage in STAGES if stage in history.public_kl]
    colors = [{"pruned": GREY, "quantized": ORANGE}.get(stage, BLUE) for stage, _ in stages]
    axes.bar(range(len(stages)), [kl for _, kl in stages], color=colors, width=0.6)
    labels = [stage.replace("_", " ") for stage, _ in stages]
    top = max(kl for _, kl in stages)
    for place, (_, kl) in enumerate(stages):
        axes.annotate(f"{kl:.3f}", (place, kl), ha="center", va="bottom", fontsize=9)
    for place, record in enumerate(history.realigned, start=len(stages)):
        axes.plot([place, place], [record.kl_before, record.kl_after], color=GREY, linewidth=1)
        axes.scatter([place], [record.kl_before], color=ORANGE, zorder=3)
        axes.scatter([place], [record.kl_after], color=BLUE, zorder=3)
        if len(history.realigned) <= 9:
            axes.annotate(
                f"{record.kl_after:.3f}", (place, record.kl_after), (5, -3), textcoords="offset points", fontsize=8
            )
        labels.append(f"round {record.round}")
        top = max(top, record.kl_before)
    every = -(-len(labels) // 12)
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    axes.set_ylim(0, top * 1.12)
    axes.set_ylabel("public KL (nats)")
    if history.realigned:
        axes.legend(
            handles=[Patch(color=ORANGE, label="before"), Patch(color=BLUE, label="after alignment")],
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )
    plain(axes)
    return figure


def draw_layers(plan: LayerPlan) -> Figure:
    """Draw a heat map of d(l, l+m) with the chosen groups, and what became of every layer."""
    size = plan.adapter[0]
    figure = Figure(figsize=(7.5, 7.6), layout="constrained")
    heat, strip = figure.subplots(2, 1, height_ratios=(18, 1))
    table = [[float("nan")] * size for _ in range(size)]
    for low, row in enumerate(plan.distances):
        for gap, distance in enumerate(row, start=1):
            table[low + gap][low] = distance
    image = heat.imshow(table, origin="lower", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=heat, label="distance d(l, l + m)", shrink=0.8)
    for group in plan.groups:
        low, high = group.start, group.removed[-1]
        heat.add_patch(Rectangle((low - 0.5, high - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2))
    heat.set_xlabel("layer l (stays)")
    heat.set_ylabel("layer l + m (last removed)")
    for axis in (heat.xaxis, heat.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    fates = {"removed": "#E8E8E8", "kept": GREEN, "retained, with emulator LoRA": ORANGE, "adapter": BLUE}
    for layer in range(plan.num_layers):
        fate = (
            "adapter"
            if layer in plan.adapter
            else "retained, with emulator LoRA"
            if layer in plan.retained
            else "kept"
            if layer in plan.kept
            else "removed"
        )
        strip.add_patch(Rectangle((layer - 0.5, 0), 1, 1, facecolor=fates[fate], edgecolor="white"))
    strip.set_xlim(-0.5, plan.num_layers - 0.5)
    strip.set_yticks([])
    strip.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    strip.set_xlabel("layer of the full model")
    strip.legend(
        handles=[Patch(color=color, label=fate) for fate, color in fates.items()],
        ncols=4,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -1.6),
        fontsize=9,
    )
    for side in strip.spines.values():
        side.set_visible(False)
    return figure


def draw_bytes(history: History) -> Figure:
    """Draw two maps, up and down: a row per edge, a column per round."""
    edges, numbers = history.edges, [one.number for one in history.rounds] or [1]
    figure = Figure(figsize=(9.5, _height(edges)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for which, (axes, title) in enumerate(zip(panels, ("up", "down"), strict=True)):
        table = [
            [
                sizes[which] / 1e3 if (sizes := history.traffic.get((edge, number))) else float("nan")
                for number in numbers
            ]
            for edge in edges
        ]
        image = axes.imshow(
            table,
            aspect="auto",
            cmap="Blues",
            vmin=0,
            interpolation="nearest",
            extent=(numbers[0] - 0.5, numbers[-1] + 0.5, len(edges) - 0.5, -0.5),
        )
        figure.colorbar(image, ax=axes, label="kB", aspect=40)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_yticks(*_some_names(edges))
    return figure


def draw_contributions(history: History) -> Figure:
    """Draw when each edge's updates were accepted, and which invited edges sent none."""
    edges = history.edges
    row = {edge: place for place, edge in enumerate(edges)}
    unit, scale = _time_unit(history)
    figure = Figure(figsize=(9.5, _height(edges)), layout="constrained")
    axes = figure.add_subplot()

    def since(at: float) -> float:
        return (at - history.began_at) / scale

    most = max((u.num_examples for one in history.rounds for u in one.updates.values()), default=1)
    for one in history.rounds:
        axes.axvspan(since(one.opened_at), since(one.closed_at or history.last_at), color="#EEEEEE", zorder=0)
        if len(history.rounds) <= 30:
            axes.annotate(
                str(one.number), (since(one.opened_at), -0.75), fontsize=8, color=GREY, ha="left", va="center"
            )
        for edge, update in one.updates.items():
            axes.scatter(
                [since(update.at)], [row[edge]], s=16 + 100 * update.num_examples / most, color=BLUE, alpha=0.8
            )
        for edge, (at, _) in one.answered.items():
            axes.scatter([since(at)], [row[edge]], marker="x", color=RED)
    axes.set_yticks(*_some_names(edges))
    axes.set_ylim(len(edges) - 0.4, -1.1)
    axes.set_xlabel(f"{unit} since the run began, {date(history.began_at)}")
    plain(axes)
    return figure


def plain(axes: Axes) -> None:
    """Hide the top and right of the frame."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _height(edges: Sequence[str]) -> float:
    """Choose inches that give each edge a row, up to the height of a page."""
    return min(max(2.4, 0.3 * len(edges) + 1.4), 9.0)


def _some_names(edges: Sequence[str]) -> tuple[list[int], list[str]]:
    """Choose the rows that get a name: all of up to 30, otherwise every k-th."""
    every = -(-len(edges) // 30) or 1
    return list(range(0, len(edges), every)), [_short(edge) for edge in edges[::every]]


def _short(name: str) -> str:
    # A dollar sign starts a formula in matplotlib; ids should have none, but they come from others.
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", "\\$")


def _time_unit(history: History) -> tuple[str, float]:
    span = history.last_at - history.began_at
    return ("seconds", 1.0) if span < 300 else ("minutes", 60.0) if span < 3 * 3600 else ("hours", 3600.0)
