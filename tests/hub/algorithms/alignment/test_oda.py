"""Alignment's loss and gradients are those of plain Transformers and PEFT on both whole models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.alignment import oda
from tests.edge.model.test_bundle import pruned_by_hand, random_lora, write

PUBLIC = torch.randint(3, 260, (72, 16), generator=torch.Generator().manual_seed(8))
IDS = PUBLIC[:10]
SETTINGS = oda.AlignSettings(steps=30, batch_size=16, learning_rate=3e-3, representation_weight=0.7, kl_weight=1.3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("oda") / "bundle", tiny_llama)


@pytest.fixture(scope="module")
def trained(bundle: Bundle) -> dict[str, Tensor]:
    """Adapter and emulator LoRA as they might be in the middle of a run: B is not zero."""
    return random_lora(bundle.manifest.lora, 3)


def with_peft(model: Any, layers: dict[int, int], tensors: dict[str, Tensor], rank: int, alpha: float) -> Any:
    """Put the LoRA of full-LLM layers on a Transformers model in which layer l has the position layers[l]."""
    weights = {}
    for name, tensor in tensors.items():
        _, number, rest = name.split(".", 2)
        if int(number) in layers:
            module, _, leaf = rest.rpartition(".")
            weights[f"model.layers.{layers[int(number)]}.{module}", leaf] = tensor
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted({module for module, _ in weights}))
    made = get_peft_model(model, config)
    for (module, leaf), tensor in weights.items():
        getattr(made.base_model.model.get_submodule(module), leaf)["default"].weight.data = tensor.clone()
    return made


@pytest.fixture(scope="module")
def full(tiny_llama: Path, bundle: Bundle, trained: dict[str, Tensor]) -> Any:
    """The full LLM with the current adapter LoRA, whole, in plain Transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    spec = bundle.manifest.lora
    return with_peft(model, {n: n for n in bundle.plan.adapter}, trained, spec.rank, spec.alpha).eval()


def teacher_of(full: Any, plan: LayerPlan, ids: Tensor) -> oda.Teacher:
    with torch.no_grad():
        base = full.base_model.model.model(ids, output_hidden_states=True)
    states = base.hidden_states  # states[l + 1] is the output of layer l (docs/methods.md (m1-numbers))
    return oda.Teacher(
        {group.start: states[group.removed[-1] + 1] for group in plan.groups},
        states[plan.emulator[-1] + 1],
        base.last_hidden_state,
    )


def student_of(bundle: Bundle, tensors: dict[str, Tensor], ids: Tensor = IDS) -> tuple[SubLLM, Tensor]:
    first = min(bundle.plan.retained)
    below = [layer for layer in bundle.plan.kept if layer < first]
    student = build(bundle, [layer for layer in bundle.plan.kept if layer >= first])
    lora.attach(student, bundle.manifest.lora, tensors)
    return student, torch.stack(stream(bundle, below, list(ids)))


