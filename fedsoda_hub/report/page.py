"""`fedsoda-hub report`: what a run did, as pictures and one HTML file that needs nothing beside it.

Read from the ledger and the bundle's manifest, of a live run too. Everything shown was recorded: nothing is trained
or judged here. Edge ids and reasons come from others, so they are escaped.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.manifest import LayerPlan, parse_manifest
from fedsoda_edge.units import counted, human_bytes, human_seconds
from fedsoda_hub.cli.display import kl_sentence
from fedsoda_hub.federation import records as ev
from fedsoda_hub.run.ledger import Ledger, not_started
from fedsoda_hub.settings.run import RunSettings, effective

# Okabe and Ito's colours, which people who see fewer colours can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
MODELS = {"full": ("full model untouched", GREY), "sub_llm": ("sub-LLM", ORANGE), "plug_in": ("plug-in", BLUE)}
DOTS_PER_INCH = 144


@dataclass
class Contribution:
    """An accepted update. at: seconds since 1970."""

    at: float
    num_examples: int
    loss: float


@dataclass
class Round:
    """One round as the ledger has it. answered: why an invited edge sent no update. loss: the weighted mean."""

    number: int
    opened_at: float
    cohort: list[str]
    closed_at: float | None = None
    updates: dict[str, Contribution] = field(default_factory=dict)
    answered: dict[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        total = sum(update.num_examples for update in self.updates.values())
        if self.closed_at is None or not total:
            return None
        return sum(update.loss * update.num_examples for update in self.updates.values()) / total


@dataclass
class History:
    """A run, told by its records. repruned: rounds before which layers were drawn anew. traffic: (edge, round) -> bytes
    up, down; with realignments, without the bundle."""

    began_at: float
    is_over: bool = False
    public_kl: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    cross_terms: dict[int, float] = field(default_factory=dict)
    realigned: list[ev.Realigned] = field(default_factory=list)
    repruned: list[int] = field(default_factory=list)
    evaluated: list[ev.Evaluated] = field(default_factory=list)
    traffic: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def closed(self) -> list[Round]:
        return [one for one in self.rounds if one.closed_at is not None]

    @property
    def last_at(self) -> float:
        """When the last round opened or closed; of a run with rounds."""
        return max(one.closed_at or one.opened_at for one in self.rounds)

    @property
    def edges(self) -> list[str]:
        """Every edge that was ever invited or sent anything; clinic-2 before clinic-10."""
        invited = {edge for one in self.rounds for edge in one.cohort}
        return sorted(invited | {edge for edge, _ in self.traffic}, key=_natural)

    def bytes_until(self, number: int) -> int:
        """Sent both ways by all edges up to the end of this round."""
        return sum(up + down for (_, at), (up, down) in self.traffic.items() if at <= number)


def _natural(name: str) -> list[str]:
    parts = re.split(r"(\d+)", name)
    parts[1::2] = [part.zfill(64) for part in parts[1::2]]
    return parts


def read_history(ledger: Ledger) -> History:
    """Fold the records of a run that was started."""
    told = ledger.history()
    history = History(told[0][0])
    for at, record in told:
        now = history.rounds[-1] if history.rounds else None
        match record:
            case ev.Prepared():
                history.public_kl = record.public_kl
            case ev.RoundOpened():
                history.rounds.append(Round(record.round, at, list(record.cohort)))
            case ev.CohortExtended() if now:
                now.cohort += [edge for edge in record.invited if edge not in now.cohort]
                for edge in record.invited:
                    now.answered.pop(edge, None)
            case ev.UpdateAccepted() if now:
                now.updates[record.edge] = Contribution(at, record.num_examples, record.loss)
                now.answered.pop(record.edge, None)
            case ev.EdgeAnswered() if now:
                now.answered[record.edge] = at, record.how
            case ev.RoundClosed() if now:
                now.closed_at = at
                if record.cross_term is not None:
                    history.cross_terms[record.round] = record.cross_term
            case ev.Realigned():
                history.realigned.append(record)
            case ev.Repruned():
                history.repruned.append(record.round)
            case ev.Evaluated():
                history.evaluated.append(record)
        history.is_over = isinstance(record, ev.RunEnded)
    history.traffic = {(edge, number): (up, down) for edge, number, up, down in ledger.traffic()}
    return history


def write_report(settings: RunSettings, to: Path) -> dict[str, Any]:
    """report.html and its pictures in the directory `to`; the paths of all, and which pictures have no data yet.

    Raises:
        UsageProblem: the run was not started, or `to` cannot be written. DiskFull.
    """
    path = settings.run_dir / "ledger.sqlite"
    if not path.exists():
        raise not_started(settings.path)
    with contextlib.closing(Ledger(path)) as ledger:
        if not ledger.replay().run_id:  # there are tokens, and no more
            raise not_started(settings.path)
        history = read_history(ledger)
    manifest_file = settings.run_dir / "bundle" / "manifest.json"
    plan = parse_manifest(manifest_file.read_bytes()).plan if manifest_file.exists() else None
    figures = draw(history, plan)
    pictures = {name: png(figure) for name, (figure, _) in figures.items()}
    page = render(settings, history, plan, {name: (pictures[name], text) for name, (_, text) in figures.items()})
    try:
        for name, data in pictures.items():
            write_durably(to / f"{name}.png", data)
        write_durably(to / "report.html", page.encode())
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageProblem(f"--to {to} cannot be written ({error.strerror}); name a directory you may write to") from (
            error
        )
    return {
        "report": str(to / "report.html"),
        "pictures": [str(to / f"{name}.png") for name in pictures],
        "rounds_closed": len(history.closed),
    }


# --- pictures ----------------------------------------------------------------------------------------------


def draw(history: History, plan: LayerPlan | None) -> dict[str, tuple[Figure, str]]:
    """{name: (figure, caption)} of all that has data."""
    figures: dict[str, tuple[Figure, str]] = {}
    if history.closed:
        figures["loss"] = (
            draw_loss(history),
            "Training loss as the edges report it: the mean of a round weighted by examples, and each edge's own "
            "(dots). Bytes are those of all edges in both directions, the bundle not.",
        )
    if history.evaluated:
        figures["accuracy"] = (
            draw_accuracy(history),
            f"Accuracy on the run's evaluation data ({history.evaluated[-1].result['num_examples']} rows). "
            "[task] eval_every says how often the hub judges.",
        )
    if any(history.cross_terms.values()):
        figures["cross_term"] = (
            draw_cross_terms(history),
            "What averaging A and B apart loses of the mean of the edges' products B A: the norm of the difference over "
            "that of the mean. FFA-LoRA and RoLoRA lose nothing; FlexLoRA does not average so.",
        )
    if history.public_kl and history.public_kl["pruned"]:  # 0 exactly: a full emulator's, which is not aligned
        figures["alignment"] = (
            draw_alignment(history),
            "Public KL, full model to sub-LLM, in nats on held-out public blocks: after pruning, as stored, "
            "after a start in closed form where the run has one, after alignment; then before and after each realignment.",
        )
    if plan is not None and plan.distances:
        figures["layers"] = (
            draw_layers(plan),
            "Angular distance between the outputs of two layers, in units of pi. Each box is a chosen group: the layer "
            "below it stays, the removed ones lie between. The strip below shows what every layer became.",
        )
    if history.traffic and history.closed:  # until then greetings travelled
        figures["bytes"] = (
            draw_bytes(history),
            "What each edge sent and received in each round (websocket payload and framing). An empty field: the edge "
            "was not there.",
        )
    if history.rounds:
        figures["contributions"] = (
            draw_contributions(history),
            "When updates were accepted: one dot each, its area the number of examples. Grey bands are open rounds; "
            "a cross is an invited edge that sent none.",
        )
    return figures


def draw_loss(history: History) -> Figure:
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
    def curves(axes: Axes, places: Sequence[float]) -> None:
        for name, (label, color) in MODELS.items():
            percent = [100 * record.result["accuracy"][name] for record in history.evaluated]
            if name == "full":
                axes.axhline(percent[-1], color=color, linestyle="--", label=label)
            else:
                axes.plot(places, percent, color=color, marker="o", markersize=4, label=label)

    numbers = [record.round for record in history.evaluated]
    figure, first = _over_rounds_and_bytes(history, numbers, curves, "accuracy (%)")
    first.set_ylim(0, 100)
    return figure


def draw_cross_terms(history: History) -> Figure:
    def curve(axes: Axes, places: Sequence[float]) -> None:
        percent = [100 * share for share in history.cross_terms.values()]
        axes.plot(places, percent, color=BLUE, marker="o", markersize=4, label="all modules")

    figure, first = _over_rounds_and_bytes(history, list(history.cross_terms), curve, "lost by averaging (%)")
    first.set_ylim(bottom=0)
    return figure


def _over_rounds_and_bytes(
    history: History, numbers: Sequence[int], curves: Callable[[Axes, Sequence[float]], None], what: str
) -> tuple[Figure, Axes]:
    """The same curves over the rounds `numbers` and over what all edges sent and received until then; the left axes."""
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
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    stages = _kl_stages(history)
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
    """Heat map of d(l, l+m) with the chosen groups, and the fate of every layer."""
    size = plan.adapter[0]
    figure = Figure(figsize=(7.5, 7.6), layout="constrained")
    heat, strip = figure.subplots(2, 1, height_ratios=(18, 1))
    table = [[float("nan")] * size for _ in range(size)]
    for low, row in enumerate(plan.distances):
        for gap, distance in enumerate(row, start=1):
            table[low + gap][low] = distance
    image = heat.imshow(table, origin="lower", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=heat, label="angular distance / pi", shrink=0.8)
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
    """Two maps, up and down: a row per edge, a column per round."""
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
    axes.set_xlabel(f"{unit} since the run began, {_date(history.began_at)}")
    plain(axes)
    return figure


def _kl_stages(history: History) -> list[tuple[str, float]]:
    kl = history.public_kl
    return [(stage, kl[stage]) for stage in ("pruned", "quantized", "closed_form", "aligned") if stage in kl]


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _height(edges: Sequence[str]) -> float:
    """Inches that give each edge a row, and a page's height to hundreds of them."""
    return min(max(2.4, 0.3 * len(edges) + 1.4), 9.0)


