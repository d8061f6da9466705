"""Aggregation against the dense product that it never forms: exact where the method claims it, and honest elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fedsoda_edge.model import delta
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_hub.algorithms.aggregation import flexlora, products, server_optimizer
from fedsoda_hub.algorithms.aggregation.products import CrossTerm, Pair, cross_term, pairs_by_module
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighted_mean
from fedsoda_hub.federation.schedule import trained_factor
from fedsoda_hub.settings.tables import Aggregation, Optimizer

RANK, OUT, IN = 4, 18, 33
MODULES = ("layers.6.q", "layers.7.v")
LAYOUT = tuple(
    TensorSpec(f"{module}.lora_{factor}", shape)
    for module in MODULES
    for factor, shape in (("A", (RANK, IN)), ("B", (OUT, RANK)))
)
EXAMPLES = {"a": 10, "b": 30, "c": 20}
CODECS = ("nf4", "int8", "bf16", "nf4-weight")


def tensors(seed: int, scale: float, layout: Sequence[TensorSpec] = LAYOUT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) * scale for spec in layout}


VIEW = tensors(0, 0.3)


def round_of(codec: str, layout: Sequence[TensorSpec]) -> list[CodedUpdate]:
    """Three edges' updates of the tensors in `layout`, as they travel."""
    made = []
    for seed, (edge, num_examples) in enumerate(EXAMPLES.items(), start=1):
        step = tensors(seed, 0.1, layout)
        coded, _ = delta.encode_with_feedback(step, None, VIEW, layout, codec)
        made.append(CodedUpdate(edge, num_examples, partial(bytes, coded), VIEW, layout))
    return made


def dense(updates: Sequence[CodedUpdate], layout: Sequence[TensorSpec], codec: str) -> dict[str, Tensor]:
    """M = sum_k p_k B_k A_k of each module, fp64, as a dense matrix: what no aggregation here ever forms."""
    found = {module: torch.zeros(OUT, IN, dtype=torch.float64) for module in MODULES}
    total = sum(update.num_examples for update in updates)
    for update in updates:
        w_k = delta.advance(VIEW, update.read(), layout, codec)
        for module in MODULES:
            product = w_k[f"{module}.lora_B"].double() @ w_k[f"{module}.lora_A"].double()
            found[module] += update.num_examples / total * product
    return found


def averaged(updates: Sequence[CodedUpdate], codec: str) -> dict[str, Tensor]:
    """Bbar Abar of each module after the hub's mean."""
    merged = delta.moved(VIEW, weighted_mean(updates, codec, max_weight=3.0), codec)
    return {module: merged[f"{module}.lora_B"].double() @ merged[f"{module}.lora_A"].double() for module in MODULES}


def norm(matrices: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(matrix.square().sum()) for matrix in matrices.values()))


def measured(updates: Sequence[CodedUpdate], codec: str) -> float:
    return cross_term(pairs_by_module(updates, codec, max_weight=3.0))


# --- one factor frozen ----------------------------------------------------------------------------------------------


