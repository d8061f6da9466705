"""What a demo came to: the report of `demo --json` (docs/guide.md (g6-json)), and the table that people see of it."""

from __future__ import annotations

from collections import Counter

import msgspec

from fedsoda_edge.ports.console import note, show


class PublicText(msgspec.Struct, frozen=True, kw_only=True):
    """The public text of the run: its file, and how many sequences of how many ids."""

    text: str
    sequences: int
    length: int


class DemoBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the bundle and of the full model, and those of an edge in a round, on average."""

    bundle: int
    full_model: int
    up_per_edge_round: float
    down_per_edge_round: float


class LoRAParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The number of LoRA parameters of each part."""

    adapter: int
    emulator: int


class EdgeData(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of an edge, and how many of them have each label."""

    examples: int
    labels: dict[str, int]


class DemoSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of preparation, of the rounds, and of the whole demo."""

    prepare: float
    rounds: float
    total: float


class JudgedDemo(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the report that is known once the run is exported and judged.

    run, bundle, export, report, model, eval_data: paths. accuracy: by model; local_only there: the best edge alone.
    local_only: accuracy of each edge alone. public_kl: nats, by stage of the preparation.
    """

    run: str
    bundle: str
    export: str
    report: str
    model: str
    eval_data: str
    accuracy: dict[str, float]
    local_only: dict[str, float]
    public: PublicText
    public_kl: dict[str, float]
    bytes: DemoBytes
    bits_per_parameter: float
    lora_parameters: LoRAParameters


class DemoReport(JudgedDemo, frozen=True, kw_only=True):
    """All that `demo --json` says. edge_peak_rss_bytes: of the worker that took most; agent_...: of the agent."""

    rounds: int
    edges: list[EdgeData]
    edge_peak_rss_bytes: int
    agent_peak_rss_bytes: int
    seconds: DemoSeconds


def print_summary(report: DemoReport) -> None:
    """Print what the demo came to as a table."""
    from rich.table import Table

    table = Table(title="FedSODA demo", show_header=False, title_justify="left")
    accuracy, size, kl, seconds = report.accuracy, report.bytes, report.public_kl, report.seconds
    labels = [f"{n} {k}" for edge in report.edges for k, n in Counter(edge.labels).most_common(1)]
    rows = [
        ("accuracy, full model untouched", f"{accuracy['full']:.1%}"),
        ("accuracy, best edge alone, plugged in", f"{accuracy['local_only']:.1%}"),
        ("accuracy, sub-LLM after the rounds", f"{accuracy['sub_llm']:.1%}"),
        ("accuracy, plug-in: full model + adapter LoRA", f"[bold]{accuracy['plug_in']:.1%}[/bold]"),
        ("public KL, pruned / NF4 / aligned", f"{kl['pruned']:.3f} / {kl['quantized']:.3f} / {kl['aligned']:.3f}"),
        ("rounds x edges", f"{report.rounds} x {len(report.edges)} (each holds mostly {', '.join(labels)})"),
        ("bundle / full model", f"{size.bundle / 1e6:.1f} MB / {size.full_model / 1e6:.1f} MB"),
        (
            "bytes per edge and round, up / down",
            f"{size.up_per_edge_round / 1e3:.1f} kB / {size.down_per_edge_round / 1e3:.1f} kB",
        ),
        (
            "peak memory, agent (holds the socket) / worker (holds torch)",
            f"{report.agent_peak_rss_bytes / 1e6:.0f} MB / {report.edge_peak_rss_bytes / 1e6:.0f} MB",
        ),
        (
            "seconds, prepare / rounds / total",
            f"{seconds.prepare:.0f} / {seconds.rounds:.0f} / {seconds.total:.0f}",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    show(table)
    note(f"PEFT adapter for the full model: {report.export}\nwhat happened, in pictures: {report.report}")
