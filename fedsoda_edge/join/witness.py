"""Hear what the hub says before it counts, and note what this edge says before it leaves, for one join.

What is believed is decided in `trust.py`, the file of what left is `receipts.py`'s.
"""

from __future__ import annotations

from fedsoda_edge.events import EventSink
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.receipts import AnswerCame, FilesAsked, HubNamed, MessageSent, ReceiptLog
from fedsoda_edge.join.trust import HubTrust
from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import encode
from fedsoda_edge.protocol.signatures import as_text


class HubWitness:
    """The witness of a join's conversation (`conversation.Witness`).

    Args:
        hub: the hub's address, for people.
    """

    def __init__(self, hub: str, trust: HubTrust, log: ReceiptLog, clock: Clock) -> None:
        self.trust = trust
        self._hub = hub
        self._log = log
        self._clock = clock
        self._welcome: ms.Welcome | None = None
        self._size_class = 0
        self._update: ms.UpdateStart | None = None  # the last that was sent
        self._shown: int | None = None  # the round whose progress is noted: once a round, not twice a second

    @classmethod
    def of(
        cls, hub: str, home: Home, say: EventSink, clock: Clock, hub_key: bytes | None, *, is_joining: bool = True
    ) -> HubWitness:
        """Make the witness of a conversation of this home; the last two as in `HubTrust`."""
        trust = HubTrust(home, say, clock, hub_key, is_joining=is_joining)
        return cls(hub, trust, ReceiptLog(home.receipts), clock)

    def hears(self, message: ms.HubMessage) -> None:
        """Refuse what the run's hub did not sign, and note answers to updates.

        Raises:
            HubNotTrusted: as `HubTrust`.
        """
        match message:
            case ms.Welcome():
                self.trust.welcomed(message)
                self._welcome = message
                self._log.add(
                    HubNamed(
                        at=self._clock.wall(),
                        hub=self._hub,
                        run=message.run_id,
                        run_name=message.run_name,
                        edge=message.edge,
                        key=self._key,
                    )
                )
            case ms.RoundOffer():
                self.trust.offered(message, self._size_class)
            case ms.Receipt() | ms.Refusal(round=int()):
                self._answered(message)
            case _:
                pass

    def _answered(self, answer: ms.Receipt | ms.Refusal) -> None:
        update, welcome = self._update, self._welcome
        if update is None or welcome is None or answer.round != update.round:
            return  # of an earlier round: nobody waits for it
        # Noted before it is believed: what is shown later is what came. Before the update is settled: a crash in between
        # sends the update again, and the hub answers again.
        self._log.add(AnswerCame(at=self._clock.wall(), run=welcome.run_id, message=answer))
        if isinstance(answer, ms.Receipt):
            self.trust.receipt(answer, update, welcome.edge)

    def sends(self, message: ms.EdgeMessage) -> None:
        """Note what leaves; of progress the first report of each round.

        Raises:
            DiskFull: an update cannot be noted, so it must not leave yet.
        """
        match message:
            case ms.UpdateStart():
                self._log.add_or_raise(self._sent(message, message.bytes))
                self._update = message
                return
            case ms.Progress() if message.round == self._shown:
                return
            case ms.Progress():
                self._shown = message.round
            case ms.Ready():
                self._size_class = message.size_class
            case _:
                pass
        self._log.add(self._sent(message, len(encode(message))))

    def asks(self, address: str) -> None:
        """Note that files of the bundle are asked for at this address."""
        run, name = self._run
        self._log.add(FilesAsked(at=self._clock.wall(), hub=address, run=run, run_name=name, key=self._key))

    def _sent(self, message: ms.EdgeMessage, size: int) -> MessageSent:
        run, name = self._run
        edge = "" if self._welcome is None else self._welcome.edge
        at = self._clock.wall()
        return MessageSent(
            at=at, hub=self._hub, message=message, bytes=size, run=run, run_name=name, edge=edge, key=self._key
        )

    @property
    def _run(self) -> tuple[str, str]:
        return ("", "") if self._welcome is None else (self._welcome.run_id, self._welcome.run_name)

    @property
    def _key(self) -> str:
        return "" if self.trust.key is None else as_text(self.trust.key)
