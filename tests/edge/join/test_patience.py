"""One policy says when a failed try is made again: by time without progress, in breaks that grow and are drawn at random."""

from __future__ import annotations

import asyncio
import statistics

import pytest

from fedsoda_edge.errors import HubUnreachable
from fedsoda_edge.join.patience import GIVE_UP_SECONDS, Patience
from tests.skipping_clock import SkippingClock

AWAY = HubUnreachable("TCP: nothing answers", "TCP")


def test_breaks_are_exponential_with_full_jitter_and_bounded() -> None:
    async def tries() -> list[float]:
        clock = SkippingClock()
        patience = Patience(clock, None)
        for _ in range(12):
            await patience.after(AWAY)
        return clock.breaks

    drawn = [asyncio.run(tries()) for _ in range(400)]
    for number, breaks in enumerate(zip(*drawn, strict=True)):
        most = min(30.0, 2.0**number)
        assert all(0 <= seconds <= most for seconds in breaks)
        # uniform: mean most / 2, standard error most / sqrt(12 * 400); five of these
        assert statistics.fmean(breaks) == pytest.approx(most / 2, abs=5 * most / (12 * 400) ** 0.5)


def test_without_progress_the_last_error_stands_after_ten_minutes_and_not_before() -> None:
    clock = SkippingClock()
    tried = [HubUnreachable("try 0", "TCP")]

    async def give_up() -> None:
        patience = Patience.of(clock, unattended=False)
        while True:
            await patience.after(tried[-1])
            tried.append(HubUnreachable(f"try {len(tried)}", "TCP"))

    with pytest.raises(HubUnreachable) as last:
        asyncio.run(give_up())
    assert last.value is tried[-1]
    assert clock.slept == pytest.approx(GIVE_UP_SECONDS, abs=2)
    assert len(clock.breaks) > 20


def test_nobody_waits_in_vain_for_who_does_not_attend() -> None:
    async def go_on() -> float:
        clock = SkippingClock()
        patience = Patience.of(clock, unattended=True)
        for _ in range(1000):
            await patience.after(AWAY)
        return clock.slept

    assert asyncio.run(go_on()) > 10 * GIVE_UP_SECONDS


def test_progress_and_nothing_else_begins_it_anew() -> None:
    async def play() -> None:
        clock = SkippingClock()
        patience = Patience(clock, 100.0)
        for _ in range(50):
            await patience.after(AWAY)
            assert not patience.is_new
            patience.progressed()
            assert patience.is_new
        assert all(seconds <= 1 for seconds in clock.breaks)

    asyncio.run(play())
