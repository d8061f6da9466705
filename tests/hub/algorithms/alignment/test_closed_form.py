"""The closed form is the optimum that search finds, and it brings the sub-LLM nearer to the full LLM without a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_hub.algorithms.alignment import closed_form
from tests.edge.model.test_bundle import random_lora, write
from tests.hub.runs import make_run, prepare, public_kl
from tests.tiny import make_tiny

RANK, SCALE = 3, 2.0


def toy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(activations (N, F), residual (N, C), W_down (C, F))."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    down = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    truth = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    noise = torch.randn(80, 7, generator=generator, dtype=torch.float64)
    return inner, inner @ down.T @ truth.T + noise, down


@pytest.mark.parametrize("seed", range(3))
def test_no_other_map_of_the_rank_is_nearer(seed: int) -> None:
    inner, residual, down = toy(seed)
    made = inner @ down.T
    gram, cross = made.T @ made, made.T @ residual
    damping = 1e-2
    a, b = closed_form.solve(gram, cross, down, SCALE, RANK, damping)
    assert (a.dtype, b.dtype, a.shape, b.shape) == (torch.float32, torch.float32, (RANK, 12), (7, RANK))

    weight = damping * float(gram.trace()) / 7

    def cost(map_: Tensor) -> float:
        return float((made @ map_.T - residual).square().sum() + weight * map_.square().sum())

    # scale * B A = C W_down, so C follows from the update (W_down has full row rank).
    ours = SCALE * b.double() @ a.double() @ torch.linalg.pinv(down)
    torch.testing.assert_close(ours @ down, SCALE * b.double() @ a.double(), rtol=1e-4, atol=1e-6)

    # Alternating least squares on C = U V^T, each half exact; many starts.
    ridge = gram + weight * torch.eye(7, dtype=torch.float64)
    best = float("inf")
    for start in range(5):
        u = torch.randn(7, RANK, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
        for _ in range(400):
            v = torch.linalg.solve(ridge, cross) @ u @ torch.linalg.inv(u.T @ u)
            u = cross.T @ v @ torch.linalg.inv(v.T @ ridge @ v)
        best = min(best, cost(u @ v.T))
    assert cost(ours) == pytest.approx(best, rel=1e-6)
    full = torch.linalg.solve(ridge, cross).T
    left, sizes, right = torch.linalg.svd(full @ down)  # the naive way: cut the full map by its own singular values
    naive = left[:, :RANK] * sizes[:RANK] @ right[:RANK] @ torch.linalg.pinv(down)
    assert cost(ours) < 0.99 * cost(naive)


def test_a_full_rank_map_is_the_ridge_regression() -> None:
    inner, residual, down = toy(5)
    made = inner @ down.T
    a, b = closed_form.solve(made.T @ made, made.T @ residual, down, SCALE, 7, damping=0.0)
    fitted = inner @ (SCALE * b.double() @ a.double()).T
    expected = made @ torch.linalg.lstsq(made, residual).solution
    torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-5)


BLOCKS = list(torch.randint(3, 260, (40, 16), generator=torch.Generator().manual_seed(8)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("closed") / "bundle", tiny_llama)


@pytest.fixture(scope="module")
def retained(bundle: Bundle, tiny_llama: Path) -> dict[int, Tensor]:
    """By group start, what the full LLM has after the group."""
    made: dict[int, Tensor] = {}
    starts = {group.removed[-1]: group.start for group in bundle.plan.groups}

    def keep(number: int, hidden: list[Tensor]) -> None:
        if number in starts:
            made[starts[number]] = torch.stack(hidden)

    stream(Checkpoint.open(str(tiny_llama)), bundle.plan.emulator, BLOCKS, visit=keep)
    return made


def aligned(bundle: Bundle, retained: dict[int, Tensor], emulator: dict[str, Tensor]) -> dict[str, Tensor]:
    below = [layer for layer in bundle.plan.kept if layer < bundle.plan.retained[0]]
    start = stream(bundle, below, BLOCKS)
    return closed_form.align(bundle, bundle.plan, BLOCKS, start, retained, emulator, bundle.manifest.lora.scale)


def outputs(bundle: Bundle, layer: int, emulator: dict[str, Tensor]) -> Tensor:
    """(tokens, C) of the sub-LLM after a kept layer, first positions left out."""
    layers = [number for number in bundle.plan.kept if number <= layer]
    states = stream(bundle, layers, BLOCKS, lora=emulator, lora_scale=bundle.manifest.lora.scale)
    return torch.stack(states)[:, 1:].flatten(0, 1)


def test_each_group_is_solved_on_states_that_those_below_have_corrected(
    bundle: Bundle, retained: dict[int, Tensor]
) -> None:
    """No small change of a group's own factors brings its output nearer to the full LLM's."""
    emulator, scale = bundle.emulator_lora(), bundle.manifest.lora.scale
    made = aligned(bundle, retained, emulator)
    changed = {name for name in made if not torch.equal(made[name], emulator[name])}
    assert changed == {f"layers.{t}.mlp.down_proj.lora_{side}" for t in bundle.plan.retained for side in "AB"}
    for layer in bundle.plan.retained:
        target = retained[layer][:, 1:].flatten(0, 1)
        a, b = (f"layers.{layer}.mlp.down_proj.lora_{side}" for side in "AB")
        without = {name: tensor for name, tensor in made.items() if name not in (a, b)}
        before, after = outputs(bundle, layer, without), outputs(bundle, layer, made)
        distance = (target - after).square().sum()
        assert distance < 0.95 * (target - before).square().sum()
        # At the optimum what is left has no part in the directions B that the map could still add to.
        inner = (after - before).double() @ torch.linalg.pinv(scale * made[b].double()).T  # M C^T V
        slope = inner.T @ ((target - after).double() @ made[b].double())
        size = inner.norm() * (target - after).double().norm() * made[b].double().norm()
        assert slope.norm() < 1e-3 * size


def test_factors_that_are_trained_already_are_solved_for_again(bundle: Bundle, retained: dict[int, Tensor]) -> None:
    fresh = bundle.emulator_lora()
    old = random_lora(bundle.manifest.lora, 3)
    started = {name: old[name] if "down_proj" in name else tensor for name, tensor in fresh.items()}
    once, again = aligned(bundle, retained, fresh), aligned(bundle, retained, started)
    assert all(torch.equal(once[name], again[name]) for name in fresh)
    attention = {name: old[name] if "q_proj" in name else tensor for name, tensor in fresh.items()}
    other = aligned(bundle, retained, attention)
    name = f"layers.{bundle.plan.retained[0]}.mlp.down_proj.lora_A"
    assert not torch.equal(other[name], once[name])  # solved with what the other factors do


def test_the_border_comes_nearer_without_a_step(bundle: Bundle, retained: dict[int, Tensor], tiny_llama: Path) -> None:
    plan, emulator = bundle.plan, bundle.emulator_lora()
    source = Checkpoint.open(str(tiny_llama))
    border = torch.stack(stream(source, plan.emulator, BLOCKS))

    def distance(tensors: dict[str, Tensor]) -> Tensor:
        return (outputs(bundle, plan.sub_emulator[-1], tensors) - border[:, 1:].flatten(0, 1)).norm()

    assert distance(aligned(bundle, retained, emulator)) < 0.95 * distance(emulator)


def test_what_closed_form_cannot_solve_is_said(tmp_path: Path, bundle: Bundle, retained: dict[int, Tensor]) -> None:
    attention = {name: tensor for name, tensor in bundle.emulator_lora().items() if "q_proj" in name}
    with pytest.raises(
        UsageProblem, match=r"needs LoRA on down_proj, and layer \d.*add 'down_proj' to \[lora\] targets"
    ):
        aligned(bundle, retained, attention)
    other = write(tmp_path / "bundle", make_tiny(tmp_path / "gemma", "gemma3_text"))
    with pytest.raises(UsageProblem, match=r"layer 0 of this gemma3_text model has none"):
        aligned(other, retained, lora.initial(other.manifest.lora.emulator, 0))


def test_a_preparation_begins_with_it_or_ends_with_it(tmp_path: Path, tiny_llama: Path) -> None:
    alone = public_kl(make_run(tmp_path / "alone", tiny_llama, align={"closed_form": True, "steps": 0}))
    assert alone["aligned"] == alone["closed_form"] < alone["quantized"]
    before = public_kl(make_run(tmp_path / "before", tiny_llama, align={"closed_form": True}))
    assert before["closed_form"] == alone["closed_form"]
    assert before["aligned"] != before["closed_form"]
    plain = public_kl(make_run(tmp_path / "alone", tiny_llama, align={"steps": 0}))  # another run's place
    assert plain == {"pruned": alone["pruned"], "quantized": alone["quantized"], "aligned": alone["quantized"]}


def test_a_run_that_could_not_be_solved_for_is_refused_before_any_work(tmp_path: Path, tiny_llama: Path) -> None:
    asked = {"closed_form": True}
    with pytest.raises(
        UsageProblem, match=r"add 'down_proj' to \[lora\] targets, or write \[align\] closed_form = false"
    ):
        prepare(make_run(tmp_path / "llama", tiny_llama, align=asked, lora={"targets": ["q_proj"]}))
    gemma = make_tiny(tmp_path / "gemma", "gemma3_text")
    settings = make_run(tmp_path / "run", gemma, align=asked)
    with pytest.raises(UsageProblem, match=r"ends in one down_proj, .*; write \[align\] closed_form = false"):
        prepare(settings)
    assert not (settings.run_dir / "prepare").exists()
    with pytest.raises(UsageProblem, match=r'closed_form = True beside \[method\] name = "fedot"'):
        make_run(
            tmp_path / "ot",
            tiny_llama,
            method={
                "name": "fedot",
                "layers_per_group": None,
                "groups": None,
                "realign_every": None,
                "adapter_layers": 2,
            },
            align={**asked, "realign_steps": None},
        )
