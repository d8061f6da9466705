"""One local round equals plain autograd on the whole sub-LLM; FedProx pulls back; order depends on what it should."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.errors import DeviceTooSmall
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.worker.batches import Batch, SweptSamples
from fedsoda_edge.worker.checkpoint import RoundCheckpoint
from fedsoda_edge.worker.training import (
    StepDone,
    TrainedDelta,
    accumulate,
    completion_loss,
    data_order,
    fine_tune,
    is_out_of_memory,
    num_steps,
    probe,
)
from tests.edge.model.test_bundle import pruned_by_hand, random_lora, write

SETTINGS = LocalSettings(
    epochs=1,
    max_steps=3,
    batch_size=4,
    learning_rate=1e-2,
    weight_decay=0.01,
    max_grad_norm=1.0,
    proximal_mu=0.0,
    max_length=64,
)


def make_samples(count: int = 10) -> list[Sample]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(count):
        ids = torch.randint(3, 260, (6 + 3 * (i % 4),), generator=generator).tolist()
        made.append(Sample((1, *ids, 2), len(ids) - 1 - i % 3))
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("b") / "bundle", tiny_llama)


def swept(bundle: Bundle, samples: list[Sample], emulator: dict[str, torch.Tensor]) -> SweptSamples:
    return SweptSamples.sweep(
        bundle, bundle.plan.sub_emulator, samples, emulator=emulator, lora_scale=bundle.manifest.lora.scale
    )


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "nf4"])
def test_loss_and_gradients_are_those_of_the_whole_sub_llm_by_hand(
    bundle: Bundle, tiny_llama: Path, dense: bool
) -> None:
    spec, plan = bundle.manifest.lora, bundle.plan
    tensors = random_lora(spec, 7)
    samples = make_samples(5)
    adapter = {t.name: tensors[t.name] for t in spec.adapter}
    emulator = {t.name: tensors[t.name] for t in spec.emulator}
    tail = build(bundle, plan.adapter, dense=dense)
    lora.attach(tail, spec, adapter)
    for parameter in lora.parameters(tail).values():
        parameter.requires_grad_(True)
    loss = completion_loss(tail, swept(bundle, samples, emulator).batch(range(5)))
    loss.backward()

    model = pruned_by_hand(tiny_llama, plan, quantized=True).requires_grad_(False)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    for name in [n for n in weights if n.endswith("lora_A")]:
        _, number, rest = name.split(".", 2)
        linear = model.model.layers[plan.kept.index(int(number))].get_submodule(rest.removesuffix(".lora_A"))
        a, b = weights[name], weights[name[:-1] + "B"]
        linear.register_forward_hook(lambda _, x, y, a=a, b=b: y + spec.scale * x[0] @ a.T @ b.T)
    longest = max(len(s.ids) for s in samples)
    ids = torch.tensor([[*s.ids, *[0] * (longest - len(s.ids))] for s in samples])
    labels = torch.full_like(ids, -100)
    for row, s in enumerate(samples):
        labels[row, s.start : len(s.ids)] = ids[row, s.start : len(s.ids)]
    mask = torch.tensor([[1] * len(s.ids) + [0] * (longest - len(s.ids)) for s in samples])
    expected = model(ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in lora.parameters(tail).items():
        reference = weights[name].grad
        assert parameter.grad is not None
        assert reference is not None
        assert (parameter.grad - reference).norm() <= 1e-5 * reference.norm() + 1e-9


def run(bundle: Bundle, **change: float | int | str) -> dict[str, torch.Tensor]:
    settings = msgspec.structs.replace(SETTINGS, **{k: v for k, v in change.items() if k in SETTINGS.__struct_fields__})
    tail = build(bundle, bundle.plan.adapter)
    view = bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    samples = swept(bundle, make_samples(), bundle.emulator_lora())
    return fine_tune(
        tail,
        samples,
        view,
        settings,
        seed=0,
        round_number=int(change.get("round", 1)),
        edge=str(change.get("edge", "a")),
    ).delta


def norm(delta: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in delta.values()))


def test_a_round_is_reproducible_and_depends_on_round_and_edge(bundle: Bundle) -> None:
    once, again = run(bundle), run(bundle)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(not torch.equal(once[n], run(bundle, edge="b")[n]) for n in once)
    assert any(not torch.equal(once[n], run(bundle, round=2)[n]) for n in once)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_frozen_factor_keeps_its_bits_and_the_other_one_learns_as_before(
    bundle: Bundle, factor: Literal["A", "B"]
) -> None:
    tail, view = build(bundle, bundle.plan.adapter), random_lora(bundle.manifest.lora, 1)
    view = {name: view[name] for name in bundle.adapter_lora()}
    lora.attach(tail, bundle.manifest.lora, view)
    samples = swept(bundle, make_samples(), bundle.emulator_lora())
    # In the first step nothing of the one depends on the other's: AdamW goes number by number, and nothing is clipped.
    settings = msgspec.structs.replace(SETTINGS, max_steps=1, max_grad_norm=1e9, proximal_mu=0.5)
    both = fine_tune(tail, samples, view, settings, seed=0, round_number=1, edge="a").delta
    one = fine_tune(tail, samples, view, settings, seed=0, round_number=1, edge="a", trains=factor).delta
    assert set(one) == {name for name in view if name.endswith(f"lora_{factor}")}
    for name, value in lora.snapshot(tail).items():
        assert torch.equal(value, view[name]) == (name not in one)
        assert name not in one or torch.equal(one[name], both[name])
    assert not any(parameter.requires_grad for parameter in tail.model.parameters())


def test_the_proximal_term_pulls_towards_the_view(bundle: Bundle) -> None:
    """With eq. 10's sign as printed a large mu would push away: docs/methods.md (m8-fedprox)."""
    free, held = norm(run(bundle, max_steps=20, epochs=9)), norm(run(bundle, max_steps=20, epochs=9, proximal_mu=100.0))
    assert 0 < held < 0.7 * free


