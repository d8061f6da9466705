"""Show what a hub does: a live line on a terminal, plain lines when piped, JSON lines when asked."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fedsoda_edge.ports.console import ProgressLine, settings_line
from fedsoda_edge.units import counted, human_bytes, human_seconds
from fedsoda_hub.report.history import kl_sentence


class Display:
    """Everything but JSON goes to stderr."""

    def __init__(self, jsonl: bool) -> None:
        self._jsonl = jsonl
        self._line = ProgressLine(is_live=sys.stderr.isatty() and not jsonl)
        self._round = _OpenRound()
        self._edges: set[str] = set()  # connected

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.end()

    def say(self, event: dict[str, Any]) -> None:
        """One event of the daemon or of a job."""
        if self._jsonl:
            print(json.dumps(event, allow_nan=False), flush=True)
            return
        kind = event["event"]
        if kind == "progress" and "total" in event:
            detail = event.get("detail", f"{event['done']} of {event['total']}")
            self._line.show(event["stage"], event["done"], event["total"], detail)
            return
        self._fold(event)
        text = _sentence(event)
        if text and self._round.number == 0:
            self._line.end()
        if text:
            self._line.say(text)
        if self._round.number:
            done, total = self._round.steps
            self._line.show(
                f"round {self._round.number}", done, total, self._round.detail(len(self._edges), time.time())
            )

    def _fold(self, event: dict[str, Any]) -> None:
        now = self._round
        match event["event"]:
            case "edge_connected":
                self._edges.add(event["edge"])
            case "edge_gone":
                self._edges.discard(event["edge"])
            case "round_opened":
                self._round = _OpenRound(event["round"], dict.fromkeys(event["cohort"], (0, 0)), event["deadline_at"])
            case "cohort_extended":
                now.local |= dict.fromkeys(event["invited"], (0, 0))
                now.due_at = event["deadline_at"]
                now.answered -= set(event["invited"])
            case "edge_progress" if event["edge"] in now.local:
                now.local[event["edge"]] = event["step"], event["steps"]
            case "update_accepted" | "edge_answered":
                now.answered.add(event["edge"])
            case "round_closed" | "run_ended" | "stopped":
                self._round = _OpenRound()


@dataclass
class _OpenRound:
    """What the bar of an open round shows. local: of each invited edge, local steps done and in all."""

    number: int = 0
    local: dict[str, tuple[int, int]] = field(default_factory=dict)
    due_at: float = 0.0
    answered: set[str] = field(default_factory=set)

    @property
    def steps(self) -> tuple[int, int | None]:
        """Local steps done and in all, of all invited edges as if each had the most; None before the first step."""
        most = max((steps for _, steps in self.local.values()), default=0)
        done = sum(most if edge in self.answered else step for edge, (step, _) in self.local.items())
        # Whole only when the round closes: the last upload and the merge take their time.
        return (done, most * len(self.local) + 1) if most else (0, None)

    def detail(self, num_connected: int, now: float) -> str:
        return (
            f"{len(self.answered)} of {len(self.local)} answered, {counted(num_connected, 'edge')} in, "
            f"due in {human_seconds(max(0.0, self.due_at - now))}"
        )


def _sentence(event: dict[str, Any]) -> str:
    match event["event"]:
        case "settings":
            return settings_line(event["values"])
        case "listening":
            return f"serving {event['run']} at {event['url']}"
        case "progress" if "needed_bytes" in event:
            needed, free = human_bytes(event["needed_bytes"]), human_bytes(event["free_bytes"])
            return f"{event['stage']}: {needed} of disk, {free} free"
        case "progress" if "error_before" in event:
            return (
                f"{event['stage']}: on prompts left out, border states are {event['error_before']:.1%} away from the full "
                f"emulator's without it, {event['error']:.1%} with it"
            )
        case "progress" if event["stage"] == "choosing groups":
            return (
                f"choosing groups: with {event['groups']} x {event['layers_per_group']} layers gone public KL is "
                f"{event['kl']:.3f}, the adapter's gradient {event['cosine']:.1%} like the full LLM's"
            )
        case "progress" if event["stage"] == "no border map":
            return f"no border map: {event['why']}"
        case "prepared":
            return f"prepared: {kl_sentence(event['public_kl'])}"
        case "edge_connected":
            return f"{event['edge']} is here"
        case "edge_gone":
            return f"{event['edge']} is gone"
        case "edge_left":
            return f"{event['edge']} left: {event['reason']}"
        case "round_opened":
            return f"round {event['round']} of {event['rounds']}: {', '.join(event['cohort'])}"
        case "cohort_extended":
            return f"round {event['round']}: asking {', '.join(event['invited'])} too"
        case "update_accepted":
            examples = counted(event["num_examples"], "example")
            return f"round {event['round']}: {event['edge']}, {examples}, loss {event['loss']:.3f}"
        case "edge_answered":
            return f"round {event['round']}: no update from {event['edge']} ({event['how']})"
        case "round_closed":
            sizes = f"{human_bytes(event['bytes_up'])} up, {human_bytes(event['bytes_down'])} down so far"
            updates = counted(event["updates"], "update")
            return f"round {event['round']} closed: {updates}, loss {event['loss']:.3f}; {sizes}"
        case "probed":
            return (
                f"before round {event['round']}: public KL {event['kl']:.3f}, cosine of gradients {event['cosine']:.3f}"
            )
        case "repruned":
            return f"chose the layers of every sub-LLM anew for round {event['round']}"
        case "realigned":
            return f"realigned before round {event['round']}: public KL {event['kl_before']:.3f} to {event['kl_after']:.3f}"
        case "evaluated":
            return "accuracy: " + ", ".join(f"{k} {v:.1%}" for k, v in event["result"]["accuracy"].items())
        case "cell":
            return f"{event['cell']}: {event['accuracy']:.1%} in {human_seconds(event['seconds'])}"
        case "waiting":
            return f"waiting: {event['why']}"
        case "disk_full" | "compute_failed":
            return f"{event['message']}"
        case "run_ended":
            return f"the run is over after {counted(event['rounds'], 'round')}"
        case "stopped":
            return f"stopping on {event['signal']}"
    return ""


def plan_table(report: dict[str, Any]) -> None:
    """`fedsoda-hub plan` for people."""
    from rich.console import Console
    from rich.table import Table

    paper, ours = report["paper"], report["ours"]
    flop = ours["gflop_per_token"]
    title = f"{report['model']}: {report['family']}, {report['kept_layers']} of {report['num_layers']} layers kept"
    table = Table("", "here", "as the paper counts", title=title, title_justify="left")
    rows = [
        ("full model", f"{report['full_parameters'] / 1e6:,.1f} M", f"{paper['full_gib_16bit']:.2f} GiB at 16 bits"),
        ("sub-LLM", f"{report['sub_parameters'] / 1e6:,.1f} M", f"{paper['sub_gib_16bit']:.2f} GiB at 16 bits"),
        ("bundle", human_bytes(ours["bundle_bytes"]), ""),
        (
            "bits per parameter of the bundle",
            f"{ours['bits_per_parameter']:.2f}",
            "6.00" if report["emulators"] else "",
        ),
        ("trainable parameters", "", f"{paper['trainable_parameters']:,}"),
        (
            "an edge and round, up / down",
            f"{human_bytes(ours['up_bytes_per_edge_round'])} / {human_bytes(ours['down_bytes_per_edge_round'])}",
            f"{paper['parameters_per_round'] / 1e6:.3f} M parameters, {paper['mib_per_round']:.3f} MiB in both",
        ),
        ("memory of an edge without a GPU", human_bytes(ours["edge_memory_bytes"]), ""),
        ("memory of an edge's GPU", human_bytes(ours["edge_vram_bytes"]), ""),
        ("GFLOP a token: LoRA on the full model", f"{flop['full_lora']:.3g}", ""),
    ]
    if flop["sweep"]:
        rows += [
            ("GFLOP a token: sub-LLM, first time", f"{flop['sub_llm']:.3g}", ""),
            ("GFLOP a token: border cached", f"{flop['cached']:.3g}", ""),
        ]
    else:  # all of it is trained through: nothing stays the same that could be cached
        rows.append(("GFLOP a token: sub-LLM, every time", f"{flop['sub_llm']:.3g}", ""))
    rows += [
        (
            f"smaller class, {one['kept_layers']} layers kept",
            f"bundle {human_bytes(one['bundle_bytes'])}, disk {human_bytes(one['edge_disk_bytes'])}",
            "",
        )
        for one in report["smaller"]
    ]
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=True)
    console.print(table)
    if report["emulators"] is not None:
        console.print(_emulator_table(report["emulators"]))


def _emulator_table(emulators: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    assumed = emulators["assumed"]
    title = (
        f"[method] emulator, at {assumed['mbit_per_second']:g} Mbit/s and {assumed['tflop_per_second']:g} TFLOP/s "
        f"(assumed, not measured), {assumed['samples']:,} samples of {assumed['ids_per_sample']:,} ids"
    )
    both = [emulators["sub"], emulators["full"]]
    again = [f"every {one['realign_every']} rounds" if one["realign_every"] else "never" for one in both]
    table = Table("", "sub", "full", title=escape(title), title_justify="left")
    table.add_row("layers that leave the hub", *(str(one["kept_layers"]) for one in both))
    for label, size, seconds in (
        ("download", "bundle_bytes", "download_seconds"),
        ("sweep of all samples", "sweep_gflop_per_token", "sweep_seconds"),
    ):
        sizes = [human_bytes(one[size]) if size == "bundle_bytes" else f"{one[size]:.3g} GFLOP a token" for one in both]
        times = [human_seconds(one[seconds]) for one in both]
        table.add_row(label, *(f"{size}, {time}" for size, time in zip(sizes, times, strict=True)))
    table.add_row("swept again from the first LoRA on", *again)
    for label, name in (
        ("memory of an edge without a GPU", "edge_memory_bytes"),
        ("memory of an edge's GPU", "edge_vram_bytes"),
        ("disk, border states not counted", "edge_disk_bytes"),
    ):
        table.add_row(label, *(human_bytes(one[name]) for one in both))
    return table
