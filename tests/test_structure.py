"""`scripts/structure.py` sees what grows too large: each figure of a small made-up checkout, at its bound and one over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from structure import circles, import_graph, main, measure, parse

JOIN = "fedsoda_edge/join/agent.py"


def lines(count: int) -> str:
    return "pass\n" * count


def class_of(count: int) -> str:
    return "class Agent:\n" + "    a = 1\n" * (count - 1)


def object_with(count: int) -> str:
    body = "".join(f"        self.a{number} = {number}\n" for number in range(count))
    return f"class Agent:\n    def __init__(self):\n{body}    def again(self):\n        self.a0 = 1\n"


def dicts(count: int) -> str:
    return "Values = dict[str, Any]\n" * count


PLANTED: list[tuple[str, str, Callable[[int], str], int]] = [
    ("lines of the largest class", JOIN, class_of, 320),
    ("lines of the largest file", JOIN, lines, 500),
    ("lines of the largest file", "scripts/bench.py", lines, 500),
    ("attributes of the largest object", JOIN, object_with, 16),
    ("dict[str, Any] left", JOIN, dicts, 30),
    ("README bytes", "README.md", lambda count: "x" * count, 9000),
]


def checkout(root: Path, **files: str) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(("figure", "path", "make", "most"), PLANTED, ids=[f"{one[0]} of {one[1]}" for one in PLANTED])
def test_a_bound_is_kept_at_its_number_and_broken_one_above(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: str, path: str, make: Callable[[int], str], most: int
) -> None:
    assert main([str(checkout(tmp_path, **{path: make(most)}))]) == 0
    assert f"ok   {figure}" in capsys.readouterr().out
    assert main([str(checkout(tmp_path, **{path: make(most + 1)}))]) == 1
    printed = capsys.readouterr().out
    assert f"OVER {figure}" in printed
    assert printed.count("OVER") == 1
    assert f"{most + 1} of at most {most:5}" in printed


def test_two_files_that_import_each_other_are_a_circle_however_they_do_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "fedsoda_hub/settings/run.py": "def f():\n    from fedsoda_hub.algorithms import methods",
        "fedsoda_hub/algorithms/methods.py": "if TYPE_CHECKING:\n    from ..settings.run import Settings",
        "fedsoda_hub/plan.py": "from fedsoda_hub.settings import run",
    }
    assert main([str(checkout(tmp_path, **files))]) == 1
    assert "fedsoda_hub.algorithms.methods <-> fedsoda_hub.settings.run\n" in capsys.readouterr().out


def test_a_name_belongs_to_the_nearest_file_above_it() -> None:
    graph = import_graph(
        [
            parse("a/__init__.py", "from a.b import c"),
            parse("a/b/__init__.py", ""),
            parse("a/b/c.py", "import a.b.d.function, os.path\nfrom . import d\nfrom a.b import NAME"),
            parse("a/b/d.py", "from a.b.d import itself"),
        ]
    )
    assert graph == {"a": {"a.b.c"}, "a.b": set(), "a.b.c": {"a.b", "a.b.d"}, "a.b.d": set()}


def test_every_circle_is_found_once() -> None:
    graph = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": [], "e": ["f"], "f": ["e", "a"], "g": ["g"], "h": ["nobody"]}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"], ["g"]]


def test_what_is_untyped_is_told_by_file_and_words_about_it_do_not_count(tmp_path: Path) -> None:
    files = {
        "fedsoda_hub/a.py": "def f(x: dict[str, Any]) -> list[dict[str, Any]]: ...",
        "fedsoda_hub/b.py": '"""No dict[str, Any] here."""\nx: dict[str, int]  # nor dict[str, Any] here',
        "fedsoda_hub/c.py": "x: dict[str, Any]",
    }
    [figure] = [one for one in measure(checkout(tmp_path, **files)) if one.name == "dict[str, Any] left"]
    assert (figure.found, list(figure.where)) == (3, ["   2 fedsoda_hub/a.py", "   1 fedsoda_hub/c.py"])


def test_another_name_for_an_untyped_dict_counts_wherever_it_is_used(tmp_path: Path) -> None:
    files = {
        "fedsoda_hub/a.py": "Report = dict[str, Any]\nRows: TypeAlias = list[Mapping[str, typing.Any]]\nx: Report\n",
        "fedsoda_hub/b.py": "from fedsoda_hub.a import Report as R\ndef f(x: R) -> list[R]: ...",
        "fedsoda_hub/c.py": "from fedsoda_hub import a\nx: a.Rows\ny: Dict[str, Any]",
        "fedsoda_hub/d.py": "from fedsoda_edge.b import Report\nx: Report\ny: dict[str, object]",
    }
    [figure] = [one for one in measure(checkout(tmp_path, **files)) if one.name == "dict[str, Any] left"]
    assert list(figure.where) == ["   3 fedsoda_hub/a.py", "   2 fedsoda_hub/b.py", "   2 fedsoda_hub/c.py"]


def test_fields_that_a_type_declares_are_no_attributes_of_an_object(tmp_path: Path) -> None:
    declared = "class Welcome:\n" + "".join(f"    a{number}: int\n" for number in range(40))
    assert main([str(checkout(tmp_path, **{JOIN: declared}))]) == 0
