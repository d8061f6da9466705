"""Decide whether what a hub says is what the run's hub signed: its key, its bundles, its receipts.

What this device knows of a run's hub lies in `runs/RUN_ID/hub.json`, so that a later join cannot be led back to an earlier
version or to another key. How a statement is read is left to `protocol/statements.py`, fetching to `download.py`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from fedsoda_edge.errors import HubNotTrusted, UsageProblem
from fedsoda_edge.events import EventSink, Notice
from fedsoda_edge.join.home import Home
from fedsoda_edge.ports import Clock
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import KEY_BYTES, NotSigned, as_text, fingerprint, from_text
from fedsoda_edge.protocol.statements import BundleStatement, ReceiptStatement, key_of, read

_AGAIN = "ask the hub's owner before you join again, since somebody else may answer in the hub's place"


class KnownHub(msgspec.Struct, frozen=True, kw_only=True):
    """The content of hub.json. key: the hub's public key, base64url. version, manifests: of its latest statement."""

    key: str
    version: int
    manifests: tuple[ms.BlobRef, ...]


class HubTrust:
    """The knowledge of one join about its hub.

    Args:
        hub_key: the key that a join link names; None: the first that the run's hub shows, from then on.
        is_joining: whether to remember what is seen; a look at a run leaves no trace of it.
    """

    def __init__(
        self, home: Home, say: EventSink, clock: Clock, hub_key: bytes | None = None, *, is_joining: bool = True
    ) -> None:
        self._home = home
        self._say = say
        self._clock = clock
        self._linked = hub_key
        self._is_joining = is_joining
        self._has_noted = False
        self._run_id = ""
        self.key: bytes | None = hub_key  # None: the hub signs nothing, or has said nothing yet
        self.statement: BundleStatement | None = None

    # --- bundles -----------------------------------------------------------------------------------------------------

    def welcomed(self, welcome: ms.Welcome) -> None:
        """Believe a Welcome, or refuse it.

        Raises:
            HubNotTrusted: another key than before signed it, or none; its bundles are of another run, older than those seen
                before, expired, or not those that were signed.
            UsageProblem: what this device remembers of the hub is damaged.
            ProtocolViolation: the run id leads out of FEDSODA_HOME.
        """
        path = self._home.known_hub(welcome.run_id)
        known = _known(path)
        self._run_id = welcome.run_id
        if welcome.signed is None:
            self._without_signature(welcome, known)
            return
        named = (welcome.manifest, *(one.manifest for one in welcome.smaller))
        key, statement = self._believed(welcome.signed, known, path)
        if statement.manifests != named:
            raise HubNotTrusted(
                f"the hub names the bundle {_shown(named)}, and signed {_shown(statement.manifests)} for the run "
                f"{self._run_id} (mix-and-match); {_AGAIN}"
            )
        self._take(key, statement, known, path)

    def offered(self, offer: ms.RoundOffer, size_class: int) -> None:
        """Believe the bundle that an offer names, or refuse it.

        Args:
            size_class: which sub-LLM this device took.

        Raises:
            HubNotTrusted: as `welcomed`.
        """
        if offer.manifest is None or self.statement is None:
            return
        statement = self.statement
        if offer.signed is not None:
            path = self._home.known_hub(self._run_id)
            known = _known(path)
            key, statement = self._believed(offer.signed, known, path)
            self._take(key, statement, known, path)
        if statement.manifests[size_class : size_class + 1] != (offer.manifest,):
            raise HubNotTrusted(
                f"the hub offers the bundle {_shown((offer.manifest,))} for size class {size_class}, and signed "
                f"{_shown(statement.manifests)} by size class (mix-and-match); {_AGAIN}"
            )

    def _without_signature(self, welcome: ms.Welcome, known: KnownHub | None) -> None:
        if self._linked is not None:
            raise HubNotTrusted(
                f"the join link names the hub's key {fingerprint(self._linked)}, and what answers signs nothing; {_AGAIN} "
                "(a hub of an older release is to be upgraded: pip install -U fedsoda)"
            )
        if known is not None:
            raise HubNotTrusted(
                f"the hub of the run {welcome.run_name} signed with the key {fingerprint(_bytes_of(known.key))} before, and "
                f"what answers signs nothing; {_AGAIN}"
            )
        if not self._has_noted and self._is_joining:
            self._has_noted = True
            self._say(
                Notice(
                    "the hub signs neither its bundles nor its receipts, as older releases do not: this device cannot tell "
                    "whether the same hub answers the next time; ask its owner to upgrade it"
                )
            )

    def _believed(self, signed: ms.Signed, known: KnownHub | None, path: Path) -> tuple[bytes, BundleStatement]:
        """Return key and statement if the run's hub signed it for this run, and it is neither older than seen nor expired."""
        try:
            key = key_of(signed)
            wanted = self._linked or (_bytes_of(known.key) if known is not None else key)
            if key != wanted:
                raise self._other_key(key, wanted, path)
            statement = read(signed, key, BundleStatement)
        except NotSigned as error:
            raise HubNotTrusted(f"the hub's statement of its bundles is not signed: {error}; {_AGAIN}") from error
        if statement.run_id != self._run_id:
            raise HubNotTrusted(
                f"the hub serves the run {self._run_id}, and shows a statement of the run {statement.run_id[:80]} "
                f"(mix-and-match); {_AGAIN}"
            )
        if known is not None and statement.version < known.version:
            raise HubNotTrusted(
                f"the hub offers version {statement.version} of its bundles, and this device has seen version "
                f"{known.version} (rollback); {_AGAIN} (an owner who put an older copy of the run back begins a new one with "
                "`fedsoda-hub reset`)"
            )
        if known is not None and statement.version == known.version and statement.manifests != known.manifests:
            raise HubNotTrusted(
                f"the hub offers two different bundles as version {known.version}: {_shown(known.manifests)} before, "
                f"{_shown(statement.manifests)} now (mix-and-match); {_AGAIN}"
            )
        # By this device's own clock: a later time that the hub once signed may be wrong too, and would then bar it for good.
        # A statement lives three days and is renewed every hour, so a clock that is a day ahead bars nothing.
        now = self._clock.wall()
        if has_ended(statement, now):
            raise HubNotTrusted(
                f"the hub's statement of its bundles ended on {_day(statement.expires)}, and this device's clock says "
                f"{_day(now)} (freeze); set the clock of the one that is wrong; if both are right, somebody may hold this "
                "device at an old version: ask the hub's owner"
            )
        return key, statement

    def _other_key(self, found: bytes, wanted: bytes, path: Path) -> HubNotTrusted:
        if self._linked is not None:
            return HubNotTrusted(
                f"the join link names the hub's key {fingerprint(wanted)}, and the key {fingerprint(found)} answers; {_AGAIN}"
            )
        return HubNotTrusted(
            f"this device knows the hub of this run by the key {fingerprint(wanted)}, and the key {fingerprint(found)} "
            f"answers; {_AGAIN}; if the owner says that the key has changed, delete {path}"
        )

    def _take(self, key: bytes, statement: BundleStatement, known: KnownHub | None, path: Path) -> None:
        self.key, self.statement = key, statement
        seen = KnownHub(key=as_text(key), version=statement.version, manifests=statement.manifests)
        if self._is_joining and seen != known:
            write_durably(path, msgspec.json.encode(seen))

    # --- receipts ----------------------------------------------------------------------------------------------------

    def receipt(self, receipt: ms.Receipt, update: ms.UpdateStart, edge: ms.EdgeId) -> None:
        """Believe the receipt of an update, or refuse it: without one the update counts as not handed in.

        Raises:
            HubNotTrusted: the run's hub did not sign it, or signed it for another update.
        """
        if self.statement is None or self.key is None:
            return
        why = receipt_problem(receipt, update, edge, self._run_id, self.key)
        if why:
            raise HubNotTrusted(
                f"the receipt of the update of round {update.round} is not the hub's: {why}; the update stays here and is "
                f"sent by the next join; {_AGAIN}"
            )


