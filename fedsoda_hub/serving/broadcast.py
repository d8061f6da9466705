"""Tell each event of a hub to all who want to hear it: the terminal, the page, the metrics, notifications."""

from __future__ import annotations

from fedsoda_hub.events import HubEvent, HubSay


class Broadcast:
    """A `HubSay` that passes events on to all listeners, in the order in which they began to listen.

    Listeners are called on the event loop: they return at once and do not raise.
    """

    def __init__(self, *listeners: HubSay) -> None:
        self._listeners = list(listeners)

    def __call__(self, event: HubEvent) -> None:
        for listener in self._listeners:
            listener(event)

    def begin(self, listener: HubSay) -> None:
        """Let this listener hear the events from now on."""
        self._listeners.append(listener)
