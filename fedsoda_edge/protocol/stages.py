"""Say how far a stage of a hub's work is, in the same words on both sides: "aligning 81 of 200, about 11 min left". Pure."""

from __future__ import annotations

from fedsoda_edge.protocol.messages import Preparing
from fedsoda_edge.units import human_seconds, one_line


def stage_words(stage: str, done: int, total: int, seconds: float, seconds_left: float | None) -> str:
    """Say how far a stage is, and how long it still takes, or has taken where that is not known.

    Args:
        done, total: total 0: the stage counts nothing.
        seconds: since it began. seconds_left: None: not known yet.
    """
    said = f"{stage} {done:,} of {total:,}" if total else stage
    if seconds_left is not None:
        return f"{said}, about {human_seconds(seconds_left)} left"
    return f"{said}, for {human_seconds(seconds)}" if seconds >= 1 else said


def preparing_words(stage: str, done: int, total: int, seconds: float, seconds_left: float | None) -> str:
    """Say how far a preparation is; stage "": its first stage has not begun."""
    if not stage:
        return "preparing the sub-LLM"
    return f"preparing: {stage_words(stage, done, total, seconds, seconds_left)}"


def words_of(said: Preparing) -> str:
    """Say what a hub says of its preparation, as a part of one line."""
    return preparing_words(one_line(said.stage), said.done, said.total, said.seconds, said.seconds_left)
