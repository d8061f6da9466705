"""Write what a run did as pictures and one HTML file that needs nothing beside it: `fedsoda-hub report`.

It is read from the ledger and the bundle's manifest, while a hub serves the run too. Edge ids and reasons come from
others, so they are escaped. Folding the records is `history.py`'s, drawing `pictures.py`'s.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.manifest import LayerPlan, parse_manifest
from fedsoda_edge.units import counted, human_bytes, human_seconds
from fedsoda_hub.federation.best import best_of, figure_of
from fedsoda_hub.federation.jobs import Standing
from fedsoda_hub.report.history import History, date, kl_sentence, read_history
from fedsoda_hub.report.pictures import MODELS, Picture, draw
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import not_started, opened_to_read
from fedsoda_hub.run.sentence import figure
from fedsoda_hub.settings.run import EffectiveSetting, RunSettings, effective

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


class Written(msgspec.Struct, frozen=True):
    """The report of `report --json`: the paths of the page and its pictures, and how many rounds have closed.

    event_file: that for TensorBoard; None: none was asked for.
    """

    report: str
    pictures: tuple[str, ...]
    rounds_closed: int
    event_file: str | None = None


def write_report(settings: RunSettings, to: Path) -> Written:
    """Write report.html and its pictures into the directory `to`.

    Raises:
        UsageProblem: the run has not been started, or `to` cannot be written.
        DiskFull: the disk has no space left; no file is half written.
    """
    directory = RunDirectory(settings.run_dir)
    if not directory.ledger.exists():
        raise not_started(settings.path)
    with opened_to_read(directory) as ledger:
        if not ledger.replay().run_id:  # the ledger holds tokens only
            raise not_started(settings.path)
        history = read_history(ledger)
    plan = parse_manifest(directory.manifest.read_bytes()).plan if directory.manifest.exists() else None
    pictures = draw(history, plan)
    page = render(settings, history, plan, pictures)
    try:
        for name, picture in pictures.items():
            write_durably(to / f"{name}.png", picture.png)
        write_durably(to / "report.html", page.encode())
    except OSError as error:
        raise UsageProblem(f"--to {to} cannot be written ({error.strerror}); name a directory you may write to") from (
            error
        )
    return Written(
        report=str(to / "report.html"),
        pictures=tuple(str(to / f"{name}.png") for name in pictures),
        rounds_closed=len(history.closed),
    )


def render(settings: RunSettings, history: History, plan: LayerPlan | None, pictures: Mapping[str, Picture]) -> str:
    """Write the page with its pictures inside, without scripts, and without anything that a browser would fetch."""
    parts = [
        f"<h1>{_text(settings.name)}</h1><p class=lead>{_text(_lead(settings, history))}</p>",
        _facts(settings, history, plan),
    ]
    for name, drawn in pictures.items():
        parts.append(picture_of(name, drawn.title, drawn.png, drawn.caption))
        if name == "contributions":
            parts.append(_edges_table(history))
        if name == "layers" and plan is not None:
            parts.append(_groups_table(plan))
    if history.rounds:
        parts.append("<h2>Rounds</h2>" + _rounds_table(history))
    parts.append("<h2>Settings</h2>" + _settings_list(settings))
    parts.append(f"<p class=lead>Written by fedsoda-hub report, {date(datetime.now(UTC).timestamp())}.</p>")
    return page(f"{settings.name}: FedSODA run", parts)


def page(title: str, parts: Iterable[str]) -> str:
    """Wrap these parts in a complete HTML page."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a name contains, the page fetches and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>"])


