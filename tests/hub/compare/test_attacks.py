"""What attackers hand in: each kind against its formula, and a whole small comparison with edges that attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_hub.compare.attacking import Attack
from fedsoda_hub.compare.attacks import attackers_among, flipped, forged
from fedsoda_hub.compare.run import run_comparison
from fedsoda_hub.compare.settings import Attackers, AttackKind, read_comparison
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened_to_read
from tests.hub.compare.files import write_comparison
from tests.schema import HUB

KINDS: tuple[AttackKind, ...] = get_args(AttackKind)


def tensors(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 5, generator=drawn), "b": torch.randn(4, 3, generator=drawn)}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)]).double()


OWN, HONEST = tensors(0), [tensors(seed) for seed in range(1, 9)]
STACK = torch.stack([flat(one) for one in HONEST])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula(kind: AttackKind) -> None:
    made = flat(forged(kind, OWN, HONEST, 2, seed=7))
    mean, own = STACK.mean(dim=0), flat(OWN)
    longest = max(row.norm() for row in STACK)
    expected = {
        "label-flip": own,
        "sign-flip": -own,
        "scaled": -10 * own,
        "a-little": mean - 1.5 * STACK.std(dim=0, correction=0),
        "inner-product": -8 * mean,
        "colluding": -mean / mean.norm() * longest,
    }
    if kind == "noise":
        assert float(made.norm()) == pytest.approx(10 * float(own.norm()), rel=1e-5)
        assert abs(float(made @ own) / float(made.norm() * own.norm())) < 0.5
        assert torch.equal(made, flat(forged(kind, OWN, HONEST, 2, seed=7)))
        assert not torch.equal(made, flat(forged(kind, OWN, HONEST, 2, seed=8)))
    else:
        torch.testing.assert_close(made, expected[kind], rtol=1e-5, atol=1e-6)


def test_a_plain_mean_of_all_is_reversed_by_inner_product() -> None:
    bad = flat(forged("inner-product", OWN, HONEST, 2, seed=0))
    assert float((STACK.sum(dim=0) + 2 * bad) @ STACK.mean(dim=0)) < 0


@pytest.mark.parametrize("kind", ["a-little", "inner-product", "colluding"])
def test_with_nobody_to_hide_among_an_update_is_reversed(kind: AttackKind) -> None:
    torch.testing.assert_close(flat(forged(kind, OWN, [], 2, seed=0)), -flat(OWN))


def test_the_last_edges_attack_and_labels_follow_each_other() -> None:
    edges = [f"edge-{at}" for at in range(10)]
    assert attackers_among(edges, 0.2) == ("edge-8", "edge-9")
    assert attackers_among(edges[:4], 0.2) == ("edge-3",)
    assert attackers_among(edges, 0.01) == ("edge-9",)
    assert [flipped(label, ["no", "yes", "maybe"]) for label in ("maybe", "no", "yes")] == ["no", "yes", "maybe"]
    with pytest.raises(UsageProblem, match="needs two labels, and all rows have 'yes'"):
        flipped("yes", ["yes", "yes"])


def test_label_flip_changes_the_rows_of_attackers_alone() -> None:
    named: dict[str, list[DataRow]] = {
        f"e{at}": [{"text": "x", "label": "no"}, {"text": "y", "label": "yes"}] for at in range(5)
    }
    held = Attack(Attackers(share=0.2, kind="label-flip"), "label").rows(named)
    assert held["e4"] == [{"text": "x", "label": "yes"}, {"text": "y", "label": "no"}]
    assert {name: held[name] for name in ("e0", "e1", "e2", "e3")} == {n: named[n] for n in ("e0", "e1", "e2", "e3")}
    assert Attack(Attackers(), "").rows(named) == named


@pytest.mark.parametrize("share", [0.05, 1.0 - 1e-9, -0.1, 1.0])
def test_a_share_of_nobody_or_of_all_is_refused(share: float, tmp_path: Path, tiny_llama: Path) -> None:
    path = write_comparison(tmp_path, tiny_llama, compare={"attackers": {"share": share}})
    text = path.read_text().replace(json.dumps({"share": share}), f"{{share = {share}}}")
    path.write_text(text)
    with pytest.raises(UsageProblem, match="share"):
        read_comparison(path)


def attacked(directory: Path, model: Path, kind: str, edges: int = 3) -> Path:
    compare: dict[str, Any] = {"edges": edges, "attackers": "ATTACKERS", "baselines": [], "eval_every": 0}
    path = write_comparison(directory, model, {"clip": {"aggregation": {"robust": "clip"}}}, compare=compare)
    path.write_text(path.read_text().replace('"ATTACKERS"', f'{{share = 0.34, kind = "{kind}"}}'))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The directory of a comparison, whose prepared bundle serves all kinds of attack."""
    return tmp_path_factory.mktemp("attacks")


@pytest.mark.parametrize("kind", ["sign-flip", "colluding", "label-flip"])
def test_a_comparison_with_an_attacker(kind: str, prepared: Path, tiny_llama: Path) -> None:
    comparison = read_comparison(attacked(prepared, tiny_llama, kind))
    report = run_comparison(comparison, prepared / "out", "memory", lambda event: None)
    HUB.check("compare", {"schema": 1, "status": "ok", **json.loads(msgspec.json.encode(report))})
    settings = prepared / "out" / "memory" / "clip" / "iid" / "seed-0" / "all"
    directory = RunDirectory(settings / "run.run")
    with opened_to_read(directory) as ledger:
        records, state = ledger.records(), ledger.replay()
    layout, blobs = Bundle.open(directory.bundle).manifest.lora.adapter, BlobStore(settings / "run.run" / "blobs")
    for number in (1, 2):
        updates = {
            str(one.edge): flat(delta.decode(blobs.get(one.digest), layout, "nf4"))
            for one in records
            if isinstance(one, rec.UpdateAccepted) and one.round == number
        }
        assert sorted(updates) == ["edge-0", "edge-1", "edge-2"]
        bad, mean = updates["edge-2"], (updates["edge-0"] + updates["edge-1"]) / 2
        cosine = float(bad @ mean / bad.norm() / mean.norm())
        if kind == "colluding":
            assert cosine < -0.95  # of all updates but its own, as coding leaves it
            assert float(bad.norm()) == pytest.approx(max(float(updates[e].norm()) for e in updates), rel=0.02)
        elif kind == "sign-flip":
            assert cosine < 0
    assert set(state.measured.standings) == {"edge-0", "edge-1", "edge-2"}
    assert all(found.round == 2 and found.norm > 0 for found in state.measured.standings.values())
    held = (settings / "data" / "edge-2.jsonl").read_text()
    calm = [row["answer"] for row in map(json.loads, (prepared / "rows.jsonl").read_text().splitlines())]
    words = {row["word"]: row["answer"] for row in map(json.loads, (prepared / "rows.jsonl").read_text().splitlines())}
    is_flipped = [words[row["word"]] != row["answer"] for row in map(json.loads, held.splitlines())]
    assert set(calm) == {"yes", "no"}
    assert all(is_flipped) if kind == "label-flip" else not any(is_flipped)
    assert load(blobs.get(state.master))


def test_edges_with_processes_of_their_own_do_not_attack(tmp_path: Path, tiny_llama: Path) -> None:
    comparison = read_comparison(attacked(tmp_path, tiny_llama, "scaled"))
    with pytest.raises(UsageProblem, match="leave --transport out"):
        Attack.of(comparison, "network")
