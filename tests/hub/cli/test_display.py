"""What a hub shows of an open round: who answered, who is in, when it is due."""

from __future__ import annotations

from typing import Any

import pytest

from fedsoda_edge.ports.console import settings_line
from fedsoda_edge.units import counted
from fedsoda_hub.cli.display import Display, _OpenRound

OPENED = {"event": "round_opened", "round": 2, "rounds": 9, "cohort": ["a", "b"], "deadline_at": 1060.0}


class Shown(Display):
    """Keeps what would be shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(jsonl=False)
        self.bars: list[list[Any]] = []
        self.ended = 0
        monkeypatch.setattr("time.time", lambda: 1000.0)
        monkeypatch.setattr(self._line, "show", lambda *bar: self.bars.append(list(bar)))
        monkeypatch.setattr(self._line, "end", self._count_end)
        monkeypatch.setattr(self._line, "say", lambda text: None)

    def _count_end(self) -> None:
        self.ended += 1


def steps(edge: str, step: int, of: int) -> dict[str, Any]:
    return {"event": "edge_progress", "edge": edge, "step": step, "steps": of}


def test_the_bar_of_a_round_counts_local_steps_and_says_who_answered_and_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Shown(monkeypatch)
    for edge in "abc":
        shown.say({"event": "edge_connected", "edge": edge, "software": "1"})
    assert shown.bars == []
    shown.say(OPENED)
    assert shown.bars[-1] == ["round 2", 0, None, "0 of 2 answered, 3 edges in, due in 60 s"]
    shown.say(steps("a", 10, 40))
    assert shown.bars[-1][:3] == ["round 2", 10, 81]
    shown.say(steps("c", 10, 40))  # was not asked
    assert shown.bars[-1][:3] == ["round 2", 10, 81]
    shown.say({"event": "update_accepted", "round": 2, "edge": "a", "num_examples": 8, "loss": 0.5})
    shown.say({"event": "edge_gone", "edge": "c"})
    assert shown.bars[-1] == ["round 2", 40, 81, "1 of 2 answered, 2 edges in, due in 60 s"]


def test_an_extended_cohort_is_counted_with_its_new_due_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    shown.say(OPENED)
    shown.say({"event": "edge_answered", "round": 2, "edge": "b", "how": "declined"})
    shown.say({"event": "cohort_extended", "round": 2, "invited": ["b", "c"], "deadline_at": 1300.0})
    assert shown.bars[-1][3] == "0 of 3 answered, 0 edges in, due in 5 min"


def test_a_round_that_closed_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    shown.say(OPENED)
    count = len(shown.bars)
    closed = {"event": "round_closed", "round": 2, "updates": 2, "loss": 0.5, "bytes_up": 10, "bytes_down": 20}
    shown.say(closed)
    assert (len(shown.bars), shown.ended) == (count, 1)


def test_one_is_no_plural_and_sizes_are_written_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Display(jsonl=False)
    disk = {"needed_bytes": 700_000_000, "free_bytes": 20_000_000_000}
    shown.say({"event": "progress", "job": "prepare", "stage": "caching teacher targets", **disk})
    errors = {"error_before": 0.333, "error_whole": 0.08, "error": 0.089}
    shown.say({"event": "progress", "job": "prepare", "stage": "fitting the border map", **errors})
    tried = {"layers_per_group": 3, "groups": 4, "kl": 0.2512, "cosine": 0.8128}
    shown.say({"event": "progress", "job": "prepare", "stage": "choosing groups", **tried})
    shown.say({"event": "update_accepted", "round": 1, "edge": "a", "num_examples": 1, "loss": 0.5})
    closed = {"event": "round_closed", "round": 1, "loss": 0.5, "bytes_up": 10, "bytes_down": 20}
    shown.say(closed | {"updates": 1})
    shown.say(closed | {"updates": 2})
    shown.say({"event": "run_ended", "rounds": 1})
    assert capsys.readouterr().err.splitlines() == [
        "caching teacher targets: 668 MiB of disk, 18.6 GiB free",
        "fitting the border map: on prompts left out, border states are 33.3% away from the full emulator's without it, 8.9% with it",
        "choosing groups: with 4 x 3 layers gone public KL is 0.251, the adapter's gradient 81.3% like the full LLM's",
        "round 1: a, 1 example, loss 0.500",
        "round 1 closed: 1 update, loss 0.500; 10 B up, 20 B down so far",
        "round 1 closed: 2 updates, loss 0.500; 10 B up, 20 B down so far",
        "the run is over after 1 round",
    ]
    assert _OpenRound(local={"a": (0, 0)}, due_at=60.0).detail(1, 0.0) == "0 of 1 answered, 1 edge in, due in 60 s"


def test_settings_are_one_line_also_where_a_prompt_is_several() -> None:
    values = {"[task] prompt": "Review: {text}\nLabel:", "name": "x", "[task] completion": "{label}"}
    told = {name: {"value": value, "source": "run.toml"} for name, value in values.items()}
    assert settings_line(told) == (
        r"settings: [task] prompt 'Review: {text}\nLabel:', name x, [task] completion {label} (run.toml)"
    )


def test_a_number_of_things_is_one_thing_or_several() -> None:
    assert [counted(number, "sample") for number in (0, 1, 1234)] == ["0 samples", "1 sample", "1,234 samples"]