def picture_of(name: str, title: str, data: bytes, caption: str) -> str:
    """Write a heading with the PNG and its caption below it."""
    source = base64.b64encode(data).decode()
    return (
        f'<h2 id="{_text(name)}">{_text(title)}</h2><figure><img alt="{_text(title)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _lead(settings: RunSettings, history: History) -> str:
    state = "over" if history.is_over else "not over"
    return (
        f"{_model_name(settings)}: {len(history.closed)} of {counted(history.count or settings.rounds.count, 'round')} closed, "
        f"{counted(len(history.edges), 'edge')}, "
        f"begun {date(history.began_at)}; the run is {state}."
    )


def _best(settings: RunSettings, history: History) -> str | None:
    """Say which round is the best of a run that keeps it, and by which figure; None: it keeps the last."""
    metric = settings.task.best_by
    best = None if metric is None else best_of(history.evaluated, metric)
    if best is None or metric is None or (value := figure_of(best.result, metric)) is None:
        return None
    name = metric.replace("_", " ")
    return f"round {best.round}, by {name} ({figure(metric, value)}); exports are of it"


def _facts(settings: RunSettings, history: History, plan: LayerPlan | None) -> str:
    facts: list[tuple[str, str]] = []
    if history.evaluated:
        last = history.evaluated[-1].result
        for name, (label, _) in MODELS.items():
            auc, mean_rank = last.auc.get(name), last.mean_rank.get(name)
            more = "" if auc is None else f", AUC {auc:.3f}"
            more += "" if mean_rank is None else f", mean rank of the right choice {mean_rank:.2f}"
            loss = last.loss[name]
            shown = "not a number" if loss is None else f"{loss:.3f}"
            facts.append((label, f"accuracy {last.accuracy[name]:.1%}, loss {shown}{more}"))
        if (best := _best(settings, history)) is not None:
            facts.append(("best round", best))
    if plan is not None:
        kept = f"{len(plan.kept)} of {plan.num_layers} kept"
        if plan.lacking:
            kept += f" ({len(plan.without_attention)} without attention, {len(plan.without_mlp)} without MLP)"
        facts.append(("layers", f"{kept}, LoRA rank {settings.lora.rank} in {len(plan.adapter)}"))
    if history.repruned:
        facts.append(("layers drawn again", f"before rounds {', '.join(map(str, history.repruned))}"))
    if history.public_kl:
        facts.append(("public KL", kl_sentence(history.public_kl).removeprefix("public KL ")))
    examples = sum(u.num_examples for one in history.closed for u in one.updates.values())
    if examples:
        updates = counted(sum(len(one.updates) for one in history.closed), "update")
        facts.append(("examples trained on", f"{examples:,} in {updates}"))
    if history.traffic and history.closed:  # before that, only greetings have travelled
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
                date(one.opened_at),
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
                date(given[-1].at) if given else "",
                human_bytes(sum(up for up, _ in sizes)),
                human_bytes(sum(down for _, down in sizes)),
                *_standing_cells([update.standing for update in given if update.standing is not None]),
            )
        )
    heads = ("edge", "updates / invited", "examples", "last loss", "last update", "up", "down")
    of_standing = ("last norm", "cosine to the result, last / mean", "kept, mean")
    return _table((*heads, *of_standing), rows)


def _standing_cells(found: Sequence[Standing]) -> tuple[str, str, str]:
    """Write where an edge's updates lay beside what their rounds made of all, so that an owner sees who spoils."""
    cosines = [one.cosine for one in found if one.cosine is not None]
    kept = [one.kept for one in found if one.kept is not None]
    return (
        f"{found[-1].norm:.3g}" if found else "",
        f"{cosines[-1]:+.2f} / {sum(cosines) / len(cosines):+.2f}" if cosines else "",
        f"{sum(kept) / len(kept):.0%}" if kept else "",
    )


def _groups_table(plan: LayerPlan) -> str:
    rows = [
        (str(group.start), f"{group.removed[0]} to {group.removed[-1]}", f"{group.distance:.4f}")
        for group in plan.groups
    ]
    return _table(("layer that stays", "removed", "distance"), rows)


def _model_name(settings: RunSettings) -> str:
    """Name the model by its model hub's id or its directory's name, since a report must not show the hub's paths."""
    is_here = (settings.directory / settings.model).is_dir()
    return Path(settings.model).resolve().name if is_here else settings.model


def _settings_list(settings: RunSettings) -> str:
    found = effective(settings)
    found["model"] = EffectiveSetting(_model_name(settings), found["model"].source)
    rows = [(key, repr(setting.value), setting.source) for key, setting in sorted(found.items())]
    return _table(("key", "value", "from"), rows)


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: str) -> str:
    return html.escape(value)