def test_training_lowers_the_loss_and_counts_its_samples(bundle: Bundle) -> None:
    tail = build(bundle, bundle.plan.adapter)
    view = bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    samples = swept(bundle, make_samples(), bundle.emulator_lora())
    settings = msgspec.structs.replace(SETTINGS, max_steps=0, epochs=20)
    seen: list[float] = []
    result = fine_tune(
        tail,
        samples,
        view,
        settings,
        seed=0,
        round_number=1,
        edge="a",
        progress=lambda s, n, loss, r: seen.append(loss),
    )
    assert result.num_steps == num_steps(10, settings) == 50
    assert result.num_examples == 10
    assert sum(seen[-5:]) / 5 < 0.9 * seen[0]
    assert not any(parameter.requires_grad for parameter in tail.model.parameters())


class Noting(SweptSamples):
    """Notes which samples are asked for."""

    def __init__(self, samples: SweptSamples) -> None:
        super().__init__(samples.samples, samples.states)
        self.asked: list[int] = []

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
        self.asked.extend(indices)
        return super().batch(indices, device)


def test_one_epoch_sees_every_sample_once(bundle: Bundle) -> None:
    tail = build(bundle, bundle.plan.adapter)
    view = bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    samples = Noting(swept(bundle, make_samples(), bundle.emulator_lora()))
    settings = msgspec.structs.replace(SETTINGS, max_steps=0)
    result = fine_tune(tail, samples, view, settings, seed=0, round_number=1, edge="a")
    assert sorted(samples.asked) == list(range(10))
    assert (result.num_examples, result.num_steps) == (10, 3)


def test_a_broken_round_says_nan(bundle: Bundle) -> None:
    tail = build(bundle, bundle.plan.adapter)
    view = {name: tensor * float("nan") for name, tensor in bundle.adapter_lora().items()}
    lora.attach(tail, bundle.manifest.lora, view)
    samples = swept(bundle, make_samples(), bundle.emulator_lora())
    result = fine_tune(tail, samples, view, SETTINGS, seed=0, round_number=1, edge="a")
    assert math.isnan(result.loss)
    assert result.num_steps == 1


def test_each_epoch_is_a_permutation() -> None:
    order = list(data_order(7, 2, seed=1, round_number=3, edge="x"))
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]


# -- micro-batches --------------------------------------------------------------------------------------


NUM_LABELS = (1, 9, 2, 9, 1, 7, 3, 2)  # of eight samples: halves and pairs do not weigh the same


