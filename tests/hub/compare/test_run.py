"""A whole comparison of a small model: its report, its tables, and a second call that continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import Tensor

from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_hub.compare import run as run_module
from fedsoda_hub.compare.central import train_central
from fedsoda_hub.compare.run import run_comparison
from fedsoda_hub.compare.settings import read_comparison
from fedsoda_hub.events import CellDone, HubEvent, StageProgress, as_json
from fedsoda_hub.local import in_process
from fedsoda_hub.preparation import run_text, self_generated
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests.hub.compare.files import write_comparison
from tests.schema import HUB

VARIANTS = {"aligned": {"align": {"steps": 2}}, "none": {"align": {"steps": 0}, "method": {"realign_every": 0}}}
MEASURED = ("seconds_per_edge_round", "bytes", "by_round", "to_level", "edge_memory_bytes")


def compared(path: Path, out: Path, events: list[HubEvent] | None = None) -> dict[str, Any]:
    def say(event: HubEvent) -> None:
        HUB.check_event(as_json(event))
        if events is not None:
            events.append(event)

    report: dict[str, Any] = json.loads(msgspec.json.encode(run_comparison(read_comparison(path), out, "memory", say)))
    return report


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, Path, dict[str, Any]]:
    """(COMPARE.toml, where its results lie, the report)."""
    directory = tmp_path_factory.mktemp("calm")
    path = write_comparison(directory, tiny_llama, VARIANTS, compare={"baselines": ["untouched", "alone", "central"]})
    return path, directory / "out", compared(path, directory / "out")


def test_the_report_is_as_promised(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, report = calm
    HUB.check("compare", {"schema": 1, "status": "ok", **report})
    assert json.loads((out / "compare.json").read_text()) == {k: v for k, v in report.items() if k != "results"}
    of = report["splits"]["iid"]
    assert of["variants"].keys() == VARIANTS.keys()
    for row in of["variants"].values():
        assert [one["round"] for one in row["by_round"]] == [1, 2]
        assert row["by_round"][-1]["accuracy"] == row["plug_in"]["mean"]
        assert row["edge_peak_rss_bytes"] is None  # of a process of its own, which there is none
    assert of["variants"]["aligned"]["to_level"]["rounds"] in (1, 2)  # its own
    assert {one["rows"] for one in report["dealt"]["iid"]["0"].values()} == {16}
    assert len(of["differences"]) == 10  # each pair of two variants and three baselines
    assert report["orderings"] == []  # of one seed
    for figures in ("losses", "aucs", "shares"):
        assert set(of["baselines"][figures]) == {"untouched", "best edge alone", "central"}


def test_the_tables_have_the_papers_columns(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, report = calm
    text = Path(report["markdown"]).read_text()
    row = report["splits"]["iid"]["variants"]["none"]
    assert f"| none | {100 * row['plug_in']['mean']:.1f} |" in text
    heads = "trainable | parameters a round | bytes an edge and round, up | down | model | edge memory | GFLOP"
    assert heads in text
    # LoRA of the two adapter layers, by their shapes: rank 4 x (in + out) of q, k, v, up and down.
    trainable = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + 3 * (64 + 128) - (64 + 128))
    assert row["trainable"] == trainable
    assert f"| none | {trainable:,} | {2 * trainable:,} |" in text
    trained_on, kl = 100 * row["sub_llm"]["mean"], row["public_kl"]
    lost = 100 * row["plug_in"]["mean"] - trained_on
    shown = f"| none | {trained_on:.1f} | {lost:+.1f} | {row['loss']['sub_llm']['mean']:.3f} | {kl['pruned']:.3f} |"
    assert f"{shown} {kl['quantized']:.3f} | {kl['aligned']:.3f} | {row['auc']['sub_llm']['mean']:.3f} |" in text
    assert "full model untouched" in text
    assert "To the accuracy of aligned, iid (Table 9)" in text


def test_of_one_seed_the_tables_say_why_nothing_is_shown(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, report = calm
    text = Path(report["markdown"]).read_text()
    assert "Not shown (1 seed; at least 5 are needed).\n" in text
    assert text.count("| not shown (1 seed; at least 5 are needed) |") == len(report["splits"]["iid"]["differences"])
    assert "None" not in text


def test_margins_and_chosen_answers_are_kept_and_give_auc_and_shares(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, report = calm
    kept = json.loads((out / "memory" / "none" / "iid" / "seed-0" / "all" / "result.json").read_text())["answered"]
    row = report["splits"]["iid"]["variants"]["none"]
    for which in ("plug_in", "sub_llm"):
        of = kept[which]["of_choices"]
        assert of["choices"] == ["no", "yes"]
        assert of["ranks"] is None
        assert kept[which]["right"] == "".join("01"[g == c] for g, c in zip(of["gold"], of["chosen"], strict=True))
        assert [int(margin > 0) for margin in of["margins"]] == of["chosen"]
        high, low = ([m for m, g in zip(of["margins"], of["gold"], strict=True) if g == one] for one in (1, 0))
        pairs = [(p > n) + 0.5 * (p == n) for p in high for n in low]
        assert row["auc"][which]["mean"] == pytest.approx(sum(pairs) / len(pairs))
        yes = row["shares"][which]["yes"]
        assert yes["chosen"]["mean"] == pytest.approx(sum(of["chosen"]) / len(of["chosen"]))
        assert yes["right"] == pytest.approx(sum(of["gold"]) / len(of["gold"]))
    assert row["mean_rank"] == {}


def test_a_loss_is_a_difference_too(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, report = calm
    of = report["splits"]["iid"]
    losses = {name: row["loss"]["plug_in"]["mean"] for name, row in of["variants"].items()}
    losses |= {name: found["mean"] for name, found in of["baselines"]["losses"].items()}
    labels = {"untouched": "full model untouched", "central": "central, all rows in one place"}
    assert losses["central"] < losses["untouched"]
    for found in of["differences"]:
        assert found["loss"]["nats"] == pytest.approx(losses[found["one"]] - losses[found["other"]], abs=1e-9)
    text = Path(report["markdown"]).read_text()
    for name, loss in losses.items():
        assert f"| {labels.get(name, name)} | {loss:.3f} |" in text


def test_the_page_holds_its_pictures_and_fetches_nothing(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, report = calm
    page = Path(report["report"]).read_text()
    assert page.count("data:image/png;base64,") == len(report["pictures"]) == 3  # accuracy, split, layers
    assert "http" not in page.replace("http-equiv", "")
    assert all(Path(name).parent == out for name in report["pictures"])


def test_a_cell_finds_what_was_prepared_for_all(calm: tuple[Path, Path, dict[str, Any]]) -> None:
    """A preparation of other settings would be made again, which nobody would notice except by the time it takes."""
    _, out, _ = calm
    made = {path.read_text() for path in out.glob("prepared/*/run.run/prepare/fingerprint")}
    found = [path.read_text() for path in out.glob("memory/**/run.run/prepare/fingerprint")]
    assert len(found) == 4  # the cells, and each edge alone
    assert set(found) == made


def test_seeds_that_share_a_bundle_deal_other_rows(tmp_path: Path, tiny_llama: Path) -> None:
    """Each cell then runs with the first seed, on the rows that its own seed deals; one bundle is prepared for all."""
    shared = {"seeds": [3, 4], "rows": 12, "prepare": "once"}
    path = write_comparison(tmp_path, tiny_llama, {"default": {"lora": {"rank": 4}}}, compare=shared)
    report = compared(path, tmp_path / "out")
    assert len(list(tmp_path.glob("out/prepared/*/run.run/bundle"))) == 1
    cells = [tmp_path / "out" / "memory" / "default" / "iid" / f"seed-{seed}" / "all" for seed in (3, 4)]
    rows = [{line for data in (cell / "data").iterdir() for line in data.read_text().splitlines()} for cell in cells]
    assert rows[0] != rows[1]
    assert [read_settings(cell / "run.toml").seed for cell in cells] == [3, 3]
    assert "All seeds share one bundle of each variant." in Path(report["markdown"]).read_text()


def test_what_the_full_llm_writes_serves_all_variants_of_a_seed(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    generate_blocks = self_generated.generate_blocks

    def counted(*args: Any, seed: int, **options: Any) -> Any:
        written.append(seed)
        return generate_blocks(*args, seed=seed, **options)

    monkeypatch.setattr(run_text, "generate_blocks", counted)
    path = write_comparison(
        tmp_path,
        tiny_llama,
        {"some": {"align": {"steps": 1}}, "none": {"align": {"steps": 0}}},
        method={"realign_every": 0},
        public={"text": "self-generated", "sequences": 2, "length": 8},
        rounds={"count": 1},
        local={"max_steps": 1},
    )
    compared(path, tmp_path / "out")
    assert written == [0]


def test_a_second_call_does_nothing_again(
    calm: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, report = calm
    monkeypatch.setattr(in_process, "federate", None)
    monkeypatch.setattr(run_module, "train_central", None)
    assert compared(path, out) == report


@pytest.mark.parametrize(("max_steps", "taken"), [(1, [2]), (0, [10, 11])])
def test_central_training_is_done_once_for_all_splits_with_as_many_steps(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int, taken: list[int]
) -> None:
    """Of 40 rows in batches of 4, parts of 20 and 20 take 10 steps, parts of 26 and 14 take 11: 7 and 4."""
    path = write_comparison(
        tmp_path,
        tiny_llama,
        {"none": {"align": {"steps": 0}}},
        compare={"baselines": ["central"], "splits": ["iid", "files"], "data": ["even.jsonl", "odd.jsonl"]},
        method={"realign_every": 0},
        rounds={"count": 1},
        local={"max_steps": max_steps},
    )
    rows = [json.dumps({"word": f"word {number}", "answer": "yes" if number % 3 else "no"}) for number in range(40)]
    (tmp_path / "even.jsonl").write_text("\n".join(rows[:26]))
    (tmp_path / "odd.jsonl").write_text("\n".join(rows[26:]))
    trained: list[int] = []

    def counted(settings: RunSettings, data: Path, steps: int, *others: Any) -> dict[float, dict[str, Tensor]]:
        trained.append(steps)
        return train_central(settings, data, steps, *others)

    monkeypatch.setattr(run_module, "train_central", counted)
    report = compared(path, tmp_path / "out")
    iid, files = (report["splits"][split]["baselines"]["losses"]["central"] for split in ("iid", "files"))
    assert trained == taken
    assert (iid == files) == (len(taken) == 1)


def test_a_result_that_lacks_figures_is_judged_again_without_a_new_run(
    calm: tuple[Path, Path, dict[str, Any]],
) -> None:
    path, out, report = calm
    done = out / "memory" / "none" / "iid" / "seed-0" / "all" / "result.json"
    whole = done.read_bytes()
    kept = json.loads(whole)
    for model in kept["answered"].values():
        del model["of_choices"]
    done.write_text(json.dumps(kept))
    events: list[HubEvent] = []
    again = compared(path, out, events)
    assert [event.cell for event in events if isinstance(event, CellDone)] == ["none, iid, seed 0"]
    assert json.loads(done.read_text())["answered"] == json.loads(whole)["answered"]
    assert again["splits"]["iid"]["differences"] == report["splits"]["iid"]["differences"]
    done.write_bytes(whole)


def test_a_comparison_that_was_stopped_continues_to_the_same_report(
    calm: tuple[Path, Path, dict[str, Any]], tmp_path: Path, tiny_llama: Path
) -> None:
    """Stopped after the first round of the second cell; only what is measured may differ."""
    path = write_comparison(tmp_path, tiny_llama, VARIANTS)

    class Killed(Exception):
        pass

    def kill(event: HubEvent) -> None:
        if isinstance(event, StageProgress) and event.detail == "none, iid, seed 0":
            raise Killed

    with pytest.raises(Killed):
        run_comparison(read_comparison(path), tmp_path / "out", "memory", kill)
    assert not (tmp_path / "out" / "compare.json").exists()
    events: list[HubEvent] = []
    report = compared(path, tmp_path / "out", events)
    assert [event.cell for event in events if isinstance(event, CellDone)] == ["none, iid, seed 0"]
    for variant in VARIANTS:
        ours, theirs = (dict(one["splits"]["iid"]["variants"][variant]) for one in (report, calm[2]))
        assert [one["accuracy"] for one in ours["by_round"]] == [one["accuracy"] for one in theirs["by_round"]]
        for name in (*MEASURED, "gap_closed"):  # the second comparison has no baselines
            del ours[name], theirs[name]
        assert ours == theirs
        results = [
            json.loads((out / "memory" / variant / "iid" / "seed-0" / "all" / "result.json").read_text())
            for out in (tmp_path / "out", calm[1])
        ]
        ours_and_theirs = [[one["master"] for one in result["rounds"]] for result in results]
        assert ours_and_theirs[0] == ours_and_theirs[1]
        assert results[0]["answered"] == results[1]["answered"]


@pytest.mark.parametrize(
    ("tables", "task", "error", "message"),
    [
        ({"edges": 20}, {}, UsageProblem, "split iid gives one of 20 edges 1 rows, but [compare] least_rows = 2"),
        (
            {"splits": ["users:clinic"]},
            {},
            DataProblem,
            "needs the column 'clinic', but row 1 of [compare] data has answer, word",
        ),
        (
            {},
            {"prompt": "{text}:"},
            DataProblem,
            "rows.jsonl:1: no column 'text'; there are answer, word; rename a column in the file, or use another in [task] "
            "prompt and completion",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_work(
    tmp_path: Path,
    tiny_llama: Path,
    tables: dict[str, Any],
    task: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = write_comparison(tmp_path, tiny_llama, compare=tables, task=task)
    with pytest.raises(error) as refused:
        compared(path, tmp_path / "out")
    assert message in str(refused.value)
    assert not (tmp_path / "out" / "prepared").exists()
