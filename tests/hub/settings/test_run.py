"""RUN.toml as a run reads it: what is wrong is named, with the value and what to do; what a resumed run may change."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.run import EffectiveSetting, RunSettings, differences, effective, read_settings
from tests.hub.settings.files import FULL, SHORT, WRITTEN, read

RECORDED = Path(__file__).parents[2] / "golden" / "fixed_settings.json"  # of ledgers, as commit f7a12bf wrote them


def test_a_file_with_all_keys_is_read_and_its_values_are_the_defaults(folder: Path) -> None:
    full = msgspec.to_builtins(read(folder, WRITTEN))
    short = msgspec.to_builtins(read(folder, SHORT))
    for key, value in tomllib.loads(WRITTEN).items():
        if isinstance(value, dict):
            for inner, written in value.items():
                assert full[key][inner] == written
                if (key, inner) not in {("task", "prompt"), ("task", "completion"), ("task", "eval_data")}:
                    assert short[key][inner] == written, f"[{key}] {inner}"
        else:
            assert full[key] == value
            assert key == "model" or short[key] == value


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings = read(folder, WRITTEN)
    assert settings.run_dir == folder / "triage.run"
    assert settings.public_text == folder / "public.txt"
    assert settings.eval_data == folder / "eval.jsonl"


def test_settings_cross_to_the_compute_child_as_json(folder: Path) -> None:
    settings = read(folder, WRITTEN)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=RunSettings) == settings


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (SHORT.replace("model", "modle"), "run.toml has no key modle; the nearest is model"),
        (SHORT + "[round]\ncount = 3\n", "run.toml has no key round; the nearest is rounds"),
        (SHORT + "[rounds]\ndeadline = 3\n", "run.toml has no key [rounds] deadline; the nearest is [rounds] deadline_seconds"),
        (SHORT + "[method]\nlayers_per_groups = 3\n", "the nearest is [method] layers_per_group"),
        (SHORT.replace("[public]", "path = 1\n[public]"), "run.toml has no key path"),
        ("rounds = 3\n" + SHORT, "run.toml: rounds is 3, but it is a table: write [rounds]"),
        ('model = "m"\n[public]\ntext = "public.txt"\n', "run.toml has no name; write name = ..."),
        (SHORT.replace('text = "public.txt"', "length = 9"), "run.toml has no [public] text; write text = ... below [public]"),
        ('name = "triage"\nmodel = "m"\n', "run.toml has no [public] text; write text = ... below [public]"),
        ("", "run.toml has no name; write name = ..."),
        (SHORT + "[rounds]\ncount = 'ten'\n", "[rounds] count = 'ten' in run.toml; it must be a whole number"),
        (SHORT + "[rounds]\ncount = 1.5\n", "[rounds] count = 1.5 in run.toml; it must be a whole number"),
        (SHORT + "[rounds]\ncount = true\n", "[rounds] count = True in run.toml; it must be a whole number"),
        (SHORT + "[rounds]\nquorum = 'all'\n", "[rounds] quorum = 'all' in run.toml; it must be a number"),
        (SHORT + f"[lora]\nalpha = 1{'0' * 400}\n", "00 in run.toml; it must be a smaller number"),
        ("seed = 'x'\n" + SHORT, "seed = 'x' in run.toml; it must be a whole number"),
        (SHORT + "[lora]\ntargets = ['q_proj', 3]\n", "[lora] targets[1] = 3 in run.toml; it must be text in quotes"),
        (SHORT + "[lora]\ntargets = 'q_proj'\n", "[lora] targets = 'q_proj' in run.toml; it must be a list"),
        (SHORT + "[task]\neval_data = 3\n", "[task] eval_data = 3 in run.toml; it must be text in quotes"),
        (SHORT + "[method]\nquantize_embedding = 1\n", "quantize_embedding = 1 in run.toml; it must be true or false"),
        (SHORT + "[rounds]\ncount = 0\n", "[rounds] count = 0 in run.toml; it must be at least 1"),
        (SHORT + "[rounds]\nquorum = 1.5\n", "[rounds] quorum = 1.5 in run.toml; it must be above 0, at most 1"),
        (SHORT + "[rounds]\nquorum = 0\n", "[rounds] quorum = 0 in run.toml"),
        (SHORT + "[rounds]\ndeadline_seconds = inf\n", "[rounds] deadline_seconds = inf in run.toml; it must be above 0"),
        (SHORT + "[local]\nlearning_rate = nan\n", "[local] learning_rate = nan in run.toml"),
        (SHORT + "[local]\nmax_grad_norm = 0\n", "[local] max_grad_norm = 0 in run.toml; it must be above 0"),
        (SHORT + "[local]\nproximal_mu = -1\n", "[local] proximal_mu = -1 in run.toml; it must be at least 0"),
        (SHORT + "[wire]\ncodec = 'zip'\n", "[wire] codec = 'zip' in run.toml; it must be one of nf4, int8, bf16"),
        (SHORT + "[aggregation]\nrule = 'flora'\n", "rule = 'flora' in run.toml; it must be one of fedavg, ffa, rolora, fl"),
        (SHORT + "[aggregation]\noptimizer = 'adam'\n", "it must be one of none, fedavgm, fedadam, fedyogi"),
        (SHORT + "[aggregation]\nlearning_rate = 'fast'\n", "learning_rate = 'fast' in run.toml; it must be a number"),
        (SHORT + "[aggregation]\noptimizer = 'fedadam'\nlearning_rate = 0\n", "learning_rate = 0 in run.toml; it must be above 0"),
        (SHORT + "[aggregation]\noptimizer = 'fedadam'\nbeta2 = 1\n", "beta2 = 1 in run.toml; it must be at least 0, below 1"),
        (SHORT + "[aggregation]\noptimizer = 'fedyogi'\ntau = 0\n", "[aggregation] tau = 0 in run.toml; it must be above 0"),
        (SHORT + "[method]\nname = 'fedavg'\n", "[method] name = 'fedavg' in run.toml; it must be one of fedsoda, exact, fedbiot"),
        (SHORT + "[method]\nemulator = 'fulll'\n", "[method] emulator = 'fulll' in run.toml; it must be sub or full"),
        (SHORT + "[method]\nemulator = true\n", "[method] emulator = True in run.toml; it must be text in quotes"),
        (SHORT + "[method]\nadapter_base = 'int3'\n", "[method] adapter_base = 'int3' in run.toml; it must be nf4 or bf16"),
        ("device = 'gpu'\n" + SHORT, "device = 'gpu' in run.toml; it must be auto, cpu, cuda or cuda:N"),
        ("dtype = 'int8'\n" + SHORT, "dtype = 'int8' in run.toml"),
        (SHORT.replace("triage", "../x"), "name = '../x' in run.toml; it must be letters, digits, - and _"),
        (SHORT + "[listen]\nport = 70000\n", "[listen] port = 70000 in run.toml; it must be 0 to 65535"),
        (SHORT.replace("public.txt", "gone.txt"), "[public] text: "),
        (SHORT + "[task]\neval_data = 'gone.jsonl'\n", "[task] eval_data: "),
        ("name = ", "run.toml is not TOML: Invalid value (at end of document); correct that place: text is written in quotes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_value(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        read(folder, text)
    assert sentence in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"run\.toml is not there; write a RUN\.toml"):
        read_settings(tmp_path / "run.toml")


def test_a_file_is_called_what_it_is_called(folder: Path) -> None:
    for text, sentence in (
        ("modle = 1", "miss.toml has no key modle"),
        ('name = "m"', "miss.toml has no model; write"),
    ):
        (folder / "miss.toml").write_text(text)
        with pytest.raises(UsageProblem, match=f"^{sentence}"):
            read_settings(folder / "miss.toml")


def test_a_file_that_cannot_be_read_is_said_with_what_to_do(folder: Path) -> None:
    (folder / "run.toml").write_bytes(b"\xff")
    for path in (folder, folder / "run.toml"):
        with pytest.raises(UsageProblem, match=r"cannot be read \(.*\); name a file of UTF-8 text that you may read"):
            read_settings(path)


def test_a_template_with_more_than_names_is_refused(folder: Path) -> None:
    with pytest.raises(UsageProblem):
        read(folder, SHORT + "[task]\nprompt = '{row.text}'\n")


# --- resuming -------------------------------------------------------------------------------------------------------


def recorded(settings: RunSettings) -> Any:
    """As the ledger gives it back: through JSON."""
    return msgspec.json.decode(msgspec.json.encode(settings.fixed()))


def test_the_same_file_resumes_its_run(folder: Path) -> None:
    settings = read(folder, WRITTEN)
    assert differences(recorded(settings), settings) == []


@pytest.mark.parametrize("change", [
    ("count = 20", "count = 40"), ("quorum = 0.8", "quorum = 0.5"), ("deadline_seconds = 3600", "deadline_seconds = 9"),
    ('"127.0.0.1"', '"0.0.0.0"'), ("8470", "8471"), ("port = 8470", 'public_url = "https://hub.org"'),
    ("port = 8470", '[tls]\nmode = "on"'), ("port = 8470", '[tls]\ncertificate = "c.pem"\nkey = "k.pem"'),
])  # fmt: skip
def test_count_quorum_deadline_host_and_port_may_change(folder: Path, change: tuple[str, str]) -> None:
    before = recorded(read(folder, WRITTEN))
    assert differences(before, read(folder, WRITTEN.replace(*change))) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("rank = 8", "rank = 4"), "[lora] rank: 8 when the run was prepared, 4 now"),
        (("groups = 4", "groups = 2"), "[method] groups: 4 when the run was prepared, 2 now"),
        (('"path-or-hub-id"', '"other"'), "model: 'path-or-hub-id' when the run was prepared, 'other' now"),
        (("seed = 0", "seed = 1"), "seed: 0 when the run was prepared, 1 now"),
        (('codec = "nf4"', 'codec = "int8"'), "[wire] codec: 'nf4' when the run was prepared, 'int8' now"),
    ],
)
def test_what_defines_model_and_method_may_not(folder: Path, change: tuple[str, str], sentence: str) -> None:
    before = recorded(read(folder, WRITTEN))
    assert differences(before, read(folder, WRITTEN.replace(*change))) == [sentence]


@pytest.mark.parametrize(("before", "now"), [("sub", "full"), ("full", "sub")])
def test_a_run_keeps_its_emulator(folder: Path, before: str, now: str) -> None:
    text = SHORT + "[method]\nemulator = {!r}\n"
    begun = recorded(read(folder, text.format(before)))
    assert differences(begun, read(folder, text.format(now))) == [
        f"[method] emulator: {before!r} when the run was prepared, {now!r} now"
    ]


def test_a_run_that_began_before_a_key_existed_began_with_its_default(folder: Path) -> None:
    begun = recorded(read(folder, WRITTEN))
    del begun["[method] emulator"]
    assert differences(begun, read(folder, WRITTEN)) == []
    assert differences(begun, read(folder, FULL)) != []


def test_every_setting_is_told_with_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "public.txt").write_text("text")
    (tmp_path / "x.toml").write_text('name = "x"\nmodel = "m"\n[public]\ntext = "public.txt"\n[lora]\nrank = 4\n')
    found = effective(read_settings(tmp_path / "x.toml"))
    assert found["[lora] rank"] == EffectiveSetting(4, "x.toml")
    assert found["[lora] alpha"] == EffectiveSetting(16, "default")
    assert found["[task] eval_data"] == EffectiveSetting(None, "default")
    assert {key for key, setting in found.items() if setting.source == "x.toml"} == {
        *("name", "model", "[public] text", "[lora] rank")
    }


def test_a_key_that_is_gone_is_refused_in_a_file_and_said_of_a_run_that_began_with_it(folder: Path) -> None:
    for value in ("true", "false"):
        with pytest.raises(UsageProblem, match=r"run\.toml has no key \[align\] closed_form; .*: correct or delete it"):
            read(folder, SHORT + f"[align]\nclosed_form = {value}\n")
    settings = read(folder, SHORT)
    assert differences({**recorded(settings), "[align] closed_form": False}, settings) == []
    assert differences({**recorded(settings), "[align] closed_form": True}, settings) == [
        "[align] closed_form: True when the run was prepared, False now"
    ]


# Of FedSODA: what a run of an older hub began with, where its file did not say it.
OLDER: dict[str, object] = {
    "[method] distance": "angular",
    "[method] realign_every": 5,
    "[align] heal": False,
    "[align] border_map": "auto",
    "[align] steps": 200,
}


def test_a_recorded_run_of_an_older_hub_has_the_same_settings_but_for_defaults_that_changed(folder: Path) -> None:
    """To the letter: bundles, and cells of a comparison, are found again by a digest of these values."""
    for case in json.loads(RECORDED.read_text()):
        settings = read(folder, case["toml"].replace("closed_form = true\n", ""))
        then = {**OLDER, **case["fixed"]}
        now = settings.fixed()
        changed = {key for key in now if now[key] != then[key]}
        assert changed <= set(OLDER), case["what"]
        changed |= {"[align] closed_form"} if then["[align] closed_form"] else set()
        assert {line.partition(":")[0] for line in differences(case["fixed"], settings)} == changed, case["what"]
        kept = {key: value for key, value in now.items() if key not in OLDER}
        assert then.keys() - now.keys() == {"[align] closed_form"}
        assert json.dumps(kept) == json.dumps({key: then[key] for key in kept}), case["what"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ('keep = "best"\neval_every = 1', "eval_data names no rows to judge on"),
        ('keep = "best"\neval_data = "public.txt"', "eval_every = 0 judges the last round alone"),
        ('metric = "f1"', "it must be one of accuracy, loss, auc, mean_rank"),
    ],
)
def test_the_best_round_needs_rounds_that_are_judged(folder: Path, task: str, words: str) -> None:
    with pytest.raises(UsageProblem) as refused:
        read(folder, f"{SHORT}[task]\n{task}\n")
    assert words in str(refused.value)


def test_which_round_is_kept_may_change_in_a_run_and_what_it_begins_with_may_not(folder: Path) -> None:
    before = read(folder, SHORT).fixed()
    best = read(folder, f'{SHORT}[task]\nkeep = "best"\nmetric = "loss"\neval_data = "public.txt"\neval_every = 2\n')
    assert (best.task.best_by, differences(before, best)) == ("loss", [])
    assert read(folder, SHORT).task.best_by is None
    assert differences(before, read(folder, f'{SHORT}[lora]\nstart_from = "x"\n')) == [
        "[lora] start_from: None when the run was prepared, 'x' now"
    ]