def has_ended(statement: BundleStatement, now: float) -> bool:
    """Tell whether a statement has expired."""
    return statement.expires < now


def receipt_problem(receipt: ms.Receipt, update: ms.UpdateStart, edge: ms.EdgeId, run_id: str, key: bytes) -> str:
    """Say why a receipt does not prove that this hub accepted this update; "": it does."""
    if receipt.digest != update.digest:
        return f"it is of the update {receipt.digest[:12]}, and {update.digest[:12]} was sent"
    if receipt.signed is None:
        return "it has no signature"
    try:
        found = read(receipt.signed, key, ReceiptStatement)
    except NotSigned as error:
        return str(error)
    signed = (found.run_id, found.round, found.edge, found.digest, found.num_examples)
    sent = (run_id, update.round, edge, update.digest, update.num_examples)
    names = ("run", "round", "edge", "digest", "num_examples")
    different = [
        f"{name} {str(ours)[:40]}" for name, theirs, ours in zip(names, signed, sent, strict=True) if theirs != ours
    ]
    return f"it is signed for another {', '.join(different)}" if different else ""


def _known(path: Path) -> KnownHub | None:
    """Read what is known of a run's hub; None: nothing."""
    try:
        known = msgspec.json.decode(path.read_bytes(), type=KnownHub)
        _bytes_of(known.key)
    except FileNotFoundError:
        return None
    except ValueError as error:  # msgspec's errors too
        raise UsageProblem(
            f"{path} is damaged ({error}), and this device knows the run's hub by it; put it back from a copy, or delete it "
            "if you are sure that the right hub answers"
        ) from error
    return known


def _bytes_of(key: str) -> bytes:
    return from_text(key, KEY_BYTES)


def _shown(manifests: tuple[ms.BlobRef, ...]) -> str:
    return ", ".join(f"{one.digest[:12]} of {one.bytes} bytes" for one in manifests) or "none"


def _day(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"second {seconds:.0f}"
