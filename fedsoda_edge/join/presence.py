"""What the hub was told of this edge on the present connection, and what it is to be told next. Pure.

A hub invites edges that said Ready and are not paused. When anything is said is the agent's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsoda_edge.protocol.messages import Paused, Ready, Resumed


@dataclass(frozen=True)
class NotReady:
    """Bundle or data are not here yet: this edge cannot train."""


@dataclass(frozen=True)
class ReadyToTrain:
    """This edge can train. num_examples: its samples; size_class: of the sub-LLM that it took, 0 the largest."""

    num_examples: int
    size_class: int


@dataclass(frozen=True)
class Working:
    """No pause is on."""


@dataclass(frozen=True)
class Pausing:
    """The device is its owner's alone."""

    reason: str


class Presence:
    """How this edge is, and how the hub believes it to be. `next` says what to say; who asks says it."""

    def __init__(self) -> None:
        self._preparation: NotReady | ReadyToTrain = NotReady()
        self._now: Working | Pausing = Working()
        self._told: Working | Pausing | None = None  # on this connection; None: neither of them yet
        self._has_said_ready = False  # on this connection

    @property
    def is_prepared(self) -> bool:
        return isinstance(self._preparation, ReadyToTrain)

    @property
    def num_examples(self) -> int:
        """Samples that this edge trains; 0 before it is prepared."""
        return self._preparation.num_examples if isinstance(self._preparation, ReadyToTrain) else 0

    def connected(self) -> None:
        """Begin a connection: its hub knows nothing of this edge but its name."""
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
        """Return what the hub has to hear now, and take it for said; None: it knows all.

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