def test_who_trains_what_is_the_papers() -> None:
    """FFA-LoRA freezes A for good; RoLoRA trains B in odd and A in even rounds."""
    assert [trained_factor("fedavg", n) for n in (1, 2)] == ["both", "both"]
    assert [trained_factor("flexlora", n) for n in (1, 2)] == ["both", "both"]
    assert [trained_factor("ffa", n) for n in (1, 2, 3)] == ["B", "B", "B"]
    assert [trained_factor("rolora", n) for n in (1, 2, 3, 4)] == ["B", "A", "B", "A"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rule", "number"), [("ffa", 1), ("ffa", 2), ("rolora", 1), ("rolora", 2)])
def test_with_one_factor_frozen_the_mean_is_the_mean_of_the_products(rule: str, number: int, codec: str) -> None:
    layout = of_factor(LAYOUT, trained_factor(rule, number))
    assert len(layout) == len(LAYOUT) // 2
    updates = round_of(codec, layout)
    exact, ours = dense(updates, layout, codec), averaged(updates, codec)
    for module in MODULES:
        torch.testing.assert_close(ours[module], exact[module], rtol=0, atol=1e-6)
    assert measured(updates, codec) == 0.0  # measured, not claimed: equal factors leave no rounding either


@pytest.mark.parametrize("codec", CODECS)
def test_the_cross_term_is_what_fedavg_loses_of_the_dense_product(codec: str) -> None:
    updates = round_of(codec, LAYOUT)
    exact, ours = dense(updates, LAYOUT, codec), averaged(updates, codec)
    lost = norm({module: exact[module] - ours[module] for module in MODULES}) / norm(exact)
    assert lost > 0.02
    assert measured(updates, codec) == pytest.approx(lost, rel=1e-4)
    assert measured(updates[::-1], codec) == measured(updates, codec)
    assert measured(updates[:1], codec) == 0.0


def test_a_boastful_edge_counts_in_the_products_as_it_counts_in_the_mean() -> None:
    updates = [replace(u, num_examples=n) for u, n in zip(round_of("bf16", LAYOUT), (10, 10, 10**9), strict=True)]
    shares = [pair.share for pair in next(iter(pairs_by_module(updates, "bf16", 3.0)))[1]]
    assert shares == [10 / 50, 10 / 50, 30 / 50]


def test_products_that_are_all_zero_lose_nothing() -> None:
    """The first round of edges that learnt nothing: B = 0."""
    nothing = [Pair(0.5, torch.zeros(OUT, RANK), torch.ones(RANK, IN)) for _ in range(2)]
    assert cross_term([("q", nothing)]) == 0.0


# --- edges with different layers ------------------------------------------------------------------------------------


def of_layers(codec: str) -> list[CodedUpdate]:
    """a and c hold one of the two modules each, b both; nobody else holds anything."""
    held = {"a": LAYOUT[:2], "b": LAYOUT, "c": LAYOUT[2:]}
    made = []
    for update in round_of(codec, LAYOUT):
        layout = held[update.edge]
        whole = delta.decode(update.read(), LAYOUT, codec)
        data = delta.encode({spec.name: whole[spec.name] for spec in layout}, codec)
        view = {spec.name: VIEW[spec.name] for spec in layout}
        made.append(replace(update, read=partial(bytes, data), view=view, layout=layout))
    return made


@pytest.mark.parametrize("codec", CODECS)
def test_each_tensor_is_the_mean_over_those_who_hold_it(codec: str) -> None:
    """The FedRA rule, arXiv 2311.11227, by hand."""
    updates = of_layers(codec)
    holders = {MODULES[0]: {"a": 10, "b": 30}, MODULES[1]: {"b": 30, "c": 20}}
    decoded = {update.edge: delta.decode(update.read(), update.layout, codec) for update in updates}
    made = weighted_mean(updates[::-1], codec, max_weight=3.0)
    assert set(made) == {spec.name for spec in LAYOUT}
    for name, mean in made.items():
        weights = holders[name.rpartition(".lora_")[0]]
        expected = sum(decoded[edge][name] * count for edge, count in weights.items()) / sum(weights.values())
        torch.testing.assert_close(mean, expected)
    assert set(weighted_mean(updates[:1], codec, 3.0)) == {spec.name for spec in LAYOUT[:2]}  # the rest keeps its value
    for module, of_holders in pairs_by_module(updates, codec, 3.0):
        total = sum(holders[module].values())
        assert [pair.share for pair in of_holders] == [count / total for count in holders[module].values()]


def test_the_median_that_caps_a_weight_is_the_whole_rounds() -> None:
    """Not that of a tensor's few holders, which a boastful edge would be half of."""
    updates = [replace(u, num_examples=n) for u, n in zip(of_layers("bf16"), (10, 10, 10**9), strict=True)]
    shares = {module: [pair.share for pair in pairs] for module, pairs in pairs_by_module(updates, "bf16", 3.0)}
    assert shares == {MODULES[0]: [0.5, 0.5], MODULES[1]: [0.25, 0.75]}


@pytest.mark.parametrize(("held_bytes", "reads"), [(1 << 30, 1), (1, 2)])
def test_an_update_is_read_once_for_all_modules_that_memory_has_room_for(
    held_bytes: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "HELD_BYTES", held_bytes)
    read: list[str] = []

    def counted(update: CodedUpdate) -> bytes:
        read.append(update.edge)
        return update.read()

    updates = round_of("nf4", LAYOUT)
    found = list(pairs_by_module([replace(u, read=partial(counted, u)) for u in updates], "nf4", 3.0))
    assert sorted(read) == sorted([update.edge for update in updates] * reads)
    assert [module for module, _ in found] == sorted(MODULES)
    exact = dense(updates, LAYOUT, "nf4")
    for module, of_edges in found:
        torch.testing.assert_close(sum(pair.share * pair.b @ pair.a for pair in of_edges), exact[module])


def test_the_cross_term_is_measured_while_modules_are_merged() -> None:
    updates = round_of("bf16", LAYOUT)
    modules = partial(pairs_by_module, updates, "bf16", 3.0)
    seen = CrossTerm()
    merged = flexlora.merge(seen.watching(modules()), VIEW)
    assert seen.value == cross_term(modules())
    assert all(torch.equal(merged[name], tensor) for name, tensor in flexlora.merge(modules(), VIEW).items())


# --- FlexLoRA -------------------------------------------------------------------------------------------------------


def pairs(ranks: Sequence[int], seed: int = 0, out: int = OUT) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    counts = list(EXAMPLES.values())[: len(ranks)]
    shares = [count / sum(counts) for count in counts]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [Pair(share, random(out, rank), random(rank, IN)) for share, rank in zip(shares, ranks, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "out"),
    [((4, 4, 4), OUT), ((2, 4, 8), OUT), ((4,), OUT), ((1, 2), OUT), ((4, 4, 4), 3)],
    ids=["equal", "mixed", "one edge", "less than the hub's rank", "a module smaller than the rank"],
)
def test_flexlora_is_the_truncated_svd_of_the_dense_weights(ranks: tuple[int, ...], out: int) -> None:
    """What each edge adds to its weights is (alpha / r_k) B_k A_k, of its own rank r_k."""
    alpha = 16.0
    made = pairs(ranks, out=out)
    [previous] = pairs((RANK,), seed=1, out=out)
    b, a = flexlora.truncated(made, previous.b, previous.a)
    assert (b.shape, a.shape) == ((out, RANK), (RANK, IN))
    added = sum(pair.share * alpha / rank * pair.b @ pair.a for pair, rank in zip(made, ranks, strict=True))
    assert isinstance(added, Tensor)
    u, sigma, vt = torch.linalg.svd(added, full_matrices=False)
    best = u[:, :RANK] @ torch.diag(sigma[:RANK]) @ vt[:RANK]
    torch.testing.assert_close(alpha / RANK * b @ a, best, rtol=0, atol=1e-9)


def test_flexlora_keeps_as_near_to_what_the_edges_hold_as_any_turn_of_the_gauge() -> None:
    made = pairs((4, 4, 4))
    [previous] = pairs((RANK,), seed=1)
    b, a = flexlora.truncated(made, previous.b, previous.a)

    def distance(b: Tensor, a: Tensor) -> float:
        return float((b - previous.b).square().sum() + (a - previous.a).square().sum())

    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(50):
            turn = torch.linalg.matrix_exp(size * torch.triu(torch.randn(RANK, RANK, generator=generator).double(), 1))
            turn, _ = torch.linalg.qr(turn)
            assert distance(b @ turn, turn.T @ a) >= distance(b, a) - 1e-9
    # And what nobody changed stays: the same pair from every edge, in the form that the hub gave it.
    again = flexlora.truncated([Pair(0.25, b, a), Pair(0.75, b, a)], b, a)
    for found, held in zip(again, (b, a), strict=True):
        torch.testing.assert_close(found, held, rtol=0, atol=1e-9)


def test_flexlora_loses_no_direction_of_a_where_the_product_has_none() -> None:
    """With B = 0 in all edges an even split of the singular values would leave A = 0, and nothing could be learnt."""
    [previous] = pairs((RANK,))
    nothing = [Pair(0.5, torch.zeros_like(previous.b), previous.a) for _ in range(2)]
    b, a = flexlora.truncated(nothing, torch.zeros_like(previous.b), previous.a)
    assert not b.any()
    length = float(previous.a.square().sum(dim=1).mean().sqrt())
    torch.testing.assert_close(a @ a.T, length**2 * torch.eye(RANK, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 2, RANK])
def test_a_class_of_lower_rank_holds_the_masters_largest_singular_values(rank: int) -> None:
    alpha, master, module = 16.0, tensors(5, 0.3), MODULES[1]
    view = {f"{module}.lora_A": torch.randn(rank, IN), f"{module}.lora_B": torch.zeros(OUT, rank)}
    held = flexlora.cut(master, view)
    assert {name: tensor.shape for name, tensor in held.items()} == {
        name: tensor.shape for name, tensor in view.items()
    }
    if rank == RANK:
        assert all(torch.equal(held[name], master[name]) for name in view)
    whole = alpha / RANK * master[f"{module}.lora_B"].double() @ master[f"{module}.lora_A"].double()
    u, sigma, vt = torch.linalg.svd(whole, full_matrices=False)
    best = u[:, :rank] @ torch.diag(sigma[:rank]) @ vt[:rank]
    found = alpha / rank * held[f"{module}.lora_B"].double() @ held[f"{module}.lora_A"].double()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)


