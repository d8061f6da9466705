"""The last layer computes what the loss asks for, and it is what the whole layer would say, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsoda_edge.model import lora
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.manifest import LoRASpec
from tests.tiny import FAMILY_CONFIGS, make_tiny

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
ATTENTION = TARGETS[:4]  # experts carry no LoRA


def with_lora(directory: Path, dtype: torch.dtype, num_layers: int = 2, *, recompute: bool = False) -> SubLLM:
    """Build the last layers with random LoRA that asks for a gradient."""
    source = Checkpoint.open(str(directory))
    layers = tuple(range(source.num_layers))[-num_layers:]
    targets = ATTENTION if source.family.model_type == "qwen3_moe" else TARGETS
    layout = lora.specs(source.family, source.fields, layers, targets, 4)
    generator = torch.Generator().manual_seed(0)
    tensors = {spec.name: 0.1 * torch.randn(spec.shape, generator=generator) for spec in layout}
    made = build(source, layers, compute_dtype=dtype, recompute=recompute)
    lora.attach(made, LoRASpec(4, 8, targets, layout, ()), tensors)
    for parameter in lora.parameters(made).values():
        parameter.requires_grad_(True)
    return made


def gradients(model: SubLLM, hidden: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    named = lora.parameters(model)
    made = torch.autograd.grad((hidden.float() * weights).sum(), list(named.values()))
    return dict(zip(named, made, strict=True))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_the_rows_that_the_loss_asks_for_are_those_of_the_whole_layer(family: str, tmp_path: Path) -> None:
    """Packed rows: two samples in the first, one and a pad in the second."""
    directory = make_tiny(tmp_path, family)
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model = with_lora(directory, dtype)
        width = int(Checkpoint.open(str(directory)).fields["hidden_size"])
        states = torch.randn(2, 16, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        states[1, 11:] = 0.0
        positions = torch.tensor([[*range(9), *range(7)], [*range(11), *[0] * 5]])
        rows, columns = torch.tensor([0, 0, 0, 1]), torch.tensor([7, 8, 14, 9])
        whole = model.hidden(states=states, positions=positions)[rows, columns]
        some = model.hidden_at(rows, columns, states=states, positions=positions)
        assert some.shape == (4, width)
        assert relative(some, whole) < most
        expected, made = gradients(model, whole), gradients(model, some)
        for name, gradient in expected.items():
            if gradient.norm() > 0:
                assert relative(made[name], gradient) < most, name
        again = model.hidden(states=states, positions=positions)[rows, columns]
        assert torch.equal(again, whole)  # nothing stays on the layer


def test_the_last_layer_works_on_those_rows_alone(tiny_llama: Path) -> None:
    model = with_lora(tiny_llama, torch.float32)
    seen: dict[str, list[int]] = {}

    def count(name: str) -> Any:
        def note(_: Any, inputs: Any, __: Any) -> None:
            seen.setdefault(name, []).append(inputs[0].shape[:-1].numel())

        return note

    for number in model.numbers:
        layer = model.layer(number)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"):
            layer.get_submodule(name).base_layer.register_forward_hook(count(f"{number}.{name}"))
    model.hidden_at(torch.tensor([0, 1]), torch.tensor([5, 6]), states=torch.randn(2, 8, 64))
    first, last = model.numbers
    assert seen == {
        **{f"{first}.{name}": [16] for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")},
        f"{first}.mlp.up_proj": [16],
        f"{last}.self_attn.q_proj": [2],
        f"{last}.self_attn.k_proj": [16],
        f"{last}.self_attn.o_proj": [2],
        f"{last}.mlp.up_proj": [2],
    }


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_layers_that_are_made_again_give_the_same_gradients(family: str, tmp_path: Path) -> None:
    """Three layers, of which two run twice; masks of a sliding window and positions of packed rows go with them."""
    directory = make_tiny(tmp_path, family)
    states = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(9), *range(7)], [*range(11), *[0] * 5]])
    rows, columns = torch.tensor([0, 0, 0, 1]), torch.tensor([7, 8, 14, 9])
    found, calls = [], []
    for recompute in (False, True):
        model = with_lora(directory, torch.float32, 3, recompute=recompute)
        counts = [0, 0, 0]

        def count(place: int, counts: list[int] = counts) -> Any:
            def note(*_: Any) -> None:
                counts[place] += 1

            return note

        for place, number in enumerate(model.numbers):
            model.layer(number).self_attn.o_proj.register_forward_pre_hook(count(place))
        hidden = model.hidden_at(rows, columns, states=states, positions=positions)
        found.append((hidden.detach(), gradients(model, hidden)))
        calls.append(counts)
        assert not any("forward" in vars(model.layer(number)) for number in model.numbers)  # nothing stays on it
    assert calls == [[1, 1, 1], [2, 2, 1]]
    (plain, expected), (again, made) = found
    assert torch.equal(again, plain)
    for name, gradient in expected.items():
        assert (made[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
