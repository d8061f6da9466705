"""FedSODA on a device: join a hub, train on private data, send LoRA deltas. Importing this loads no torch.

edge = Edge("https://hub.example.org", token_file="clinic-7.token")
with edge.join(LocalData.from_jsonl("visits.jsonl")) as participation:
    for offer in participation:
        offer.submit(offer.train())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsoda_edge.errors import FedSODAError

if TYPE_CHECKING:
    from fedsoda_edge.data.local_data import LocalData
    from fedsoda_edge.edge import Edge, Offer, Participation, Update

__all__ = ["Edge", "FedSODAError", "LocalData", "Offer", "Participation", "Update"]


def __getattr__(name: str) -> Any:
    """Load a class of the SDK on first use: `fedsoda-edge --help` needs none of them."""
    if name == "LocalData":
        from fedsoda_edge.data.local_data import LocalData

        return LocalData
    if name in ("Edge", "Offer", "Participation", "Update"):
        from fedsoda_edge import edge

        return getattr(edge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
