"""Shape what a command prints with --json, where its keys are not those of a struct."""

from __future__ import annotations

import msgspec

from fedsoda_hub.federation.jobs import PrepareResult


def prepared_values(result: PrepareResult) -> dict[str, object]:
    """Show the result of `prepare --json`: the largest sub-LLM, and the smaller ones and the master where there are any."""
    first, *others = result.sub_llms
    largest: dict[str, object] = msgspec.to_builtins(first)
    smaller = [
        msgspec.to_builtins(one) | ({"adapter_view": None} if one.adapter_view == first.adapter_view else {})
        for one in others
    ]
    return largest | ({"smaller": smaller, "master": result.master} if smaller else {})
