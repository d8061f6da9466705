"""Write what the hub says to edges of the run's present state: the Welcome and a round's offer. Pure; sending is
`roster.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable

from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation.events import SendOffer
from fedsoda_hub.federation.state import HeldView, LedgerState
from fedsoda_hub.federation.steering import count_in_force
from fedsoda_hub.settings.run import RunSettings

Sizes = Callable[[ms.Digest], ms.BlobRef]  # names a blob of the run with its size


def welcome(edge: ms.EdgeId, state: LedgerState, settings: RunSettings, sizes: Sizes) -> ms.Welcome:
    """Make the answer to a Hello: what the run is and which sub-LLMs it has, from larger to smaller."""
    task, largest = settings.task, state.largest
    return ms.Welcome(
        protocol=ms.PROTOCOL_VERSION,
        run_id=state.run_id,
        run_name=settings.name,
        edge=edge,
        manifest=sizes(largest.manifest),
        rounds=count_in_force(settings.rounds.count, state),
        rounds_done=len(state.losses),
        template=ms.Template(prompt=task.prompt, completion=task.completion),
        max_length=settings.local.max_length,
        batch_size=settings.local.batch_size,
        codec=settings.wire.codec,
        seed=settings.seed,
        stall_seconds=settings.wire.stall_seconds,
        emulator=_view_ref(largest.emulator, sizes),
        smaller=tuple(
            ms.SizeClass(manifest=sizes(one.manifest), emulator=_view_ref(one.emulator, sizes))
            for one in state.sub_llms[1:]
        ),
    )


def offer(
    asked: SendOffer, state: LedgerState, settings: RunSettings, sizes: Sizes, due_seconds: float
) -> ms.RoundOffer:
    """Make the offer of the open round to an edge.

    Args:
        due_seconds: time from now to the deadline.
    """
    sub_llm = state.sub_llms[asked.size_class]
    return ms.RoundOffer(
        round=state.round,
        rounds=count_in_force(settings.rounds.count, state),
        view=_view_ref(sub_llm.adapter, sizes, asked.moved),
        alignment=state.alignment,
        emulator=_view_ref(sub_llm.emulator, sizes),
        local=settings.local,
        due_seconds=due_seconds,
        trains=asked.trains,
        has_feedback=settings.aggregation.rule != "flexlora",
        manifest=sizes(sub_llm.manifest) if state.repruned_for else None,
    )


def _view_ref(view: HeldView, sizes: Sizes, moved: ms.Factor = "both") -> ms.ViewRef:
    if view.delta is None:
        return ms.ViewRef(digest=view.digest, delta=None, snapshot=None)
    return ms.ViewRef(digest=view.digest, delta=sizes(view.delta), snapshot=sizes(view.digest), moved=moved)
