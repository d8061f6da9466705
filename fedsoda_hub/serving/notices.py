"""Define what a hub tells an owner's program or webhook, one tagged struct each: the JSON of [notify]. Pure.

Tags and keys are promises to those who parse them (tests/schemas/notify.json). When one is sent is `notify.py`'s.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

import msgspec
from msgspec import Meta

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_edge.protocol.ranges import Count, Positive
from fedsoda_edge.units import counted, human_bytes

MAX_NAMED = 20  # edges in one notice


class About(TypedDict):
    """The fields that all notices have."""

    id: str
    at: float
    run: str
    run_id: str
    text: str


class HubNotice(msgspec.Struct, frozen=True, tag_field="event", kw_only=True, forbid_unknown_fields=True):
    """The root of all notices.

    id: of this notice, the same at every try. at: seconds since 1970. run, run_id: the run's name, and what was drawn for
    it. text: the notice as a sentence for people.
    """

    id: str
    at: float
    run: str
    run_id: str
    text: str
    schema: Literal[1] = 1

    @property
    def kind(self) -> str:
        """The notice's tag, as [notify] events names it."""
        return str(self.__struct_config__.tag)


class RunOverNotice(HubNotice, frozen=True, tag="run_over"):
    """The run is over. loss: of the last round, nats. accuracy: by model, of the last evaluation; empty: none."""

    rounds: Count
    loss: float | None
    accuracy: dict[str, float]


class QuorumNotice(HubNotice, frozen=True, tag="below_quorum"):
    """The deadline of a round passed with fewer updates than it needs. Sent once a round."""

    round: Positive
    accepted: Count
    needed: Positive
    invited: Positive


class EdgesGoneNotice(HubNotice, frozen=True, tag="edge_gone"):
    """Edges were away for a day while the hub was there. edges: at most 20 of them. Sent once an absence."""

    edges: Annotated[tuple[EdgeId, ...], Meta(min_length=1, max_length=MAX_NAMED)]
    count: Positive


class DiskNotice(HubNotice, frozen=True, tag="disk_low"):
    """The disk of the run's directory has little space, or none that a write needed. Sent once until it has more."""

    free_bytes: Count
    limit_bytes: Count
    is_full: bool


class ComputeNotice(HubNotice, frozen=True, tag="compute_failed"):
    """The process that owns torch ended during a job; the hub tries three times, then it ends."""

    job: str
    message: str


class RoundNotice(HubNotice, frozen=True, tag="round_closed"):
    """A round closed.

    loss: nats, the mean over the round's examples. seconds: since it opened; None: an earlier hub opened it. bytes_up,
    bytes_down: those of all edges since the run began. cross_term: what averaging A and B apart lost of the mean product.
    """

    round: Positive
    rounds: Positive
    loss: float | None
    updates: Positive
    seconds: float | None
    bytes_up: Count
    bytes_down: Count
    cross_term: float | None


class EvaluationNotice(HubNotice, frozen=True, tag="evaluated"):
    """The run was judged after a round: accuracy and mean completion loss in nats, by model."""

    round: Positive
    accuracy: dict[str, float]
    loss: dict[str, float | None]
    num_examples: Count


class TrialNotice(HubNotice, frozen=True, tag="trial"):
    """The owner asked whether notices arrive: `fedsoda-hub notify RUN.toml`."""


AnyNotice = (
    RunOverNotice
    | QuorumNotice
    | EdgesGoneNotice
    | DiskNotice
    | ComputeNotice
    | RoundNotice
    | EvaluationNotice
    | TrialNotice
)


def shares(accuracy: dict[str, float]) -> str:
    """Write accuracies as people read them; "" where there are none."""
    return "; accuracy " + ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items()) if accuracy else ""


def gone_sentence(edges: tuple[EdgeId, ...], count: int) -> str:
    """Say who is away."""
    more = f" and {counted(count - len(edges), 'other')}" if count > len(edges) else ""
    verb = "was" if count == 1 else "were"
    return f"{', '.join(edges)}{more} {verb} not connected for a day"


def disk_sentence(free: int, limit: int, is_full: bool) -> str:
    """Say how little is left."""
    if is_full:
        return f"the disk is full: something could not be written, {human_bytes(free)} are free; free some space there"
    return f"{human_bytes(free)} of disk are free, less than {human_bytes(limit)}; free some space there"
