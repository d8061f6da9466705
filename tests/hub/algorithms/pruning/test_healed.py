"""The distance that groups are chosen by is what ridge regression leaves on texts that it did not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsoda_edge.model.source import Checkpoint
from fedsoda_hub.algorithms.alignment.healing import HELD_OUT
from fedsoda_hub.algorithms.pruning import healed
from tests.tiny import make_tiny_llama

LENGTHS = (9, 14, 14, 20, 11, 17, 23, 8, 19, 12)
TEXTS = [torch.randint(3, 260, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS * 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("healed") / "model", layers=5, dtype=torch.float32)


def test_distances_are_those_of_a_ridge_regression(model: Path) -> None:
    found = healed.distances(Checkpoint.open(str(model)), 4, 2, TEXTS)
    assert [len(row) for row in found] == [2, 2, 1, 0]

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    added: list[torch.Tensor] = []
    whole.model.layers[1].mlp.register_forward_hook(lambda _, __, out: added.append(out[0]))
    with torch.inference_mode():
        states = [whole(text[None], output_hidden_states=True).hidden_states for text in TEXTS]
    u, rest, wanted, sizes = [], [], [], []
    for text, of_mlp in zip(states, added, strict=True):
        size = text[4][0].norm(dim=1, keepdim=True)  # behind layer 3
        u.append(of_mlp / size)
        rest.append((text[2][0] - of_mlp) / size)
        wanted.append(text[4][0] / size)
        sizes.append(size)
    seen = [place for place in range(len(TEXTS)) if place % HELD_OUT != HELD_OUT - 1]
    unseen = [place for place in range(len(TEXTS)) if place not in seen]
    x, y = (
        torch.cat([values[place] for place in seen]).double()
        for values in (u, [a - b for a, b in zip(wanted, rest, strict=True)])
    )
    root = (healed.RIDGE * float((x**2).sum()) / x.shape[1]) ** 0.5
    damped = torch.cat([x, root * torch.eye(x.shape[1], dtype=torch.float64)])
    map_ = torch.linalg.lstsq(damped, torch.cat([y, torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)])).solution
    errors = [((wanted[place] - rest[place] - u[place].double() @ map_) * sizes[place])[1:] for place in unseen]
    of_border = torch.cat([sizes[place][1:] for place in unseen]).square().mean()  # the last of the four layers
    expected = torch.cat(errors).square().sum(dim=1).mean() / of_border
    assert found[1][1] == pytest.approx(float(expected), rel=1e-3)


def test_a_group_whose_work_is_a_map_of_the_layer_below_costs_nothing(model: Path) -> None:
    found = healed.distances(_with_idle_layer(model), 4, 1, TEXTS)
    assert found[1][0] < 1e-6 < found[0][0]


def _with_idle_layer(model: Path) -> Checkpoint:
    """The same model, whose layer 2 adds nothing."""
    source = Checkpoint.open(str(model))
    idle = {name: torch.zeros_like(value) if value.ndim == 2 else value for name, value in source.layer(2).items()}
    return source.with_layers({2: idle})


def test_too_few_texts_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="there are 4 texts; at least 5 are needed"):
        healed.distances(Checkpoint.open(str(model)), 4, 1, TEXTS[:4])
