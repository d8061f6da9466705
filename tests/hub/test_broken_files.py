"""Whatever is done to a model's files or a RUN.toml, `prepare` and `plan` end with 0 or 2, in a sentence, soon.

Files are cut, their bytes flipped, keys dropped, values given another type: by hypothesis, the same cases in every run.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedsoda_hub.cli.commands import app
from tests import tiny
from tests.hub.runs import make_run

NO_LOOP = 20.0  # CPU seconds: on a quiet machine each takes less than 2, but nothing here may hang on how busy it is
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OTHER = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        3,
        10**9,
        10**30,
        0.5,
        -0.5,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "x",
        "3",
        [],
        [1],
        ["a"],
        {},
        {"a": 1},
        [[0.5]],
        [None],
        "\x00",
        "é" * 50,
    ]
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each kind of model's directory."""
    top = tmp_path_factory.mktemp("runs")
    small = {
        "method": {"adapter_layers": 1, "layers_per_group": 1, "groups": 1},
        "public": {"sequences": 4, "length": 12},
    }
    small |= {"align": {"steps": 2, "realign_steps": 1}, "local": {"max_length": 32}}
    for kind in ("whole", "sharded", "tied", "experts", "gemma"):
        model = top / kind / "model"
        if kind in ("experts", "gemma"):
            tiny.make_tiny(model, {"experts": "qwen3_moe", "gemma": "gemma3_text"}[kind])
        else:
            tiny.make_tiny_llama(model, layers=4, hidden=64, intermediate=64, tie=kind == "tied", vocab=280)
        if kind == "sharded":
            held = load_file(model / "model.safetensors")
            table: dict[str, str] = {}
            for number, names in enumerate((sorted(held)[::2], sorted(held)[1::2])):
                save_file({name: held[name] for name in names}, model / f"part-{number}.safetensors", {"format": "pt"})
                table |= dict.fromkeys(names, f"part-{number}.safetensors")
            (model / "model.safetensors").unlink()
            (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
        make_run(top / kind, Path("model"), **small)
    return top


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value, the first few of each long list or table."""
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in items[:60]:
            yield (*at, key)
            yield from paths(inner, (*at, key))


def change_json(draw: Any, file: Path) -> None:
    value = json.loads(file.read_text())
    for _ in range(draw(st.integers(1, 2))):
        places = list(paths(value))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        owner = value
        for step in above:
            owner = owner[step]
        if draw(st.booleans()) and isinstance(owner, dict):
            del owner[key]
        else:
            owner[key] = copy.deepcopy(draw(OTHER))
        note(f"{file.name}: {[*above, key]}")
    file.write_text(json.dumps(value))


def change_toml(draw: Any, file: Path) -> None:
    lines = file.read_text().split("\n")
    at = draw(st.integers(0, len(lines) - 1))
    what = draw(st.sampled_from(["drop", "value", "double", "junk"]))
    if what == "drop":
        del lines[at]
    elif what == "double":
        lines.insert(at, lines[at])
    elif what == "junk":
        lines.insert(
            at, draw(st.sampled_from(["[", "x", "= 1", "a.b = 1", "[method]", "[[task]]", '"', "\ufeff", "\u0000"]))
        )
    else:
        key, _, _ = lines[at].partition("=")
        shown = json.dumps(draw(OTHER)).replace("NaN", "nan").replace("Infinity", "inf").replace("null", '"null"')
        lines[at] = f"{key}= {shown.replace('{}', '{ }').replace(': ', ' = ')}"
    note(f"{file.name}: {what} {lines[at : at + 1]}")
    file.write_text("\n".join(lines))


def change_bytes(draw: Any, file: Path) -> None:
    data = bytearray(file.read_bytes())
    if draw(st.booleans()):
        kept = draw(st.integers(0, len(data)))
        del data[kept:]
        note(f"{file.name}: cut to {kept}")
    else:
        # Headers are small and weights are large: half of the flips fall into the first bytes.
        places = st.one_of(st.integers(0, min(400, len(data) - 1)), st.integers(0, len(data) - 1))
        for at in draw(st.lists(places, min_size=1, max_size=8)):
            data[at] = draw(st.integers(0, 255))
            note(f"{file.name}[{at}] = {data[at]}")
    file.write_bytes(bytes(data))


def damage(draw: Any, run: Path) -> None:
    files = [
        path
        for path in (run / "model").iterdir()
        if path.name in MODEL_FILES or path.name.startswith(("part-", "model."))
    ]
    file = draw(st.sampled_from([run / "RUN.toml", *sorted(files)]))
    if file.suffix == ".json" and draw(st.integers(0, 3)):
        change_json(draw, file)
    elif file.suffix == ".toml" and draw(st.integers(0, 3)):
        change_toml(draw, file)
    else:
        change_bytes(draw, file)


def check(draw: Any, runs: Path, work: Path) -> None:
    """Break one file of one run, and give it to both commands."""
    shutil.rmtree(work, ignore_errors=True)
    kind = draw(st.sampled_from(sorted(path.name for path in runs.iterdir())))
    note(kind)
    run = Path(shutil.copytree(runs / kind, work))
    damage(draw, run)
    for words in (
        ["plan", str(run / "model"), "--groups", "1", "--layers-per-group", "1"],
        ["prepare", str(run / "RUN.toml")],
    ):
        began = time.process_time()
        with torch.random.fork_rng():
            ended = CliRunner().invoke(app, words)
        seconds = time.process_time() - began
        assert ended.exit_code in (0, 2), f"{words[0]}: {ended.exit_code}: {ended.output[-800:]} {ended.exception!r}"
        assert "defect of fedsoda" not in ended.output, ended.output
        assert "Traceback" not in ended.output, ended.output
        assert seconds < NO_LOOP, f"{words[0]} took {seconds:.1f} s: {ended.output[-300:]}"


@pytest.mark.usefixtures("_signals_as_they_were")
@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj", "model.norm", "lm_head", "embed_tokens"])
def test_finite_weights_that_overflow_are_no_defect_either(runs: Path, tmp_path: Path, part: str) -> None:
    run = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    file = run / "model" / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    [name] = [name for name in held if part in name]
    held[name].view(-1)[::5] = 3e38
    file.unlink()
    save_file(held, file, {"format": "pt"})
    ended = CliRunner().invoke(app, ["prepare", str(run / "RUN.toml"), "--json"])
    assert ended.exit_code == 2, ended.output
    assert "computes values that are not finite from the public text" in ended.output


@pytest.mark.usefixtures("_signals_as_they_were")
def test_too_few_texts_to_heal_on_are_counted(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    file = run / "RUN.toml"
    (run / "rows.jsonl").write_text('{"word": "cat"}\n')
    few = 'like_task = "rows.jsonl"\nsequences = 2\n'
    text = (
        file.read_text()
        .replace('distance = "angular"', 'distance = "healed"')
        .replace("[public]\n", f"[public]\n{few}")
    )
    file.write_text("\n".join(line for line in text.splitlines() if line not in ("sequences = 4",)))
    ended = CliRunner().invoke(app, ["prepare", str(file)])
    assert ended.exit_code == 2, ended.output
    said = r"there are [1-4] texts to heal layers on, of which every 5th stays unseen; write \[public\] sequences"
    assert re.search(said, " ".join(ended.output.split()))


@pytest.fixture
def _signals_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    gc.collect()


def examples(count: int) -> settings:
    unchecked = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=unchecked)


@pytest.mark.usefixtures("_signals_as_they_were")
@examples(40)
@given(st.data())
def test_forty_broken_files_are_answered_in_a_sentence(runs: Path, tmp_path: Path, data: st.DataObject) -> None:
    check(data.draw, runs, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_signals_as_they_were")
@examples(300)
@given(st.data())
def test_three_hundred_broken_files_are_answered_in_a_sentence(runs: Path, tmp_path: Path, data: st.DataObject) -> None:
    check(data.draw, runs, tmp_path / "run")
