"""Say in one sentence what a run does now, as `status`, the page, services and notifications show it. Pure."""

from __future__ import annotations

from fedsoda_edge.units import human_seconds
from fedsoda_hub.run.status import LiveStatus


def sentence_of(status: LiveStatus) -> str:
    """Say what the run does now, and until when where that is known."""
    match status.phase:
        case "preparing":
            return "preparing the sub-LLM"
        case "idle":
            return f"waiting for edges; {status.rounds_closed} of {status.rounds} rounds are closed"
        case "collecting":
            here, invited = len(status.accepted), len(status.cohort)
            closes = "" if status.due_seconds is None else f", closes within {human_seconds(status.due_seconds)}"
            return (
                f"round {status.round} of {status.rounds}: {here} of {invited} updates are in, "
                f"{invited - here - len(status.answered)} still train{closes}"
            )
        case "ended":
            return f"over after {status.rounds_closed} of {status.rounds} rounds"