@pytest.fixture(scope="module")
def uneven(bundle: Bundle) -> SweptSamples:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randint(3, 260, (10 + 2 * i,), generator=generator).tolist() for i in range(len(NUM_LABELS))]
    made = [Sample((1, *ids, 2), len(ids) + 2 - count) for ids, count in zip(rows, NUM_LABELS, strict=True)]
    samples = swept(bundle, made, bundle.emulator_lora())
    assert tuple(samples.num_labels(index) for index in range(len(made))) == NUM_LABELS
    return samples


def with_random_lora(bundle: Bundle) -> SubLLM:
    """B is 0 at first, and A's gradient with it: here both learn."""
    tail, tensors = build(bundle, bundle.plan.adapter), random_lora(bundle.manifest.lora, 7)
    lora.attach(tail, bundle.manifest.lora, {spec.name: tensors[spec.name] for spec in bundle.manifest.lora.adapter})
    return tail


def trained(
    bundle: Bundle,
    samples: SweptSamples,
    micro_batch: int | None,
    progress: StepDone | None = None,
    checkpoint: RoundCheckpoint | None = None,
) -> TrainedDelta:
    """Six steps of four samples from a random view."""
    tail = with_random_lora(bundle)
    settings = msgspec.structs.replace(SETTINGS, epochs=3, max_steps=6, proximal_mu=0.1)
    return fine_tune(
        tail,
        samples,
        lora.snapshot(tail),
        settings,
        seed=0,
        round_number=1,
        edge="a",
        micro_batch=micro_batch,
        progress=progress,
        checkpoint=checkpoint,
    )


