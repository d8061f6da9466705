"""Make what an attacking edge hands in instead of its own update, to see what a rule of [aggregation] robust is worth.

All but label-flip train honestly first, so that lengths are those of an update. Those that know the others' updates know
all of them, of this round: no real attacker knows more. Where an attacker hands it in is `attacking.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.compare.settings import AttackKind as Kind

Delta = Mapping[str, Tensor]
KNOW_ALL: tuple[Kind, ...] = ("a-little", "inner-product", "colluding")
SCALE = 10.0  # of scaled and noise
DEVIATIONS = 1.5  # of a-little, as in ByzFL


def attackers_among(edges: Sequence[str], share: float) -> tuple[str, ...]:
    """Choose the attackers: the last of these edges, as many as the share says, rounded, but one at least."""
    return tuple(edges[len(edges) - max(1, round(share * len(edges))) :])


def forged(kind: Kind, own: Delta, honest: Sequence[Delta], num_attackers: int, seed: int) -> dict[str, Tensor]:
    """Make the delta that an attacker hands in.

        sign-flip      the reverse of its own
        scaled         the reverse of its own, 10 times as long
        noise          normal noise, 10 times as long as its own
        label-flip     its own: its rows were changed (`flipped`)
        a-little       the mean of the honest deltas less 1.5 of their standard deviations (Baruch et al. 2019, arXiv
                       1902.06156)
        inner-product  the reverse of that mean, so long that the mean of all is reversed (Xie et al. 2020, arXiv
                       1903.03936)
        colluding      the reverse of that mean, as long as the longest honest delta: each attacker sends the same

    Args:
        own: what the attacker trained. honest: the others' deltas of the round, as the hub decodes them.
        seed: what noise is drawn by.
    """
    match kind:
        case "label-flip":
            return dict(own)
        case "sign-flip":
            return {name: -value for name, value in own.items()}
        case "scaled":
            return {name: -SCALE * value for name, value in own.items()}
        case "noise":
            drawn = torch.Generator().manual_seed(seed)
            noise = {name: torch.randn(value.shape, generator=drawn) for name, value in sorted(own.items())}
            factor = SCALE * _length(own) / _length(noise)
            return {name: factor * value for name, value in noise.items()}
    if not honest:
        return {name: -value for name, value in own.items()}  # there is nobody to hide among
    stacks = {name: torch.stack([delta[name] for delta in honest]) for name in own}
    mean = {name: stack.mean(dim=0) for name, stack in stacks.items()}
    match kind:
        case "a-little":
            return {name: mean[name] - DEVIATIONS * stack.std(dim=0, correction=0) for name, stack in stacks.items()}
        case "inner-product":
            return {name: -2.0 * len(honest) / num_attackers * value for name, value in mean.items()}
        case "colluding":
            factor = max(map(_length, honest)) / max(_length(mean), torch.finfo(torch.float32).tiny)
            return {name: -factor * value for name, value in mean.items()}


def _length(delta: Delta) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in delta.values()))


def flipped(label: str, labels: Sequence[str]) -> str:
    """Return the label after this one, of all labels in order; after the last comes the first.

    Raises:
        UsageProblem: there is only one.
    """
    known = sorted(set(labels))
    if len(known) < 2:
        raise UsageProblem(
            f'[compare] attackers: kind = "label-flip" needs two labels, and all rows have {label!r}; name the column of '
            "the labels in [compare] label, or choose another kind"
        )
    return known[(known.index(label) + 1) % len(known)]
