"""Decide what the hub must hear next of this edge: Ready, Paused, Resumed, from what was said on this connection. Pure.

A hub invites edges that said Ready and are not paused. When to ask for the next message is left to the agent.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsoda_edge.protocol.messages import Paused, Ready, Resumed


@dataclass(frozen=True)
class NotReady:
    """The state before bundle and data are here: this edge cannot train."""


@dataclass(frozen=True)
class ReadyToTrain:
    """The state in which this edge can train.

    num_examples: the number of its samples. size_class: which sub-LLM it took, 0 for the largest.
    """

    num_examples: int
    size_class: int


@dataclass(frozen=True)
class Working:
    """The state without a pause."""


@dataclass(frozen=True)
class Pausing:
    """The state during a pause."""

    reason: str


class Presence:
    """The state of this edge, and what the hub knows of it. `next` returns what to send; the caller sends it."""

    def __init__(self) -> None:
        self._preparation: NotReady | ReadyToTrain = NotReady()
        self._now: Working | Pausing = Working()
        self._told: Working | Pausing | None = None  # what the hub heard on this connection; None: neither
        self._has_said_ready = False  # on this connection

    @property
    def is_prepared(self) -> bool:
        """Whether this edge can train."""
        return isinstance(self._preparation, ReadyToTrain)

    @property
    def num_examples(self) -> int:
        """The number of samples that this edge trains; 0 before it is prepared."""
        return self._preparation.num_examples if isinstance(self._preparation, ReadyToTrain) else 0

    def connected(self) -> None:
        """Note that a connection began: the hub then knows only the name of this edge."""
        self._told, self._has_said_ready = None, False

    def prepared(self, num_examples: int, size_class: int) -> None:
        """Note that this edge can train."""
        self._preparation = ReadyToTrain(num_examples, size_class)

    def paused(self, reason: str) -> None:
        """Note that a pause is on."""
        self._now = Pausing(reason)

    def resumed(self) -> None:
        """Note that no pause is on any more."""
        self._now = Working()

    def next(self) -> Ready | Paused | Resumed | None:
        """Return what the hub must hear now, and take it as said; None where it knows all.

        A connection that begins in a pause, or before this edge is prepared, has no Ready until that is over.
        """
        match self._now:
            case Pausing(reason) if not isinstance(self._told, Pausing):
                self._told = self._now
                return Paused(reason=reason)
            case Working() if not isinstance(self._told, Working) and isinstance(self._preparation, ReadyToTrain):
                self._told = self._now
                if self._has_said_ready:
                    return Resumed()
                self._has_said_ready = True
                ready = self._preparation
                return Ready(num_examples=ready.num_examples, size_class=ready.size_class)
            case _:
                return None
