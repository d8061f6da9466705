"""Decide an open round: whose answer is awaited, which update is accepted, whom to invite besides.

When a round opens and what is owed next is `rounds.py`'s.
"""

from __future__ import annotations

import math

from fedsoda_edge.protocol.messages import Digest, EdgeId, Receipt, Refusal
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.events import Append, Effect, Send
from fedsoda_hub.federation.open_round import OpenRound
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.federation.schedule import Rules, trained_factor
from fedsoda_hub.federation.state import LedgerState

MAX_EXAMPLES = 2**31
MAX_LOSS = 1e6  # nats; a larger one would make the round's mean, and what is shown of it, infinite


def quorum(rules: Rules, state: LedgerState) -> int:
    """Return how many accepted updates the open round needs."""
    return math.ceil(rules.quorum * state.invited)


def judge(state: LedgerState, here: OpenRound, update: ev.UpdateArrived, *, is_merging: bool) -> list[Effect]:
    """Accept an update once, or refuse it and say why.

    An edge that sends an accepted update again gets the same receipt.

    Args:
        is_merging: the round's updates are being merged already.
    """
    edge = update.edge
    if has_receipt(state, edge, update.round, update.digest):
        return [Send(edge, Receipt(round=update.round, digest=update.digest))]
    untimely = why_untimely(state, here, edge, update.round, is_merging=is_merging)
    if untimely is not None:
        return [_refusal(update, untimely, RefusalKind.UNTIMELY)]
    problem = _problem(state, update)
    if problem:
        answered: list[Effect] = (
            [Append(rec.EdgeAnswered(round=state.round, edge=edge, how="refused"))] if here.is_awaited(edge) else []
        )
        return [*answered, _refusal(update, problem, RefusalKind.BAD_UPDATE)]
    assert update.loss is not None
    accepted = rec.UpdateAccepted(
        round=update.round,
        edge=edge,
        digest=update.digest,
        num_examples=update.num_examples,
        loss=update.loss,
        size_class=update.size_class,
    )
    return [Append(accepted), Send(edge, Receipt(round=update.round, digest=update.digest))]


def has_receipt(state: LedgerState, edge: EdgeId, number: int, digest: Digest) -> bool:
    """Tell whether this is the edge's last accepted update, which it sends again for its receipt."""
    last = state.receipts.get(edge)
    return last is not None and (last.round, last.digest) == (number, digest)


def why_untimely(state: LedgerState, here: OpenRound, edge: EdgeId, number: int, *, is_merging: bool) -> str | None:
    """Return why an update of this round of the edge cannot be used now, whatever is in it; None: it can."""
    if state.phase != "collecting" or number != state.round or is_merging:
        return f"round {number} is closed; wait for the next offer"
    if not here.is_invited(edge):
        return f"{edge} is not invited to round {number}; wait for the next offer"
    if edge in state.accepted:
        return f"round {number} already has another update of {edge}; wait for the next offer"
    return None


def _problem(state: LedgerState, update: ev.UpdateArrived) -> str | None:
    """Return why the update cannot be used; None: it can be used."""
    view = state.sub_llms[update.size_class].adapter.digest
    if update.base != view:
        return (
            f"the update starts from view {update.base[:12]}, but round {state.round} from {view[:12]}; wait for the "
            "next offer"
        )
    if update.alignment != state.alignment:
        return (
            f"the update used alignment {update.alignment}, but round {state.round} has {state.alignment}; wait for "
            "the next offer"
        )
    if not 1 <= update.num_examples <= MAX_EXAMPLES:
        return f"num_examples is {update.num_examples}, and must be 1 to {MAX_EXAMPLES}; check this edge's data"
    if update.loss is None or not 0 <= update.loss <= MAX_LOSS:
        found = "not a number" if update.loss is None or math.isnan(update.loss) else f"{update.loss:g}"
        return f"the loss is {found}, and must be 0 to {MAX_LOSS:g}; lower [local] learning_rate, or check this edge's data"
    return update.problem


def _refusal(update: ev.UpdateArrived, reason: str, kind: RefusalKind) -> Send:
    return Send(update.edge, Refusal(round=update.round, reason=reason), kind)


def merge(rules: Rules, state: LedgerState) -> jobs.Aggregate:
    """Make the job that closes the round, with its accepted updates in ascending edge id."""
    return jobs.Aggregate(
        trains=trained_factor(rules.aggregation, state.round),
        master=state.master,
        moments=state.moments,
        views=tuple(one.adapter.digest for one in state.with_own_view),
        updates=tuple(
            jobs.AcceptedUpdate(
                edge=edge,
                num_examples=update.num_examples,
                digest=update.digest,
                view=state.sub_llms[update.size_class].adapter.digest,
            )
            for edge, update in sorted(state.accepted.items())
        ),
    )


def extended(rules: Rules, state: LedgerState, edges: list[EdgeId], now: float) -> Append:
    """Invite these edges, perhaps again, to the open round, whose deadline is set again from now."""
    return Append(rec.CohortExtended(round=state.round, invited=tuple(edges), deadline_at=now + rules.deadline_seconds))


def replacements(state: LedgerState, here: OpenRound) -> list[EdgeId]:
    """Choose whom to invite at the deadline below quorum, instead of edges that have not answered.

    Edges that were not invited come first, then those that answered without an update. An edge that is still at work is
    awaited as before and needs no second invitation.
    """
    wanted = max(1, state.invited - len(state.accepted))
    fresh = here.uninvited(wanted)
    return [*fresh, *sorted(here.here.intersection(state.answered))][:wanted]
