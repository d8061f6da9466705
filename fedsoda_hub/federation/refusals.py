"""Name the kinds of refusals, so that they can be counted: few and fixed, whatever edges and strangers send."""

from __future__ import annotations

from enum import StrEnum


class RefusalKind(StrEnum):
    """The kind of a refusal. The sentence that the refused side reads says more; metrics have this alone."""

    NO_TOKEN = "no_token"
    UNKNOWN_TOKEN = "unknown_token"
    TICKET_ENDED = "ticket_ended"
    REVOKED = "revoked"
    BAD_PROOF = "bad_proof"  # of who comes by a join link
    TOO_OFTEN = "too_often"  # too many connections of an address, or files at once
    OTHER_PROTOCOL = "other_protocol"
    OTHER_DEVICE = "other_device"  # the token belongs to another one
    COPIED_IDENTITY = "copied_identity"
    SIZE_CLASS = "size_class"
    BROKEN_PROTOCOL = "broken_protocol"
    UNTIMELY = "untimely"  # an update that the open round cannot use, whatever is in it
    BAD_UPDATE = "bad_update"
    NO_ROOM = "no_room"  # too many bytes are under way
    DISK_FULL = "disk_full"
