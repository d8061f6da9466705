"""An estimate is there with a stage's first piece, follows a stage that slows down, and is never of another stage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsoda_hub.run.pace import Pace
from fedsoda_hub.run.status import RunningJob


def test_an_even_stage_is_estimated_from_its_first_piece_on() -> None:
    pace = Pace()
    pace.note("prepare", "reading the full LLM", 0, 0, 100.0)
    assert pace.working("prepare", 103.0) == RunningJob(job="prepare", stage="reading the full LLM", seconds=3.0)
    pace.note("prepare", "aligning", 1, 200, 106.0)  # it began at 100 s, with the last that was heard
    now = pace.working("prepare", 106.0)
    assert (now.done, now.total, now.seconds, now.seconds_left) == (1, 200, 6.0, 199 * 6.0)
    for step in range(2, 82):
        pace.note("prepare", "aligning", step, 200, 100.0 + 6 * step)
    now = pace.working("prepare", 100.0 + 6 * 81 + 2)  # 2 s into the next step
    assert now.done == 81
    assert now.seconds_left == pytest.approx(119 * 6 - 2)
    pace.note("prepare", "aligning", 200, 200, 1400.0)
    assert pace.working("prepare", 1400.0).seconds_left == 0.0


def test_a_stage_that_continues_is_estimated_from_what_is_seen_of_it() -> None:
    pace = Pace()
    pace.note("prepare", "aligning", 81, 200, 10.0)
    assert pace.working("prepare", 12.0).seconds_left is None  # 81 steps took an hour, or were loaded at once
    pace.note("prepare", "aligning", 82, 200, 15.0)
    assert pace.working("prepare", 15.0).seconds_left == 118 * 5.0


def test_a_stage_that_slows_down_is_seen_to() -> None:
    pace = Pace()
    pace.note("prepare", "quantizing", 0, 10, 0.0)
    pace.note("prepare", "quantizing", 2, 10, 2.0)  # 1 s a piece
    assert pace.working("prepare", 2.0).seconds_left == 8.0
    assert pace.working("prepare", 2.5).seconds_left == 7.5
    assert pace.working("prepare", 11.0).seconds_left == pytest.approx(11 / 3 * 8 - 9)  # the third takes 9 s already


def test_the_estimate_of_a_stage_is_not_of_another_stage_or_job() -> None:
    pace = Pace()
    pace.note("evaluate", "evaluating", 1, 10, 5.0)
    assert pace.working("aggregate", 6.0) == RunningJob(job="aggregate")
    pace.note("evaluate", "evaluating", 9, 10, 13.0)
    pace.note("evaluate", "evaluating", 0, 10, 60.0)  # the next round's
    assert pace.working("evaluate", 61.0) == RunningJob(
        job="evaluate", stage="evaluating", done=0, total=10, seconds=1.0, seconds_left=None
    )


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.floats(0, 100)), max_size=60), st.floats(0, 100))
def test_whatever_is_heard_an_estimate_is_a_time_or_none(heard: list[tuple[int, int, float]], after: float) -> None:
    pace, now = Pace(), 0.0
    for done, total, seconds in heard:
        now += seconds
        pace.note("prepare", f"stage {total}", done, total, now)
    found = pace.working("prepare", now + after)
    assert found.seconds >= 0
    assert found.seconds_left is None or 0 <= found.seconds_left < 1e6
