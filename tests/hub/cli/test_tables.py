"""What `evaluate` tells people of its figures, and `edges` of where updates lay."""

from __future__ import annotations

import pytest

from fedsoda_hub.cli.tables import evaluation_lines, standing_words
from fedsoda_hub.evaluation.judge import Evaluation
from fedsoda_hub.federation.state import LastStanding


def test_each_model_has_its_figures_and_its_share_of_each_answer() -> None:
    of_two = Evaluation(
        accuracy={"full": 0.5, "sub_llm": None, "plug_in": 0.75},
        loss={"full": None, "sub_llm": None, "plug_in": 0.25},
        auc={"full": 0.625, "sub_llm": None, "plug_in": 0.875},
        mean_rank={"full": None, "sub_llm": None, "plug_in": None},
        shares={"full": {"no": 0.25, "yes": 0.75}, "sub_llm": None, "plug_in": {"no": 0.5, "yes": 0.5}},
        right_shares={"no": 0.4, "yes": 0.6},
        num_examples=4,
    )
    assert list(evaluation_lines(of_two)) == [
        "full     accuracy  50.0%  loss not a number  AUC 0.625",
        "         chose no 25.0%, yes 75.0%",
        "sub_llm  not judged: the run that this export is from is not on this machine",
        "plug_in  accuracy  75.0%  loss 0.250  AUC 0.875",
        "         chose no 50.0%, yes 50.0%",
        "right    no 40.0%, yes 60.0%",
    ]


def test_of_generated_answers_there_are_no_shares() -> None:
    one = {"full": 0.5}
    generated = Evaluation(
        accuracy={**one}, loss={**one}, auc={"full": None}, mean_rank={"full": 2.5}, shares={"full": {}},
        right_shares={}, num_examples=4,
    )  # fmt: skip
    assert list(evaluation_lines(generated)) == [
        "full     accuracy  50.0%  loss 0.500  mean rank of the right choice 2.50"
    ]


@pytest.mark.parametrize(
    ("standing", "words"),
    [
        (None, ""),
        (LastStanding(3, 1.234, 0.812, 1.0), ", round 3: norm 1.23, cosine +0.81"),
        (LastStanding(4, 12.0, -0.5, 0.104), ", round 4: norm 12, cosine -0.50, 10% kept, against the others"),
        (LastStanding(5, 0.0, None, None), ", round 5: norm 0, no direction"),
    ],
)
def test_where_an_update_lay_is_said_beside_its_edge(standing: LastStanding | None, words: str) -> None:
    assert standing_words(standing) == words
