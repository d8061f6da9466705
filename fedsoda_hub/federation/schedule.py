"""Decide what happens between rounds: who is invited, which factor trains, when to probe, align, draw or judge.

Everything here follows from the rules and the folded ledger alone, so that replay comes to the same answers. An open
round is `collecting.py`'s.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fedsoda_edge.protocol.messages import EdgeId, Factor
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation.state import LedgerState

AUTO = "auto"  # realign_every: when the sub-LLM has drifted, measured before every round that may realign
AUTO_ROUNDS = 2  # least rounds from one realignment to the next
KL_GROWTH = 1.1  # of public KL after the last alignment, from which on the sub-LLM has drifted
COSINE_LEFT = 0.9  # share of the cosine at the alignment's first probe: docs/methods.md (m5-drift) says why


@dataclass(frozen=True)
class Rules:
    """The settings that decide rounds: [rounds], and some keys of other tables.

    has_eval: there is evaluation data. eval_every: rounds from one evaluation to the next; 0: only at the end.
    aggregation: the rule of [aggregation], which says what edges train.
    """

    count: int
    min_edges: int
    cohort: int
    quorum: float
    deadline_seconds: float
    stall_seconds: float
    realign_every: int | str
    seed: int
    has_eval: bool
    eval_every: int = 0
    reprune_every: int = 0
    aggregation: str = "fedavg"


def trained_factor(rule: str, round_number: int) -> Factor:
    """Return which factors edges train and send in a round: B alone, B and A by turns, or both.

    FFA-LoRA (arXiv 2403.12313) trains B, RoLoRA (arXiv 2502.01755) takes turns. Where all edges share one factor, the
    mean of the other gives the mean of the products, and half as much travels.
    """
    if rule == "rolora":
        return "B" if round_number % 2 else "A"
    return "B" if rule == "ffa" else "both"


def choose_cohort(ordered: list[EdgeId], size: int, seed: int, round_number: int) -> tuple[EdgeId, ...]:
    """Sample min(size, number of eligible edges) edges by (seed, round); ascending.

    Args:
        ordered: the eligible edges, ascending.
    """
    chance = random.Random(f"{seed}/{round_number}")
    return tuple(sorted(chance.sample(ordered, min(size, len(ordered)))))


def job_before_next_round(rules: Rules, state: LedgerState) -> jobs.Job | None:
    """Return the torch work that is due between the last round and the next, or the run's end; None: nothing is due."""
    if _is_judging_due(rules, state):
        return jobs.Evaluate(
            round=state.round,
            master=state.master,
            emulator_view=state.largest.emulator.digest,
            manifest=state.largest.manifest,
        )
    if state.round >= rules.count:
        return None
    upcoming = state.round + 1
    every = rules.reprune_every
    if every and state.round and state.round % every == 0 and state.repruned_for < upcoming:
        return jobs.Reprune(round=upcoming, master=state.master)
    if rules.realign_every == AUTO:
        if upcoming - state.realigned_for < AUTO_ROUNDS:
            return None
        if not state.probes or state.probes[-1].round != upcoming:
            return jobs.Probe(master=state.master, emulator_view=state.largest.emulator.digest)
        is_due = _has_drifted(state)
    else:
        assert isinstance(rules.realign_every, int), "settings allow a number or auto"
        is_due = rules.realign_every > 0 and upcoming % rules.realign_every == 0 and state.realigned_for < upcoming
    if not is_due:
        return None
    views = tuple(one.emulator.digest for one in state.sub_llms)
    return jobs.Realign(version=state.alignment + 1, master=state.master, emulator_views=views)


def _is_judging_due(rules: Rules, state: LedgerState) -> bool:
    is_last = state.round >= rules.count
    is_judged = is_last or (rules.eval_every > 0 and state.round % rules.eval_every == 0)
    return rules.has_eval and is_judged and state.evaluated_round < state.round


def _has_drifted(state: LedgerState) -> bool:
    found = state.probes[-1]
    return found.kl > KL_GROWTH * state.aligned_kl or found.cosine < COSINE_LEFT * state.first_probe.cosine
