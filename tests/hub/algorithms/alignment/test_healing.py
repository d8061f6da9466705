"""Healing is least squares: it finds what brute force finds, lets a kept layer do its group's work, and holds the sink."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsoda_edge.model.nf4 import NF4Tensor, dequantize, quantize
from fedsoda_edge.model.source import Checkpoint, dense
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.protocol.manifest import Half
from fedsoda_hub.algorithms.alignment import healing
from tests.tiny import make_tiny, make_tiny_llama

TEXTS, UNSEEN = (
    [
        torch.cat([torch.tensor([1]), text])
        for text in torch.randint(3, 260, (count, 24), generator=torch.Generator().manual_seed(count))
    ]
    for count in (60, 20)
)
AFTER = {0: 0, 1: 3, 4: 4}  # of six layers: 2 and 3 are removed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Six layers in fp32."""
    directory = tmp_path_factory.mktemp("healing") / "model"
    make_tiny_llama(directory, layers=6, dtype=torch.float32)
    return Checkpoint.open(str(directory))


BOS, KEY, SINK = 1, 5, 9  # the first id of all texts, the feature that tells it, and the one that becomes massive


@pytest.fixture(scope="module")
def with_sink(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same model, whose layer 2 makes the first position's state some hundred times as long as the others'."""
    directory = tmp_path_factory.mktemp("healing") / "sink"
    shutil.copytree(model.path, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, KEY] = 0.0
    tensors["model.embed_tokens.weight"][BOS, KEY] = 3.0
    for number in range(3):  # nothing but the first id has the key, and the MLPs of these layers see it
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{number}.{name}.weight"][KEY] = 0.0
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{number}.mlp.{name}.weight"][0] = 0.0
            tensors[f"model.layers.{number}.mlp.{name}.weight"][0, KEY] = 3.0
        tensors[f"model.layers.{number}.mlp.down_proj.weight"][:, 0] = 0.0
    tensors["model.layers.2.mlp.down_proj.weight"][SINK, 0] = 50.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(str(directory))


def heal(
    source: Checkpoint, *, in_nf4: bool = False, healed: Mapping[int, healing.StoredLayer] | None = None
) -> dict[int, healing.StoredLayer]:
    return dict(healing.heal(source, AFTER, TEXTS, in_nf4=in_nf4, lacking={}, healed=healed or {}))


def error(made: Sequence[Tensor], wanted: Sequence[Tensor], first: int = 1) -> float:
    """Mean |made - wanted|^2 / |wanted|^2 over positions from `first` on."""
    a, b = (torch.cat([state[first:] for state in states]) for states in (made, wanted))
    return float(((a - b).square().sum(dim=1) / b.square().sum(dim=1)).mean())


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_a_refitted_matrix_is_the_least_squares_solution(ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, r, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 12), (50, 7), (7, 12))
    )
    sums = healing.Sums(7, 12)
    sums.add(z.float(), r.float())
    rows = torch.cat([z, ridge**0.5 * torch.eye(12, dtype=torch.float64)])
    wanted = torch.cat([r, ridge**0.5 * down.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(healing.refit(sums, down, ridge), expected, rtol=1e-4, atol=1e-4)
    assert sums.mean_error(expected) == pytest.approx(float((z @ expected.T - r).square().sum()) / 50, rel=1e-4)


def test_nothing_changes_where_nothing_is_removed(model: Checkpoint) -> None:
    made = dict(healing.heal(model, {0: 0, 1: 1}, TEXTS, in_nf4=False, lacking={}, healed={}))
    for number, layer in made.items():
        for name, tensor in model.layer(number).items():
            torch.testing.assert_close(layer[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_kept_layer_does_the_work_of_its_group(model: Checkpoint) -> None:
    wanted = stream(model, range(5), UNSEEN)
    pruned = error(stream(model, list(AFTER), UNSEEN), wanted)
    healed = error(stream(model.with_layers(heal(model)), list(AFTER), UNSEEN), wanted)
    assert healed < 0.7 * pruned


def test_a_layer_takes_up_what_rounding_below_it_left(model: Checkpoint) -> None:
    wanted = stream(model, range(5), UNSEEN)
    matrices = {name for name, tensor in model.layer(0).items() if tensor.ndim == 2}

    def left(layers: Mapping[int, healing.StoredLayer]) -> float:
        return error(stream(model.with_layers(layers), list(AFTER), UNSEEN), wanted)

    def rounded(layer: healing.StoredLayer) -> healing.StoredLayer:
        return {name: quantize(value) if name in matrices else value for name, value in dense(layer).items()}

    healed = heal(model, in_nf4=True)
    assert all(isinstance(layer[name], NF4Tensor) for layer in healed.values() for name in matrices)
    rounded_later = left({number: rounded(layer) for number, layer in heal(model).items()})
    assert left(healed) - left(heal(model)) < 0.9 * (rounded_later - left(heal(model)))


def test_layers_that_are_healed_already_are_not_solved_for_again(model: Checkpoint) -> None:
    whole = heal(model, in_nf4=True)
    rest = heal(model, in_nf4=True, healed={number: whole[number] for number in (0, 1)})
    assert list(rest) == [4]
    for name, part in whole[4].items():
        again = rest[4][name]
        if isinstance(part, NF4Tensor):
            assert isinstance(again, NF4Tensor)
            part, again = dequantize(part), dequantize(again)
        assert torch.equal(part, again)


def test_the_sink_stays_where_the_layer_that_makes_it_is_removed(with_sink: Checkpoint) -> None:
    wanted = stream(with_sink, range(5), UNSEEN)
    first, others = (torch.stack(wanted)[:, at].norm(dim=-1).median() for at in (0, slice(1, None)))
    assert first > 20 * others
    pruned = stream(with_sink, list(AFTER), UNSEEN)
    healed, rounded = (
        stream(with_sink.with_layers(heal(with_sink, in_nf4=in_nf4)), list(AFTER), UNSEEN) for in_nf4 in (False, True)
    )

    def of_first(states: Sequence[Tensor]) -> float:
        return error([state[:1] for state in states], [state[:1] for state in wanted], first=0)

    assert of_first(pruned) > 0.9
    assert of_first(healed) < 0.01
    assert of_first(rounded) < 0.05
    assert error(healed, wanted) < 0.75 * error(pruned, wanted)


def test_massive_tokens_that_look_like_others_do_not_spoil_them() -> None:
    generator = torch.Generator().manual_seed(0)
    true, length, width = torch.randn(7, 12, generator=generator), 40, 12
    inner = torch.randn(25, length, width, generator=generator)
    inner[:, 1:, 0], inner[:, 0] = 0.0, torch.eye(width)[0]  # the first token looks like no other
    rest = torch.randn(25, length, 7, generator=generator)
    wanted = rest + inner @ true.T
    wanted[:, 1::10] += 300.0  # nothing in their z tells it
    assert not healing.massive_first(list(wanted)).any()
    wanted[:, 0] = 200.0
    is_sink = healing.massive_first(list(wanted))
    assert is_sink.all()

    parts = [(range(25), inner.flatten(0, 1), rest.flatten(0, 1))]
    fitted, _ = healing.LayerSums(parts, list(wanted), is_sink).fit(torch.zeros(7, width))
    made = rest + inner @ fitted.float().T
    relative = (made - wanted).square().sum(dim=2) / wanted.square().sum(dim=2)
    usual = [at for at in range(1, length) if at % 10 != 1]
    assert float(relative[:, 0].mean()) < 1e-3
    assert float(relative[:, usual].mean()) < 0.05


def test_a_sum_of_products_is_that_of_a_whole_product() -> None:
    z, r = (
        torch.randn(30, wide, generator=torch.Generator().manual_seed(wide)) for wide in (2 * healing.COLUMNS + 5, 3)
    )
    sums = healing.Sums(3, z.shape[1])
    for part in (slice(0, 12), slice(12, 30)):
        sums.add(z[part], r[part])
    torch.testing.assert_close(sums.gram, (z.double().T @ z.double()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.cross, (r.double().T @ z.double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_a_layer_that_lacks_a_half_is_healed_by_the_other(model: Checkpoint, half: Half) -> None:
    lacking: dict[int, Half] = {2: half}
    after = {number: number for number in range(5)}
    made = dict(healing.heal(model, after, TEXTS, in_nf4=False, lacking=lacking, healed={}))
    wanted, pruned = stream(model, range(5), UNSEEN), model.without(lacking)
    assert error(stream(pruned.with_layers(made), range(5), UNSEEN), wanted) < 0.8 * error(
        stream(pruned, range(5), UNSEEN), wanted
    )


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "qwen3_moe", "qwen2", "phi3"])
def test_layers_that_end_otherwise_stay_as_they_are(family: str, tmp_path: Path) -> None:
    source = Checkpoint.open(str(make_tiny(tmp_path / "model", family)))
    made = dict(healing.heal(source, {0: 0, 1: 2}, TEXTS[:12], in_nf4=False, lacking={}, healed={}))
    for number in (0, 1):
        module = healing.refitted(source, number)
        assert module in (None, healing.DOWN)
        assert module is None or family not in ("gemma3_text", "olmo2")
        for name, tensor in source.layer(number).items():
            assert torch.equal(made[number][name], tensor) or name == f"{module}.weight"
