"""Hidden states at the border are those of the layers below it, moved by the border map at every position but the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsoda_edge.model.border import apply_map, border_states, map_specs, map_specs_like, map_tensors
from fedsoda_edge.model.branches import joined
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.streaming import stream
from tests.edge.model.test_bundle import write

WIDTH = 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("b") / "bundle", tiny_llama, trained=True)


@pytest.fixture(scope="module")
def view(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The emulator's view with a map that doubles states and adds 1."""
    return bundle.emulator_lora() | {"border.D": torch.eye(WIDTH), "border.b": torch.ones(1, WIDTH)}


def test_border_states_are_streamed_with_the_lora_and_then_mapped(
    bundle: Bundle, view: dict[str, torch.Tensor]
) -> None:
    ids = [torch.tensor([1, 40, 50, 60]), torch.tensor([1, 41])]
    scale, layers = bundle.manifest.lora.scale, bundle.plan.swept
    plain = stream(bundle, layers, ids, lora=bundle.emulator_lora(), lora_scale=scale)
    found = border_states(bundle, layers, ids, emulator=view, lora_scale=scale)
    for states, below in zip(found, plain, strict=True):
        assert torch.equal(states[0], below[0])
        torch.testing.assert_close(states[1:], 2 * below[1:] + 1)
    without = border_states(bundle, layers, ids, emulator=bundle.emulator_lora(), lora_scale=scale)
    assert all(torch.equal(states, below) for states, below in zip(without, plain, strict=True))


def test_border_states_may_begin_between_the_layers(bundle: Bundle, view: dict[str, torch.Tensor]) -> None:
    ids = [torch.tensor([1, 40, 50, 60])]
    scale, layers = bundle.manifest.lora.scale, bundle.plan.swept
    start = stream(bundle, layers[:2], ids, lora=view, lora_scale=scale)
    [found] = border_states(bundle, layers[2:], ids, start=start, emulator=view, lora_scale=scale)
    [expected] = border_states(bundle, layers, ids, emulator=view, lora_scale=scale)
    assert torch.equal(found, expected)


def test_sequences_that_share_a_row_are_mapped_as_each_is_alone(bundle: Bundle, view: dict[str, torch.Tensor]) -> None:
    """Their first id is shared: elsewhere in the row no position is 0, though a branch begins there."""
    sequences = [[7, 8, 9], [7, 6]]
    row, branches = joined(sequences)
    scale, layers = bundle.manifest.lora.scale, bundle.plan.swept
    [together] = border_states(
        bundle, layers, [torch.tensor(row)], branches=[branches], emulator=view, lora_scale=scale
    )
    alone = border_states(bundle, layers, [torch.tensor(ids) for ids in sequences], emulator=view, lora_scale=scale)
    for number, states in enumerate(alone):
        columns = [branches.column(number, at) for at in range(len(states))]
        torch.testing.assert_close(together[columns], states, rtol=1e-4, atol=1e-5)


def test_the_first_position_stays_and_positions_may_begin_again_in_a_row() -> None:
    view = {"border.D": torch.eye(2), "border.b": torch.ones(1, 2)}
    states = torch.arange(8.0).reshape(1, 4, 2)
    assert apply_map(states, view).tolist() == [[[0, 1], [5, 7], [9, 11], [13, 15]]]
    packed = apply_map(states, view, positions=torch.tensor([[0, 1, 0, 1]]))
    assert packed.tolist() == [[[0, 1], [5, 7], [4, 5], [13, 15]]]
    assert apply_map(states, {"layers.1.x.lora_A": torch.ones(1, 1)}) is states


def test_a_map_of_low_rank_is_a_product() -> None:
    left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    states = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    low = {"border.D.left": left, "border.D.right": right, "border.b": torch.zeros(1, 2)}
    assert torch.equal(
        apply_map(states, low), apply_map(states, {"border.D": left @ right, "border.b": torch.zeros(1, 2)})
    )


@pytest.mark.parametrize(
    ("rank", "names"),
    [
        (0, []),
        (3, ["border.D.left", "border.D.right", "border.b"]),
        (8, ["border.D", "border.b"]),
        (9, ["border.D", "border.b"]),
    ],
)
def test_a_views_layout_says_which_map_it_has(rank: int, names: list[str]) -> None:
    specs = map_specs(8, rank)
    assert [spec.name for spec in specs] == names == sorted(names)
    assert map_specs_like(specs, 8) == specs
    tensors = {spec.name: torch.zeros(spec.shape) for spec in specs}
    assert map_tensors(tensors | {"layers.1.x.lora_A": torch.zeros(1, 1)}) == tensors
