"""Show reports to people: what a run would cost, for `fedsoda-hub plan`, and how models answer, for `evaluate`.

Computing them is `plan.py`'s and `evaluation/judge.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedsoda_edge.ports.console import show
from fedsoda_edge.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from fedsoda_hub.evaluation.export import Exported
    from fedsoda_hub.evaluation.judge import Evaluation
    from fedsoda_hub.federation.state import LastStanding
    from fedsoda_hub.plan import Emulators, PlanReport
    from fedsoda_hub.preparation.curve import CurvePoint
    from fedsoda_hub.run.edges import KnownEdge
    from fedsoda_hub.run.status import LiveStatus


def evaluation_lines(result: Evaluation) -> Iterator[str]:
    """Write the figures of each model in a line, and below it the share of each answer where there are choices."""
    for name, accuracy in result.accuracy.items():
        if accuracy is None:
            yield f"{name:<8} not judged: the run that this export is from is not on this machine"
            continue
        loss, auc, mean_rank = result.loss[name], result.auc[name], result.mean_rank[name]
        line = f"{name:<8} accuracy {accuracy:6.1%}  loss " + ("not a number" if loss is None else f"{loss:.3f}")
        line += "" if auc is None else f"  AUC {auc:.3f}"
        yield line + ("" if mean_rank is None else f"  mean rank of the right choice {mean_rank:.2f}")
        if shares := result.shares[name]:
            yield f"{'':<8} chose {_shares(shares)}"
    if result.right_shares:
        yield f"{'right':<8} {_shares(result.right_shares)}"


def edge_line(edge: KnownEdge) -> str:
    """Write what is known of an edge in a line."""
    from fedsoda_hub.run.devices import at_words

    state = "revoked" if edge.revoked else "connected" if edge.connected else "away" if edge.used else "not used"
    line = f"{edge.edge:<24} {edge.kind:<5} {edge.fingerprint or '':<19} {state}"
    line += f", link until {at_words(edge.expires)}" if edge.expires is not None and not edge.revoked else ""
    if edge.first_seen is not None and edge.last_seen is not None:
        line += f", seen {at_words(edge.first_seen)} to {at_words(edge.last_seen)}"
    line += f", size class {edge.size_class}" if edge.size_class else ""
    line += f", step {edge.step} of {edge.steps}" if edge.step else ""
    line += f", {edge.why}" if edge.why else ""
    return line + standing_words(edge.standing)


def export_words(made: Exported) -> str:
    """Name the round that an export is of: "round 7, the best by accuracy (81.2%)"."""
    from fedsoda_hub.run.sentence import figure

    known = "" if made.metric is None or made.value is None else f" ({figure(made.metric, made.value)})"
    match made.kept:
        case "best":
            return f"round {made.round}, the best by {(made.metric or '').replace('_', ' ')}{known}"
        case "asked":
            return f"round {made.round}"
        case "last":
            return f"round {made.round}, the last"


def process_words(status: LiveStatus) -> str:
    """Name the process that serves a run: "running at https://h:8470 (pid 7)"."""
    pid = "" if status.hub is None else f" (pid {status.hub.pid})"
    return f"running at {status.url}{pid}"


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{answer} {share:.1%}" for answer, share in shares.items())


def standing_words(standing: LastStanding | None) -> str:
    """Say where an edge's last update lay beside what the round made of all; "" where it is not known."""
    if standing is None:
        return ""
    cosine = "no direction" if standing.cosine is None else f"cosine {standing.cosine:+.2f}"
    kept = "" if standing.kept is None or standing.kept == 1 else f", {standing.kept:.0%} kept"
    against = ", against the others" if standing.cosine is not None and standing.cosine < 0 else ""
    return f", round {standing.round}: norm {standing.norm:.3g}, {cosine}{kept}{against}"


