"""The demo's data: what each office holds, what the evaluation asks, and that one is never the other."""

from __future__ import annotations

from collections import Counter

import pytest

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.demo import run, task
from fedsoda_hub.preparation.public_text import read_blocks

SEEDS = (0, 1, 2)
EDGES = range(3)


def labels(rows: list[task.DemoRow]) -> Counter[str]:
    return Counter(row["desk"] for row in rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_seed_is_one_task(seed: int) -> None:
    assert task.evaluation(seed) == task.evaluation(seed)
    for edge in EDGES:
        assert task.training(edge, seed) == task.training(edge, seed)


def test_another_seed_is_another_task() -> None:
    assert task.evaluation(0) != task.evaluation(1)
    assert task.training(0, 0) != task.training(0, 1)


def test_literal_rows_so_that_a_change_of_python_or_of_the_words_is_seen() -> None:
    assert task.training(0, 0)[0] == {
        "message": "When does the engine leave for the city? Please call me.",
        "desk": "road",
    }
    assert task.evaluation(0)[0] == {
        "message": "My puppy ran away into the forest. Please call me.",
        "desk": "farm",
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_an_office_holds_what_it_says_and_lacks_one_desk(seed: int) -> None:
    for edge in EDGES:
        held = labels(task.training(edge, seed))
        assert held == Counter(task.OFFICES[edge].messages)
        assert len(held) == len(task.DESKS) - 1  # alone it answers at most three quarters of the evaluation
    lacking = [set(task.DESKS) - set(office.messages) for office in task.OFFICES]
    assert not set.intersection(*lacking)  # together they hold every desk


@pytest.mark.parametrize("seed", SEEDS)
def test_the_label_mixes_differ_clearly(seed: int) -> None:
    shares = [
        {desk: held[desk] / held.total() for desk in task.DESKS}
        for held in (labels(task.training(edge, seed)) for edge in EDGES)
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        distance = sum(abs(shares[a][desk] - shares[b][desk]) for desk in task.DESKS) / 2  # total variation
        assert distance >= 0.4


@pytest.mark.parametrize("seed", SEEDS)
def test_the_evaluation_is_balanced(seed: int) -> None:
    rows = task.evaluation(seed)
    assert 300 <= len(rows) <= 500
    assert set(labels(rows).values()) == {len(rows) // len(task.DESKS)}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_message_is_told_twice_and_none_is_asked_that_was_told(seed: int) -> None:
    asked = [row["message"] for row in task.evaluation(seed)]
    assert len(set(asked)) == len(asked)
    for edge in EDGES:
        told = [row["message"] for row in task.training(edge, seed)]
        assert len(set(told)) == len(told)
        assert not set(told) & set(asked)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_the_evaluation_names_what_no_training_message_names(seed: int) -> None:
    told = " ".join(row["message"] for edge in EDGES for row in task.training(edge, seed))
    unseen = [thing for topic in task.TOPICS.values() for thing in topic.unseen]
    assert [thing for thing in unseen if f" {thing}" in told] == []
    rows = task.evaluation(seed)
    new = sum(
        any(
            f" {thing} " in f"{row['message']} " or f" {thing}." in row["message"] or f" {thing}?" in row["message"]
            for thing in unseen
        )
        for row in rows
    )
    assert new == len(rows) // 2


def test_a_message_does_not_name_its_desk() -> None:
    for desk, topic in task.TOPICS.items():
        text = " ".join((*topic.things, *topic.unseen, *topic.sayings, *task.FRAMES)).lower()
        assert desk not in text.split()


def test_samples_fit_the_run_and_each_desk_is_one_id() -> None:
    tokenizer = SampleTokenizer(run.MODEL / "tokenizer.json", 2)
    prompt, completion = TextTemplate(task.PROMPT), TextTemplate(task.COMPLETION)
    for rows in (task.training(0, 0), task.training(1, 0), task.training(2, 0), task.evaluation(0)):
        for row in rows:
            sample = tokenizer.sample(prompt.render(row), completion.render(row))
            assert sample is not None
            assert sample.num_supervised == 2  # the desk and eos
            assert len(sample.ids) <= run.MAX_LENGTH


def test_the_public_text_is_long_enough_for_all_held_out_blocks() -> None:
    text = run.HERE / "public.txt"
    assert text.stat().st_size <= 300_000
    used, held_out = read_blocks(text, run.MODEL / "tokenizer.json", 1, run.SEQUENCES, run.LENGTH)
    assert (len(used), len(held_out)) == (run.SEQUENCES, 32)
