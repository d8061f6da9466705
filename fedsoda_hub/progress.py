"""Show what a hub does: a live line on a terminal, plain lines when piped, JSON lines when asked."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any

from fedsoda_edge.ports.console import human_bytes, note


class Display:
    """Everything but JSON goes to stderr."""

    def __init__(self, jsonl: bool) -> None:
        self._jsonl = jsonl
        self._live = sys.stderr.isatty() and not jsonl
        self._progress: Any = None
        self._bar: Any = None
        self._bar_name = ""
        self._round = 0
        self._steps: dict[str, tuple[int, int]] = {}  # of each invited edge: local steps done, in all

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def say(self, event: dict[str, Any]) -> None:
        """One event of the daemon or of a job."""
        if self._jsonl:
            print(json.dumps(event, allow_nan=False), flush=True)
        elif event["event"] == "progress" and "total" in event:
            self._show(event)
        elif event["event"] == "edge_progress":
            self._show_local_training(event)
        else:
            if event["event"] == "round_opened":
                self._round, self._steps = event["round"], dict.fromkeys(event["cohort"], (0, 0))
            text = _sentence(event)
            if text:
                self.close()
                note(text)

    def _show_local_training(self, event: dict[str, Any]) -> None:
        """One bar for the round: the steps of all invited edges."""
        if not self._live or event["edge"] not in self._steps:
            return
        self._steps[event["edge"]] = event["step"], event["steps"]
        most = max(steps for _, steps in self._steps.values())
        done, total = sum(step for step, _ in self._steps.values()), most * len(self._steps)
        self._show({"stage": f"round {self._round}: local training steps", "done": done, "total": total})

    def _show(self, event: dict[str, Any]) -> None:
        name, done, total = event["stage"], event["done"], event["total"]
        if not self._live:
            if done == total:
                note(f"{name}: done")
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar_name != name:
            self.close()
            self._progress = Progress(
                TextColumn("{task.description:<36}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._bar, self._bar_name = self._progress.add_task(name, total=total), name
        self._progress.update(self._bar, completed=done)

    def close(self) -> None:
        """Take the live line away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._bar_name = None, ""


def _sentence(event: dict[str, Any]) -> str:
    match event["event"]:
        case "listening":
            return f"serving {event['run']} at {event['url']}"
        case "progress" if "needed_bytes" in event:
            return f"{event['stage']}: {event['needed_bytes'] / 1e6:.0f} MB of disk, {event['free_bytes'] / 1e9:.0f} GB free"
        case "prepared":
            kl = event["public_kl"]
            return f"prepared: public KL {kl['pruned']:.3f} pruned, {kl['quantized']:.3f} in NF4, {kl['aligned']:.3f} aligned"
        case "edge_connected":
            return f"{event['edge']} is here"
        case "edge_gone":
            return f"{event['edge']} is gone"
        case "edge_left":
            return f"{event['edge']} left: {event['reason']}"
        case "round_opened":
            return f"round {event['round']} of {event['rounds']}: {', '.join(event['cohort'])}"
        case "cohort_extended":
            return f"round {event['round']}: below quorum at its deadline, asking {', '.join(event['invited'])}"
        case "update_accepted":
            return (
                f"round {event['round']}: {event['edge']}, {event['num_examples']} examples, loss {event['loss']:.3f}"
            )
        case "edge_answered":
            return f"round {event['round']}: no update from {event['edge']} ({event['how']})"
        case "round_closed":
            return f"round {event['round']} closed: {event['updates']} updates, loss {event['loss']:.3f}"
        case "realigned":
            return f"realigned before round {event['round']}: public KL {event['kl_before']:.3f} to {event['kl_after']:.3f}"
        case "evaluated":
            return "accuracy: " + ", ".join(f"{k} {v:.1%}" for k, v in event["result"]["accuracy"].items())
        case "waiting":
            return f"waiting: {event['why']}"
        case "disk_full" | "compute_failed":
            return f"{event['message']}"
        case "run_ended":
            return f"the run is over after {event['rounds']} rounds"
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
        ("bits per parameter of the bundle", f"{ours['bits_per_parameter']:.2f}", "6.00"),
        ("trainable parameters", "", f"{paper['trainable_parameters']:,}"),
        (
            "an edge and round, up / down",
            f"{human_bytes(ours['up_bytes_per_edge_round'])} / {human_bytes(ours['down_bytes_per_edge_round'])}",
            f"{paper['parameters_per_round'] / 1e6:.3f} M parameters, {paper['mib_per_round']:.3f} MiB in both",
        ),
        ("memory of an edge without a GPU", human_bytes(ours["edge_memory_bytes"]), ""),
        ("memory of an edge's GPU", human_bytes(ours["edge_vram_bytes"]), ""),
        ("GFLOP a token: LoRA on the full model", f"{flop['full_lora']:.3g}", ""),
        ("GFLOP a token: sub-LLM, first time", f"{flop['sub_llm']:.3g}", ""),
        ("GFLOP a token: border cached", f"{flop['cached']:.3g}", ""),
    ]
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