def plan_table(report: PlanReport) -> None:
    """Print the report of `fedsoda-hub plan` for people."""
    from rich.table import Table

    paper, ours = report.paper, report.ours
    flop = ours.gflop_per_token
    title = f"{report.model}: {report.family}, {report.kept_layers} of {report.num_layers} layers kept"
    table = Table("", "here", "as the paper counts", title=title, title_justify="left")
    rows = [
        ("full model", f"{report.full_parameters / 1e6:,.1f} M", f"{paper.full_gib_16bit:.2f} GiB at 16 bits"),
        ("sub-LLM", f"{report.sub_parameters / 1e6:,.1f} M", f"{paper.sub_gib_16bit:.2f} GiB at 16 bits"),
        ("bundle", human_bytes(ours.bundle_bytes), ""),
        (
            "bits per parameter of the bundle",
            f"{ours.bits_per_parameter:.2f}",
            "6.00" if report.emulators is not None else "",
        ),
        ("trainable parameters", "", f"{paper.trainable_parameters:,}"),
        (
            "an edge and round, up / down",
            f"{human_bytes(ours.up_bytes_per_edge_round)} / {human_bytes(ours.down_bytes_per_edge_round)}",
            f"{paper.parameters_per_round / 1e6:.3f} M parameters, {paper.mib_per_round:.3f} MiB in both",
        ),
        ("memory of an edge without a GPU", human_bytes(ours.edge_memory_bytes), ""),
        ("memory of an edge's GPU", human_bytes(ours.edge_vram_bytes), ""),
        ("GFLOP a token: LoRA on the full model", f"{flop.full_lora:.3g}", ""),
    ]
    if flop.sweep:
        rows += [
            ("GFLOP a token: sub-LLM, first time", f"{flop.sub_llm:.3g}", ""),
            ("GFLOP a token: border cached", f"{flop.cached:.3g}", ""),
        ]
    else:  # all of it is trained through: nothing stays the same that could be cached
        rows.append(("GFLOP a token: sub-LLM, every time", f"{flop.sub_llm:.3g}", ""))
    rows += [
        (
            f"smaller class, {one.kept_layers} layers kept",
            f"bundle {human_bytes(one.bundle_bytes)}, disk {human_bytes(one.edge_disk_bytes)}",
            "",
        )
        for one in report.smaller
    ]
    for row in rows:
        table.add_row(*row)
    show(table)
    if report.emulators is not None:
        show(_emulator_table(report.emulators))
    if report.curve is not None:
        show(_curve_table(report.curve))


def _curve_table(curve: Sequence[CurvePoint]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    title = "What leaves the hub, healed: how far its border states are from the full model's, on texts held out"
    table = Table("layers removed", r"\[method]", "bundle", "border error", "", title=title)
    table.title_justify = "left"
    for point in curve:
        shape = f"groups = {point.groups}, layers_per_group = {point.layers_per_group}"
        table.add_row(
            str(point.removed_layers),
            escape(shape) if point.groups else 'name = "exact"',
            human_bytes(point.bundle_bytes),
            f"{point.error:.1%}",
            "recommended" if point.is_recommended else "",
        )
    return table


def _emulator_table(emulators: Emulators) -> Table:
    from rich.markup import escape
    from rich.table import Table

    assumed = emulators.assumed
    title = (
        f"[method] emulator, at {assumed.mbit_per_second:g} Mbit/s and {assumed.tflop_per_second:g} TFLOP/s "
        f"(assumed, not measured), {assumed.samples:,} samples of {assumed.ids_per_sample:,} ids"
    )
    table = Table("", "sub", "full", title=escape(title), title_justify="left")
    both = (emulators.sub, emulators.full)
    columns = [
        {
            "layers that leave the hub": str(one.kept_layers),
            "download": f"{human_bytes(one.bundle_bytes)}, {human_seconds(one.download_seconds)}",
            "sweep of all samples": f"{one.sweep_gflop_per_token:.3g} GFLOP a token, {human_seconds(one.sweep_seconds)}",
            "swept again from the first LoRA on": f"every {one.realign_every} rounds" if one.realign_every else "never",
            "memory of an edge without a GPU": human_bytes(one.edge_memory_bytes),
            "memory of an edge's GPU": human_bytes(one.edge_vram_bytes),
            "disk, border states not counted": human_bytes(one.edge_disk_bytes),
        }
        for one in both
    ]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table