def test_flexlora_loses_less_than_fedavg_of_what_three_edges_learnt() -> None:
    updates = round_of("bf16", LAYOUT)
    exact, ours = dense(updates, LAYOUT, "bf16"), averaged(updates, "bf16")
    merged = flexlora.merge(pairs_by_module(updates, "bf16", 3.0), VIEW)
    for module in MODULES:
        svd = merged[f"{module}.lora_B"].double() @ merged[f"{module}.lora_A"].double()
        assert (svd - exact[module]).norm() < (ours[module] - exact[module]).norm()


# --- the hub's optimiser --------------------------------------------------------------------------------------------


def reddi(
    optimizer: str, x: float, deltas: Sequence[Sequence[float]], eta: float, b1: float, b2: float, tau: float
) -> float:
    """Algorithm 2 of arXiv 2003.00295, line by line, for one number and equal clients: FedYogi, FedAdam."""
    m, v = 0.0, tau**2
    for of_clients in deltas:
        delta_t = sum(of_clients) / len(of_clients)
        m = b1 * m + (1 - b1) * delta_t
        if optimizer == "fedyogi":
            v = v - (1 - b2) * delta_t**2 * math.copysign(1.0, v - delta_t**2)
        else:
            v = b2 * v + (1 - b2) * delta_t**2
        x = x + eta * m / (math.sqrt(v) + tau)
    return x