def bits(delta: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in delta.items()}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8, 99])
def test_micro_batches_of_any_size_sum_to_the_gradient_of_the_whole_step(
    bundle: Bundle, uneven: SweptSamples, micro_batch: int
) -> None:
    """The loss is the mean over all labels of the step, not over those of a micro-batch: its oracle is one product."""
    tail = with_random_lora(bundle)
    named = lora.parameters(tail)
    for parameter in named.values():
        parameter.requires_grad_(True)
    whole = completion_loss(tail, uneven.batch(range(8)))
    expected = torch.autograd.grad(whole, list(named.values()))
    loss, tokens, allowed = accumulate(tail, uneven, range(8), micro_batch, list(named.values()))
    assert (tokens, allowed) == (sum(len(sample.ids) for sample in uneven.samples), micro_batch)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    for parameter, gradient in zip(named.values(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()
    halves = [float(completion_loss(tail, uneven.batch(range(at, at + 4))).detach()) for at in (0, 4)]
    assert abs(sum(halves) / 2 - float(whole.detach())) > 1e-3  # what a mean of means would say


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_round_in_micro_batches_ends_where_one_without_them_does(
    bundle: Bundle, uneven: SweptSamples, micro_batch: int
) -> None:
    whole, parts = trained(bundle, uneven, None), trained(bundle, uneven, micro_batch)
    assert (whole.micro_batch, parts.micro_batch) == (4, micro_batch)
    assert (parts.num_tokens, parts.num_steps, parts.num_examples) == (whole.num_tokens, 6, 8)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    difference = norm({name: parts.delta[name] - whole.delta[name] for name in whole.delta})
    assert difference <= 1e-4 * norm(whole.delta)  # gradients are within 1e-5; AdamW divides the smallest by themselves


def cpu_out_of_memory() -> RuntimeError:
    """What torch raises when the CPU has no more: 2^50 bytes are more than there are addresses."""
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**50, dtype=torch.uint8)
    return failure.value


OUT_OF_MEMORY = pytest.mark.parametrize(
    "error", [cpu_out_of_memory(), torch.OutOfMemoryError("CUDA out of memory.")], ids=["cpu", "cuda"]
)


class Scarce(SweptSamples):
    """From one step on memory is out for more than `most` samples at once; first in a step's second micro-batch."""

    def __init__(self, samples: SweptSamples, error: RuntimeError, most: int, from_step: int = 0) -> None:
        super().__init__(samples.samples, samples.states)
        self._error, self._most, self._from_step = error, most, from_step
        self.steps = self.refused = self._in_step = 0
        self.expected: list[list[int]] = []

    def expect(self, order: Sequence[int]) -> None:
        self.expected.append(list(order))

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
        self._in_step += 1
        is_first_refusal_early = self.refused == 0 and self._in_step == 1 and self.steps > 0
        if self.steps >= self._from_step and len(indices) > self._most and not is_first_refusal_early:
            self.refused += 1
            raise self._error
        return super().batch(indices, device)

    def progress(self, step: int, *_: float) -> None:
        self.steps, self._in_step = step, 0


class Killed(BaseException):
    pass


@OUT_OF_MEMORY
def test_where_memory_runs_out_the_step_is_done_again_in_halves_and_the_round_continues_with_them(
    bundle: Bundle, uneven: SweptSamples, tmp_path: Path, error: RuntimeError
) -> None:
    """Three steps of two samples at once; the fourth fails in its middle and is done, as all after it, one by one."""

    def killed(step: int, *_: float) -> None:
        if step == 3:
            raise Killed

    # The oracle never runs out of memory: it is saved after three steps, and continued with one sample at once.
    saves = RoundCheckpoint(tmp_path, {})
    with pytest.raises(Killed):
        trained(bundle, uneven, 2, killed, saves)
    saves.wait()
    expected = trained(bundle, uneven, 1, None, RoundCheckpoint(tmp_path, {}))
    scarce = Scarce(uneven, error, most=1, from_step=3)
    found = trained(bundle, scarce, 2, scarce.progress)
    assert scarce.refused == 1
    assert found.micro_batch == expected.micro_batch == 1
    assert bits(found.delta) == bits(expected.delta)
    assert (found.loss, found.num_tokens, found.num_steps) == (expected.loss, expected.num_tokens, 6)


def test_states_on_disk_know_what_comes_after_a_step_that_was_done_again(bundle: Bundle, uneven: SweptSamples) -> None:
    """They skip what is not asked for in turn: were they not told again, they would skip to the next epoch."""
    scarce = Scarce(uneven, torch.OutOfMemoryError("CUDA out of memory."), most=1, from_step=3)
    trained(bundle, scarce, 2, scarce.progress)
    order = list(data_order(8, 3, 0, 1, "a"))
    assert scarce.expected == [order, order[4 * 4 :]]


@OUT_OF_MEMORY
def test_memory_for_less_than_one_sample_is_a_device_too_small(
    bundle: Bundle, uneven: SweptSamples, error: RuntimeError
) -> None:
    scarce = Scarce(uneven, error, most=0)
    with pytest.raises(DeviceTooSmall) as failure:
        trained(bundle, scarce, None)
    assert scarce.refused == 3  # 4, 2 and 1 at once
    assert failure.value.exit_status == 4
    assert str(failure.value).startswith("memory ran out on cpu with a single sample of up to ")


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(bundle: Bundle, uneven: SweptSamples) -> None:
    scarce = Scarce(uneven, RuntimeError("The size of tensor a (4) must match"), most=0)
    with pytest.raises(RuntimeError, match="must match"):
        trained(bundle, scarce, None)
    assert scarce.refused == 1
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_memory_that_torch_does_not_manage_may_run_out_too() -> None:
    """Where CUDA's context or cuBLAS' workspace finds no room (c10/cuda/CUDAException.h, ATen/cuda/Exceptions.cpp)."""
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


# -- the probe ------------------------------------------------------------------------------------------


def test_a_probe_leaves_no_trace(bundle: Bundle, uneven: SweptSamples) -> None:
    tail = with_random_lora(bundle)
    before = lora.snapshot(tail)
    assert probe(tail, uneven, bundle.adapter_lora(), range(8), 4) == 4
    assert bits(lora.snapshot(tail)) == bits(before)
    assert all(each.grad is None and not each.requires_grad for each in tail.model.parameters())
    settings = msgspec.structs.replace(SETTINGS, epochs=3, max_steps=6, proximal_mu=0.1)
    after = fine_tune(tail, uneven, before, settings, seed=0, round_number=1, edge="a")
    assert bits(after.delta) == bits(trained(bundle, uneven, None).delta)


@OUT_OF_MEMORY
def test_a_probe_finds_the_micro_batch_that_memory_allows(
    bundle: Bundle, uneven: SweptSamples, error: RuntimeError
) -> None:
    tail = with_random_lora(bundle)
    assert probe(tail, Scarce(uneven, error, most=2), bundle.adapter_lora(), range(8), 8) == 2
    assert all(each.grad is None and not each.requires_grad for each in tail.model.parameters())
