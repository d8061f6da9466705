"""Sign what the hub says of its bundles and of updates that it accepted. Where the key lies is `run/keys.py`'s.

A statement of the bundles is for all edges, so it is signed once an hour and when it changes, not for each edge.
"""

from __future__ import annotations

import msgspec

from fedsoda_edge.ports import Clock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import SigningKey
from fedsoda_edge.protocol.statements import BundleStatement, ReceiptStatement, sign
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.serving.offers import Sizes

# How long an edge may be held at an old version by whoever repeats an old statement to it; and how far ahead the clock of
# an edge may be, which has nothing else to compare with.
LIFETIME_SECONDS = 3 * 86400
RENEW_SECONDS = 3600


class Signer:
    """The hub's signatures of one run.

    Args:
        sizes: names a blob of the run with its size.
    """

    def __init__(
        self, key: SigningKey, state: LedgerState, mirrors: tuple[str, ...], sizes: Sizes, clock: Clock
    ) -> None:
        self._key = key
        self._state = state
        self._mirrors = mirrors
        self._sizes = sizes
        self._clock = clock
        self._bundles: tuple[BundleStatement, ms.Signed] | None = None

    def signed(self, edge: ms.EdgeId, message: ms.HubMessage) -> ms.HubMessage:
        """Return the message with the signatures that belong to it."""
        match message:
            case ms.RoundOffer(manifest=ms.BlobRef()):
                return msgspec.structs.replace(message, signed=self.bundles())
            case ms.Receipt():
                return self._receipt(edge, message)
            case _:
                return message

    def bundles(self) -> ms.Signed:
        """Return the statement of the bundles in force, which has most of its lifetime left."""
        state, now = self._state, int(self._clock.wall())
        statement = BundleStatement(
            run_id=state.run_id,
            # The round for which layers were drawn last, which only grows, over restarts too.
            version=1 + state.repruned_for,
            signed_at=now,
            expires=now + LIFETIME_SECONDS,
            manifests=tuple(self._sizes(one.manifest) for one in state.sub_llms),
            mirrors=self._mirrors,
        )
        if self._bundles is not None:
            last, signed = self._bundles
            is_same = (last.version, last.manifests) == (statement.version, statement.manifests)
            if is_same and 0 <= now - last.signed_at < RENEW_SECONDS:
                return signed
        signed = sign(self._key, statement)
        self._bundles = statement, signed
        return signed

    def _receipt(self, edge: ms.EdgeId, receipt: ms.Receipt) -> ms.Receipt:
        last = self._state.receipts[edge]
        assert (last.round, last.digest) == (receipt.round, receipt.digest), "only the last receipt of an edge is sent"
        statement = ReceiptStatement(
            run_id=self._state.run_id,
            round=receipt.round,
            edge=edge,
            digest=receipt.digest,
            num_examples=last.num_examples,
            accepted_at=int(self._clock.wall()),
        )
        return msgspec.structs.replace(receipt, signed=sign(self._key, statement))