def hsu(x: float, deltas: Sequence[Sequence[float]], eta: float, beta: float) -> float:
    """FedAvgM, arXiv 1909.06335: v <- beta v + dw; w <- w - v, where dw is w less the clients' mean."""
    v = 0.0
    for of_clients in deltas:
        v = beta * v - sum(of_clients) / len(of_clients)
        x = x - eta * v
    return x


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
def test_the_optimiser_is_the_papers(optimizer: Optimizer) -> None:
    settings = Aggregation(optimizer=optimizer, learning_rate=0.05, beta1=0.8, beta2=0.95, tau=0.01)
    chance = torch.Generator().manual_seed(0)
    rounds = torch.randn(6, 3, 5, generator=chance, dtype=torch.float64) * torch.logspace(-3, 0, 5).double()
    start = torch.randn(5, generator=chance, dtype=torch.float64)
    weights, moments = {"w": start, "kept": start}, dict[str, Tensor]()
    for clients in rounds:
        weights, moments = server_optimizer.step(weights, {"w": clients.mean(dim=0)}, moments, settings)
    for place in range(5):
        deltas = rounds[:, :, place].tolist()
        if optimizer == "fedavgm":
            expected = hsu(float(start[place]), deltas, 0.05, 0.8)
        else:
            expected = reddi(optimizer, float(start[place]), deltas, 0.05, 0.8, 0.95, 0.01)
        assert float(weights["w"][place]) == pytest.approx(expected, rel=1e-12)
    assert weights["kept"] is start  # a factor that did not train does not drift along its momentum
    assert set(moments) == ({"w#m"} if optimizer == "fedavgm" else {"w#m", "w#v"})


def test_fedavgm_without_momentum_is_fedavg() -> None:
    updates = round_of("int8", LAYOUT)
    mean = weighted_mean(updates, "int8", max_weight=3.0)
    stepped, _ = server_optimizer.step(VIEW, mean, {}, Aggregation(optimizer="fedavgm", beta1=0.0))
    merged = delta.moved(VIEW, mean, "int8")
    assert all(torch.equal(stepped[name], merged[name]) for name in VIEW)