def _some_names(edges: Sequence[str]) -> tuple[list[int], list[str]]:
    """Rows that get a name: all, up to 30; then every k-th."""
    every = -(-len(edges) // 30) or 1
    return list(range(0, len(edges), every)), [_short(edge) for edge in edges[::every]]


def _short(name: str) -> str:
    # A dollar sign starts a formula in matplotlib; ids have none, but ids are others' words.
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", "\\$")


def _time_unit(history: History) -> tuple[str, float]:
    span = history.last_at - history.began_at
    return ("seconds", 1.0) if span < 300 else ("minutes", 60.0) if span < 3 * 3600 else ("hours", 3600.0)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    return out.getvalue()


# --- the page ----------------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
p.lead { color: #555; margin-top: .2rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { color: #555; } dd { margin: 0; }
"""
_TITLES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "cross_term": "What averaging A and B apart loses",
    "alignment": "Alignment",
    "layers": "Layers",
    "bytes": "Bytes by edge and round",
    "contributions": "Who contributed when",
}


def render(
    settings: RunSettings, history: History, plan: LayerPlan | None, pictures: dict[str, tuple[bytes, str]]
) -> str:
    """The page: pictures inside it, no script, nothing fetched from anywhere."""
    parts = [
        f"<h1>{_text(settings.name)}</h1><p class=lead>{_text(_lead(settings, history))}</p>",
        _facts(settings, history, plan),
    ]
    for name, (data, caption) in pictures.items():
        parts.append(picture_of(name, _TITLES[name], data, caption))
        if name == "contributions":
            parts.append(_edges_table(history))
        if name == "layers" and plan is not None:
            parts.append(_groups_table(plan))
    if history.rounds:
        parts.append("<h2>Rounds</h2>" + _rounds_table(history))
    parts.append("<h2>Settings</h2>" + _settings_list(settings))
    parts.append(f"<p class=lead>Written by fedsoda-hub report, {_date(datetime.now(UTC).timestamp())}.</p>")
    return page(f"{settings.name}: FedSODA run", parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML page around these parts."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a name may hold, the page fetches and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>"])


def picture_of(name: str, title: str, data: bytes, caption: str) -> str:
    """A heading and the PNG below it, inside the page."""
    source = base64.b64encode(data).decode()
    return (
        f'<h2 id="{_text(name)}">{_text(title)}</h2><figure><img alt="{_text(title)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _lead(settings: RunSettings, history: History) -> str:
    state = "over" if history.is_over else "not over"
    return (
        f"{_model_name(settings)}: {len(history.closed)} of {counted(settings.rounds.count, 'round')} closed, "
        f"{counted(len(history.edges), 'edge')}, "
        f"begun {_date(history.began_at)}; the run is {state}."
    )


def _facts(settings: RunSettings, history: History, plan: LayerPlan | None) -> str:
    facts: list[tuple[str, str]] = []
    if history.evaluated:
        last = history.evaluated[-1].result
        for name, (label, _) in MODELS.items():
            auc = last.get("auc", {}).get(name)
            more = "" if auc is None else f", AUC {auc:.3f}"
            loss = last["loss"][name]
            shown = "not a number" if loss is None else f"{loss:.3f}"
            facts.append((label, f"accuracy {last['accuracy'][name]:.1%}, loss {shown}{more}"))
    if plan is not None:
        kept = f"{len(plan.kept)} of {plan.num_layers} kept"
        if plan.lacking:
            kept += f" ({len(plan.without_attention)} without attention, {len(plan.without_mlp)} without MLP)"
        facts.append(("layers", f"{kept}, LoRA rank {settings.lora.rank} in {len(plan.adapter)}"))
    if history.repruned:
        facts.append(("layers drawn anew", f"before rounds {', '.join(map(str, history.repruned))}"))
    if history.public_kl:
        facts.append(("public KL", kl_sentence(history.public_kl).removeprefix("public KL ")))
    examples = sum(u.num_examples for one in history.closed for u in one.updates.values())
    if examples:
        updates = counted(sum(len(one.updates) for one in history.closed), "update")
        facts.append(("examples trained on", f"{examples:,} in {updates}"))
    if history.traffic and history.closed:  # until then greetings travelled
        up, down = (sum(sizes[i] for sizes in history.traffic.values()) for i in (0, 1))
        pairs = len(history.traffic)
        facts.append(
            (
                "bytes up / down",
                f"{human_bytes(up)} / {human_bytes(down)} in all, {human_bytes(up / pairs)} / {human_bytes(down / pairs)} "
                "an edge and round",
            )
        )
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts) + "</dl>"


def _rounds_table(history: History) -> str:
    rows = []
    for one in history.rounds:
        sizes = [sizes for (_, number), sizes in history.traffic.items() if number == one.number]
        without = ", ".join(f"{edge} ({how})" for edge, (_, how) in sorted(one.answered.items()))
        rows.append(
            (
                str(one.number),
                _date(one.opened_at),
                "open" if one.closed_at is None else human_seconds(one.closed_at - one.opened_at),
                f"{len(one.updates)} of {len(one.cohort)}",
                f"{sum(update.num_examples for update in one.updates.values()):,}",
                "" if one.loss is None else f"{one.loss:.3f}",
                human_bytes(sum(up for up, _ in sizes)),
                human_bytes(sum(down for _, down in sizes)),
                without,
            )
        )
    heads = ("round", "opened", "took", "updates", "examples", "loss", "up", "down", "no update from")
    return _table(heads, rows)


def _edges_table(history: History) -> str:
    rows = []
    for edge in history.edges:
        given = [one.updates[edge] for one in history.rounds if edge in one.updates]
        sizes = [sizes for (name, _), sizes in history.traffic.items() if name == edge]
        rows.append(
            (
                edge,
                f"{len(given)} of {sum(edge in one.cohort for one in history.rounds)}",
                f"{sum(update.num_examples for update in given):,}",
                f"{given[-1].loss:.3f}" if given else "",
                _date(given[-1].at) if given else "",
                human_bytes(sum(up for up, _ in sizes)),
                human_bytes(sum(down for _, down in sizes)),
            )
        )
    return _table(("edge", "updates / invited", "examples", "last loss", "last update", "up", "down"), rows)


def _groups_table(plan: LayerPlan) -> str:
    rows = [
        (str(group.start), f"{group.removed[0]} to {group.removed[-1]}", f"{group.distance:.4f}")
        for group in plan.groups
    ]
    return _table(("layer that stays", "removed", "distance"), rows)


def _model_name(settings: RunSettings) -> str:
    """A model hub's id, or the directory's name: a report is shown to others, the hub's paths are its own."""
    is_here = (settings.directory / settings.model).is_dir()
    return Path(settings.model).resolve().name if is_here else settings.model


def _settings_list(settings: RunSettings) -> str:
    found = effective(settings)
    found["model"]["value"] = _model_name(settings)
    rows = [(key, repr(setting["value"]), setting["source"]) for key, setting in sorted(found.items())]
    return _table(("key", "value", "from"), rows)


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: str) -> str:
    return html.escape(value)


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
