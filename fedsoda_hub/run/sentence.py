"""Say in one sentence what a run does now, as `status`, the page, services and notifications show it. Pure."""

from __future__ import annotations

from fedsoda_edge.protocol.stages import preparing_words, stage_words
from fedsoda_edge.units import human_seconds
from fedsoda_hub.run.status import TERMINAL, BestRound, HubProcess, LiveStatus, RunningJob


def sentence_of(status: LiveStatus) -> str:
    """Say what the run does now, and until when where that is known; where it waits, why."""
    hub = status.hub
    if status.phase == "ended":
        return f"over after {status.rounds_closed} of {status.rounds} rounds{_best(status.best)}"
    if status.url is None and (hub is None or hub.state in TERMINAL):
        return f"{_no_hub(hub)}; {_closed(status)}"
    match status.phase:
        case "preparing":
            return preparing(status.work)
        case "idle" if status.work is not None:
            return f"{working(status.work)}; {_closed(status)}"
        case "idle":
            return f"waiting: {status.waiting or 'for edges'}; {_closed(status)}"
        case "collecting":
            return _collecting(status)


def preparing(work: RunningJob | None) -> str:
    """Say how far the preparation is: "preparing: aligning 81 of 200, about 11 min left"."""
    if work is None:
        return preparing_words("", 0, 0, 0.0, None)
    return preparing_words(work.stage or "", work.done or 0, work.total or 0, work.seconds, work.seconds_left)


def working(work: RunningJob) -> str:
    """Say how far a job is: "evaluating 40 of 200, about 2 min left"."""
    if work.stage is None:
        return _JOBS.get(work.job, work.job)
    return stage_words(work.stage, work.done or 0, work.total or 0, work.seconds, work.seconds_left)


_JOBS = {
    "prepare": "preparing the sub-LLM",
    "aggregate": "merging the updates",
    "probe": "measuring the drift",
    "realign": "realigning",
    "reprune": "drawing other layers",
    "evaluate": "evaluating",
}


def _collecting(status: LiveStatus) -> str:
    here, invited = len(status.accepted), len(status.cohort)
    said = f"round {status.round} of {status.rounds}: {here} of {invited} updates are in"
    if status.work is not None:
        return f"{said}, {working(status.work)}"
    if status.waiting is not None:
        return f"{said}; waiting: {status.waiting}"
    closes = "" if status.due_seconds is None else f", closes within {human_seconds(status.due_seconds)}"
    return f"{said}, {invited - len(set(status.accepted) | set(status.answered))} still train{closes}"


def _closed(status: LiveStatus) -> str:
    return f"{status.rounds_closed} of {status.rounds} rounds are closed"


def _no_hub(hub: HubProcess | None) -> str:
    match hub:
        case HubProcess(state="failed"):
            return f"no hub serves it: the last one failed ({hub.reason})"
        case HubProcess(state="killed"):
            return (
                f"no hub serves it: the last one (pid {hub.pid}) was killed, or the machine ended it for lack of memory"
            )
        case HubProcess(state="stopped"):
            return f"no hub serves it: the last one was stopped ({hub.reason})"
        case _:
            return "no hub serves it"


def _best(best: BestRound | None) -> str:
    if best is None:
        return ""
    return f"; the best is round {best.round} ({best.metric.replace('_', ' ')} {figure(best.metric, best.value)})"


def figure(metric: str, value: float) -> str:
    """Write a figure as people read it: accuracy as a share, the others with three digits."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3f}"
