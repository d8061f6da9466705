"""Show what a hub does: a live line on a terminal, plain lines when piped, JSON lines when asked."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any


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
                print(text, file=sys.stderr, flush=True)

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
                print(f"{name}: done", file=sys.stderr, flush=True)
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
