"""Settings that do not go together are refused with both values and the ways out; the rest is as the method has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.settings.run import EffectiveSetting, effective
from tests.hub.settings.files import FULL, SHORT, read


@pytest.mark.parametrize(
    ("aggregation", "codec", "sentence"),
    [
        (
            "rule = 'flexlora'",
            "nf4",
            r"""rule = "flexlora" beside \[wire\] codec = 'nf4' in run.toml: .*"bf16", or rule""",
        ),
        ("rule = 'flexlora'", "int8", r"""write codec = "bf16", or rule = "fedavg", "ffa" or "rolora"$"""),
        ("rule = 'flexlora'", "nf4-weight", r"""write codec = "bf16", or rule = """),
        (
            "rule = 'flexlora'\noptimizer = 'fedadam'",
            "bf16",
            r"""write optimizer = "none", or rule = "fedavg", "ffa" or""",
        ),
        ("optimizer = 'fedavgm'", "nf4-weight", r"""write codec = "nf4", "int8" or "bf16", or optimizer = "none"$"""),
        ("learning_rate = 0.1", "nf4", "optimizer that reads it: fedavgm, fedadam, fedyogi$"),
        (
            "optimizer = 'fedavgm'\ntau = 0.1",
            "nf4",
            r"tau = 0.1 beside optimizer = 'fedavgm' .* delete tau, or .*: fedadam, fedyogi$",
        ),
        ("robust = 'clip'", "nf4-weight", r"""write codec = "nf4", "int8" or "bf16", or robust = "none"$"""),
        (
            "robust = 'median'\nrule = 'flexlora'",
            "bf16",
            r"""robust = 'median' beside rule = "flexlora" .* "clip", "krum" or "centered-clip", or rule = "fedavg"$""",
        ),
        (
            "robust = 'clip'\nrobust_share = 0.3",
            "nf4",
            r"""robust_share = 0.3 beside robust = 'clip' .* delete robust_share, or write robust = "trimmed" or "krum"$""",
        ),
        ("robust_share = 0.3", "nf4", "robust_share = 0.3 beside robust = 'none'"),
        (
            "robust = 'krum'\nrobust_share = 0.5",
            "nf4",
            "robust_share = 0.5 in run.toml; it must be at least 0, below 0.5",
        ),
        ("robust = 'bulyan'", "nf4", "must be one of none, clip, median, trimmed, krum, centered-clip$"),
    ],
)
def test_aggregation_that_does_not_go_with_the_rest_is_refused_with_both_ways_out(
    folder: Path, aggregation: str, codec: str, sentence: str
) -> None:
    with pytest.raises(UsageProblem, match=sentence):
        read(folder, SHORT + f"[aggregation]\n{aggregation}\n[wire]\ncodec = '{codec}'\n")


def test_flexlora_goes_with_bf16_and_every_optimiser_has_its_own_step(folder: Path) -> None:
    read(folder, SHORT + "[aggregation]\nrule = 'flexlora'\n[wire]\ncodec = 'bf16'\n")
    for optimizer, step_size in (("fedavgm", 1.0), ("fedadam", 1e-3), ("fedyogi", 1e-3)):
        how = read(folder, SHORT + f"[aggregation]\noptimizer = '{optimizer}'\n").aggregation
        assert (how.rule, how.step_size, how.beta1, how.beta2, how.tau) == ("fedavg", step_size, 0.9, 0.99, 1e-3)


@pytest.mark.parametrize("robust", ["clip", "median", "trimmed", "krum", "centered-clip"])
def test_robust_rules_go_with_what_they_can_measure(folder: Path, robust: str) -> None:
    for how in ("", "rule = 'ffa'", "rule = 'rolora'\noptimizer = 'fedadam'", "optimizer = 'fedavgm'"):
        assert read(folder, SHORT + f"[aggregation]\nrobust = '{robust}'\n{how}\n").aggregation.robust == robust
    classes = (
        SHORT + f"[method]\nname = 'fedpruner'\ndrop_layers = 1\nclasses = [2]\n[aggregation]\nrobust = '{robust}'\n"
    )
    if robust in ("krum", "centered-clip"):
        with pytest.raises(UsageProblem, match=r'write robust = "clip", "median" or "trimmed", or delete classes$'):
            read(folder, classes)
    else:
        read(folder, classes)


def test_a_full_emulator_is_neither_pruned_nor_aligned(folder: Path) -> None:
    """One meaning of the defaults, wherever they are read: round machine, prepare, plan, what the hub says."""
    settings = read(folder, FULL)
    method, align = settings.method, settings.align
    assert (method.layers_per_group, method.groups, method.realign_every) == (0, 0, 0)
    assert (align.steps, align.realign_steps) == (0, 0)
    assert effective(settings)["[method] realign_every"] == EffectiveSetting(0, "default")
    assert read(folder, FULL + "groups = 0\n") == settings


@pytest.mark.parametrize("key", ["layers_per_group = 3", "groups = 1", "realign_every = 5"])
def test_what_a_full_emulator_cannot_use_is_refused_where_it_is_written(folder: Path, key: str) -> None:
    name, _, value = key.partition(" = ")
    with pytest.raises(UsageProblem) as caught:
        read(folder, FULL + key + "\n")
    assert str(caught.value) == (
        f'[method] {name} = {value} beside [method] emulator = "full" in run.toml: a full emulator is neither pruned '
        f'nor aligned; delete [method] {name}, or write emulator = "sub"'
    )


def test_alignment_steps_for_a_full_emulator_are_refused(folder: Path) -> None:
    for key in ("steps", "realign_steps"):
        with pytest.raises(UsageProblem, match=rf"\[align\] {key} = 7 beside"):
            read(folder, FULL + f"[align]\n{key} = 7\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("adapter_layers = 0", "[method] adapter_layers = 0 in run.toml; it must be at least 1"),
        (
            "bundle_bytes = 9",
            "[method] bundle_bytes = 9 beside groups = 4 in run.toml: the number of groups decides how large the sub-LLM is; "
            'delete bundle_bytes, or write groups = "auto"',
        ),
        (
            'groups = "auto"',
            '[method] groups = "auto" in run.toml without bundle_bytes: the hub cannot know how large a sub-LLM may be; '
            "write the bytes that its files may take on an edge, such as bundle_bytes = 2_000_000_000",
        ),
        (
            'groups = "auto"\nbundle_bytes = 9\nclasses = [1]',
            '[method] classes = [1] beside groups = "auto" in run.toml: their size is chosen with their number; '
            "delete classes, or write groups = 4",
        ),
        (
            "classes = [3]",
            "[method] classes = [3] in run.toml; it must be at most 3 numbers, ascending, each above [method] groups = 4",
        ),
        (
            'name = "fedpruner+"\nlayer_choice = "top"',
            "[method] layer_choice = 'top' in run.toml; it must be contiguous or spectral where name = \"fedpruner+\"",
        ),
        (
            'name = "fedpruner"\nlayer_choice = "top"\nreprune_every = 2',
            "[method] reprune_every = 2 beside layer_choice = 'top' in run.toml, which is the same every time; write "
            'reprune_every = 0, or layer_choice = "contiguous" or "spectral" or "random"',
        ),
    ],
)
def test_layers_that_do_not_go_together_are_refused(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageProblem) as refused:
        read(folder, SHORT + f"[method]\n{text}\n")
    assert str(refused.value) == sentence


def test_what_a_method_does_not_read_may_be_written_as_what_it_is(folder: Path) -> None:
    method = read(folder, SHORT + '[method]\nname = "fedpetuning"\nadapter_layers = 0\ngroups = 0\n').method
    assert method == read(folder, SHORT + '[method]\nname = "fedpetuning"\n').method


def test_a_choice_that_is_the_same_every_time_is_not_drawn_again(folder: Path) -> None:
    text = SHORT + '[method]\nname = "fedpruner"\nlayer_choice = {!r}\n'
    assert [read(folder, text.format(choice)).method.reprune_every for choice in ("random", "uniform")] == [5, 0]


@pytest.mark.parametrize(
    "url",
    [
        "cdn.example.org/run7", "ftp://cdn.example.org/", "https://", "https:///run7/", "https://a:b@cdn.example.org/",
        "https://cdn.example.org/?key=1", "https://cdn.example.org/#run7", "https://cdn.example.org:99999/", "https://[::1/",
        "https://cdn.example.org/run 7/", "https://cdn.example.org/\\u00e9/", "", "x" * 600,
    ],
)  # fmt: skip
def test_what_is_not_the_address_of_a_mirror_is_refused(folder: Path, url: str) -> None:
    with pytest.raises(UsageProblem, match=r"\[blobs\] mirrors = .* is not the address of a mirror; write https://"):
        read(folder, SHORT + f'[blobs]\nmirrors = ["https://cdn.example.org/run7/", "{url}"]\n')


def test_mirrors_are_urls_of_directories_and_at_most_eight(folder: Path) -> None:
    good = [
        "https://cdn.example.org/run7/",
        "http://10.0.0.5:8080",
        "https://[2001:db8::1]/x",
        "HTTPS://B.S3.Amazonaws.com/a%20b",
    ]
    assert read(folder, SHORT + f"[blobs]\nmirrors = {good}\n").blobs.mirrors == good
    with pytest.raises(UsageProblem, match=r"it must be at most 8 URLs"):
        read(folder, SHORT + f"[blobs]\nmirrors = {[f'https://cdn.example.org/{n}' for n in range(9)]}\n")


def test_mirrors_may_change_while_a_run_is_prepared(folder: Path) -> None:
    with_mirrors = read(folder, SHORT + '[blobs]\nmirrors = ["https://cdn.example.org/"]\n')
    assert with_mirrors.fixed() == read(folder, SHORT).fixed()