def test_loss_and_gradients_are_those_of_two_whole_models_by_hand(
    bundle: Bundle, tiny_llama: Path, full: Any, trained: dict[str, Tensor]
) -> None:
    plan, spec = bundle.plan, bundle.manifest.lora
    student, start = student_of(bundle, trained)
    for parameter in lora.parameters(student).values():
        parameter.requires_grad_(True)
    loss, kl = oda.objective(student, plan, start, teacher_of(full, plan, IDS), SETTINGS)
    loss.backward()

    pruned = pruned_by_hand(tiny_llama, plan, quantized=True)
    positions = {number: position for position, number in enumerate(plan.kept)}
    whole = with_peft(pruned, positions, trained, spec.rank, spec.alpha)
    ours = whole(IDS, output_hidden_states=True)
    with torch.no_grad():
        theirs = full(IDS, output_hidden_states=True)

    def distance(teacher: Tensor, made: Tensor) -> Tensor:
        teacher, made = teacher[:, 1:], made[:, 1:]
        return (((teacher - made) / teacher.pow(2).mean().sqrt()) ** 2).mean()

    inter = [
        distance(theirs.hidden_states[group.removed[-1] + 1], ours.hidden_states[s + 1])
        for group, (_, s) in zip(plan.groups, plan.mapping, strict=True)
    ]
    final = distance(theirs.hidden_states[plan.adapter[0]], ours.hidden_states[len(plan.sub_emulator)])
    student_logs, teacher_logs = (out.logits.flatten(0, 1).log_softmax(-1) for out in (ours, theirs))
    expected_kl = kl_div(student_logs, teacher_logs, reduction="batchmean", log_target=True)
    expected = 0.7 * (sum(inter) / len(inter) + final) + 1.3 * expected_kl
    expected.backward()
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for name, parameter in lora.parameters(student).items():
        _, number, rest = name.split(".", 2)
        module, _, leaf = rest.rpartition(".")
        path = f"model.layers.{positions[int(number)]}.{module}"
        reference = getattr(whole.base_model.model.get_submodule(path), leaf)["default"].weight.grad
        assert parameter.grad is not None
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm() + 1e-9, name


def test_alignment_trains_the_emulator_lora_alone_and_brings_unseen_text_nearer(
    bundle: Bundle, full: Any, trained: dict[str, Tensor]
) -> None:
    plan = bundle.plan
    started = {**bundle.emulator_lora(), **{n: t for n, t in trained.items() if int(n.split(".")[1]) in plan.adapter}}

    def aligned() -> tuple[dict[str, Tensor], float, float]:
        student, states = student_of(bundle, started, PUBLIC)
        seen, unseen = teacher_of(full, plan, PUBLIC[:64]), teacher_of(full, plan, PUBLIC[64:])
        before = oda.public_kl(student, states[64:], unseen.final)
        oda.align(student, plan, states[:64], seen, SETTINGS, seed=4)
        assert not any(parameter.requires_grad for parameter in student.model.parameters())
        return lora.snapshot(student), before, oda.public_kl(student, states[64:], unseen.final)

    after, kl_before, kl_after = aligned()
    assert kl_after < kl_before
    changed = {int(name.split(".")[1]) for name, tensor in after.items() if not torch.equal(tensor, started[name])}
    assert changed == set(plan.retained)
    again, _, _ = aligned()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_public_kl_is_the_mean_over_all_positions_of_both_models_logits(
    bundle: Bundle, tiny_llama: Path, full: Any, trained: dict[str, Tensor]
) -> None:
    student, start = student_of(bundle, trained)
    measured = oda.public_kl(student, start, teacher_of(full, bundle.plan, IDS).final, batch_size=3)
    with torch.no_grad():
        ours = (student.hidden(states=start) @ student.head.T).double().log_softmax(-1)
        theirs = full(IDS).logits.double().log_softmax(-1)
    assert measured == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-5)


def test_no_steps_change_nothing(bundle: Bundle, full: Any, trained: dict[str, Tensor]) -> None:
    student, start = student_of(bundle, trained)
    still = oda.AlignSettings(steps=0, batch_size=4, learning_rate=1.0, representation_weight=1.0, kl_weight=1.0)
    oda.align(student, bundle.plan, start, teacher_of(full, bundle.plan, IDS), still, seed=0)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in lora.snapshot(student).items())


def test_distance_is_relative_and_ignores_the_massive_first_position() -> None:
    teacher, student = torch.full((2, 5, 8), 2.0), torch.full((2, 5, 8), 1.0)
    assert oda.representation_loss(teacher, student).item() == 0.25
    teacher[:, 0] = 1e4
    assert oda.representation_loss(teacher, student).item() == 0.25
    assert oda.representation_loss(1000 * teacher, 1000 * student).item() == 0.25


def test_the_rate_warms_up_then_falls() -> None:
    rates = [oda.rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(earlier >= later for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(oda.FINAL_RATE, abs=0.01)
    assert oda.rate(0, 1) == 1.0
