"""One local round equals plain autograd on the whole sub-LLM; FedProx pulls back; order depends on what it should."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from fedsoda_edge.border import Batch, Border, pack
from fedsoda_edge.data import Sample
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.training import completion_loss, data_order, fine_tune, num_steps
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


def swept(bundle: Bundle, samples: list[Sample], emulator: dict[str, torch.Tensor]) -> Border:
    return Border.sweep(bundle, bundle.plan.sub_emulator, samples, lora=emulator, lora_scale=bundle.manifest.lora.scale)


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


@pytest.mark.parametrize("lengths", [(7,), (9, 4, 5, 3, 9, 2), (1,) * 8 + (3,), tuple(range(1, 40))])
def test_packing_keeps_every_sample_once_in_rows_no_longer_than_the_longest(lengths: tuple[int, ...]) -> None:
    rows = pack(lengths)
    assert sorted(at for row in rows for at in row) == list(range(len(lengths)))
    filled = [sum(lengths[at] for at in row) for row in rows]
    assert max(filled) == max(lengths)
    # First fit leaves no two rows that would fit in one.
    assert all(a + b > max(lengths) for i, a in enumerate(filled) for b in filled[:i])


def run(bundle: Bundle, **change: float | int | str) -> dict[str, torch.Tensor]:
    settings = msgspec.structs.replace(SETTINGS, **{k: v for k, v in change.items() if k in SETTINGS.__struct_fields__})
    tail = build(bundle, bundle.plan.adapter)
    view = bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    border = swept(bundle, make_samples(), bundle.emulator_lora())
    return fine_tune(
        tail,
        border,
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


def test_the_proximal_term_pulls_towards_the_view(bundle: Bundle) -> None:
    """With eq. 10's sign as printed a large mu would push away (method.md 1.7)."""
    free, held = norm(run(bundle, max_steps=20, epochs=9)), norm(run(bundle, max_steps=20, epochs=9, proximal_mu=100.0))
    assert 0 < held < 0.7 * free


def test_training_lowers_the_loss_and_counts_its_samples(bundle: Bundle) -> None:
    tail = build(bundle, bundle.plan.adapter)
    view = bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    border = swept(bundle, make_samples(), bundle.emulator_lora())
    settings = msgspec.structs.replace(SETTINGS, max_steps=0, epochs=20)
    seen: list[float] = []
    result = fine_tune(
        tail, border, view, settings, seed=0, round_number=1, edge="a", progress=lambda s, n, loss, r: seen.append(loss)
    )
    assert result.num_steps == num_steps(10, settings) == 50
    assert result.num_examples == 10
    assert sum(seen[-5:]) / 5 < 0.9 * seen[0]
    assert not any(parameter.requires_grad for parameter in tail.model.parameters())


def test_one_epoch_sees_every_sample_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = build(bundle, bundle.plan.adapter)
    view = bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    border = swept(bundle, make_samples(), bundle.emulator_lora())
    seen: list[int] = []
    plain = Border.batch

    def noting(self: Border, indices: list[int], device: str) -> Batch:
        seen.extend(indices)
        return plain(self, indices, device)

    monkeypatch.setattr(Border, "batch", noting)
    settings = msgspec.structs.replace(SETTINGS, max_steps=0)
    result = fine_tune(tail, border, view, settings, seed=0, round_number=1, edge="a")
    assert sorted(seen) == list(range(10))
    assert (result.num_examples, result.num_steps) == (10, 3)


def test_a_broken_round_says_nan(bundle: Bundle) -> None:
    tail = build(bundle, bundle.plan.adapter)
    view = {name: tensor * float("nan") for name, tensor in bundle.adapter_lora().items()}
    lora.attach(tail, bundle.manifest.lora, view)
    border = swept(bundle, make_samples(), bundle.emulator_lora())
    result = fine_tune(tail, border, view, SETTINGS, seed=0, round_number=1, edge="a")
    assert math.isnan(result.loss)
    assert result.num_steps == 1


def test_each_epoch_is_a_permutation() -> None:
    order = list(data_order(7, 2, seed=1, round_number=3, edge="x"))
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]
