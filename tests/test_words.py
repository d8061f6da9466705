"""Hold what a machine can hold of how we write: how docstrings begin, words that are not plain English, one name a class.

Each rule runs for each package alone, so that a finding names its side. Whether a sentence is true and helps is left to
its readers.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("fedsoda_edge", "fedsoda_hub")

# What no function's docstring begins with: it does not say what the function does.
NO_VERB = frozenset(
    [
        "A",
        "All",
        "An",
        "And",
        "Any",
        "As",
        "At",
        "Both",
        "Bytes",
        "Each",
        "Every",
        "For",
        "From",
        "How",
        "If",
        "In",
        "It",
        "Its",
        "No",
        "None",
        "Of",
        "On",
        "One",
        "Only",
        "Our",
        "Seconds",
        "Some",
        "That",
        "The",
        "Their",
        "There",
        "These",
        "They",
        "This",
        "Those",
        "To",
        "True",
        "What",
        "When",
        "Where",
        "Whether",
        "Which",
        "Who",
        "Whose",
        "Why",
        "With",
        "Without",
        "Yes",
    ]
)
# What no class's or property's docstring begins with: it names no thing. "Whether" names what a property says.
NO_NOUN = frozenset(
    [
        "And",
        "As",
        "At",
        "For",
        "From",
        "How",
        "If",
        "In",
        "Of",
        "On",
        "That",
        "These",
        "They",
        "Those",
        "To",
        "What",
        "When",
        "Where",
        "Which",
        "Who",
        "With",
    ]
)
# Verbs that are nouns too, and words that only look like third persons or participles.
NOUN_TOO = frozenset(
    [
        "Answer",
        "Call",
        "Check",
        "Count",
        "Cut",
        "Deal",
        "Deliver",
        "Display",
        "Double",
        "Draw",
        "Estimate",
        "Export",
        "Fit",
        "Guess",
        "Hand",
        "Hold",
        "Judge",
        "Limit",
        "Lift",
        "Line",
        "List",
        "Load",
        "Lock",
        "Look",
        "Map",
        "Mark",
        "Match",
        "Measure",
        "Move",
        "Name",
        "Note",
        "Order",
        "Pack",
        "Pause",
        "Place",
        "Plan",
        "Point",
        "Pool",
        "Print",
        "Probe",
        "Prune",
        "Range",
        "Rank",
        "Rate",
        "Read",
        "Record",
        "Report",
        "Request",
        "Result",
        "Return",
        "Round",
        "Run",
        "Sample",
        "Save",
        "Score",
        "Send",
        "Set",
        "Shape",
        "Show",
        "Signal",
        "Sort",
        "Split",
        "Stack",
        "Start",
        "State",
        "Step",
        "Stop",
        "Store",
        "Stream",
        "Sum",
        "Sweep",
        "Table",
        "Test",
        "Text",
        "Total",
        "Train",
        "Trace",
        "Turn",
        "Update",
        "Weigh",
    ]
)
VERBS_IN_S_ED_ING = frozenset(
    [
        "Address",
        "Bring",
        "Compress",
        "Cross",
        "Discuss",
        "Embed",
        "Express",
        "Feed",
        "Focus",
        "Guess",
        "Need",
        "Pass",
        "Process",
        "Seed",
    ]
)

# Not plain international English, or not our word for it.
BANNED = [
    r"\bmend(s|ed|ing)?\b",  # correct, repair
    r"\banew\b",  # again, new
    r"\bfor ever\b",  # without end
    r"\bso many\b",  # that number of
    r"(?<!there )(?<!here )\bis no (?!longer|more)",  # is not a
    r"\bis none of\b",  # must be one of
    r"\b(go|goes|going|gone|went) on\b",  # continue
    r"\bhangs? on\b",  # depends on
    r"\bstands? aside\b",
    r"\baside\b",
    r"\bwish(es|ed)?\b",  # request
    r"\bneighbours?\b",
    r"\bof those told\b|\ba told\b|\bthe told\b",
]


@dataclass(frozen=True)
class Place:
    """A place in a file, and what stands there."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def sources(package: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def docstrings(package: str) -> Iterator[tuple[str, str, Place]]:
    """Yield (kind, name, first line): kind is "module", "class", "property" or "function"."""
    for path, text in sources(package):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            found = ast.get_docstring(node)
            if found is None:
                continue
            place = Place(path, getattr(node, "lineno", 1), found.split("\n")[0])
            if isinstance(node, ast.Module):
                yield "module", path.name, place
            elif isinstance(node, ast.ClassDef):
                yield "class", node.name, place
            else:
                names = {getattr(one, "id", getattr(one, "attr", "")) for one in node.decorator_list}
                yield "property" if names & {"property", "cached_property"} else "function", node.name, place


def first_word(text: str) -> str:
    match = re.match(r"(?:\[[a-z]+\]: )?([A-Za-z]+)", text)
    if match is None:
        return ""
    return "Table" if text.startswith("[") else match[1]  # "[rounds]: ..." names the table


def is_verb(word: str) -> bool:
    """Tell whether a word may be a verb's plain form, as far as its looks go."""
    looks = word[:1].isupper() and not (word.endswith(("s", "ed", "ing")) and word not in VERBS_IN_S_ED_ING)
    return looks and word not in NO_VERB


@pytest.mark.parametrize("package", PACKAGES)
def test_a_function_says_first_what_it_does(package: str) -> None:
    wrong = [str(at) for kind, _, at in docstrings(package) if kind == "function" and not is_verb(first_word(at.text))]
    assert not wrong, "begin with a verb:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_class_and_a_property_say_first_what_they_are(package: str) -> None:
    found = list(docstrings(package))
    begun = {first_word(at.text) for kind, _, at in found if kind == "function"}
    verbs = {word for word in begun if is_verb(word)} - NOUN_TOO
    wrong = [
        str(at)
        for kind, _, at in found
        if kind in ("class", "property")
        and (not first_word(at.text)[:1].isupper() or first_word(at.text) in verbs | NO_NOUN)
    ]
    assert not wrong, "begin with a noun:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_says_what_it_does_and_what_it_leaves_to_others(package: str) -> None:
    wrong = [
        str(path)
        for path, text in sources(package)
        if path.name != "__main__.py" and text.strip() and ast.get_docstring(ast.parse(text)) is None
    ]
    wrong += [str(at) for kind, _, at in docstrings(package) if kind == "module" and not at.text[:1].isupper()]
    assert not wrong, "\n".join(wrong)


def words(path: Path, text: str) -> Iterator[Place]:
    """Yield docstrings, other literals and comments, each with its line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Place(path, node.lineno, node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield Place(path, node.lineno, "".join(parts))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Place(path, token.start[0], token.string)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("banned", BANNED)
def test_words_are_plain(package: str, banned: str) -> None:
    wrong = {
        str(Place(at.path, at.line, " ".join(at.text.split())[:160]))
        for path, text in sources(package)
        for at in words(path, text)
        if re.search(banned, " ".join(at.text.split()), re.IGNORECASE)
    }
    assert not wrong, "\n".join(sorted(wrong))


def class_names(package: str) -> dict[str, list[str]]:
    """Map each name of a class or type alias at the top of a module to the files that define it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in sources(package):
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, makes = node.targets[0].id, ast.unparse(node.value)
                if re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name) and not makes.startswith(
                    ("TypeVar", "NewType")
                ):
                    found[name].append(str(path))
            elif isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
                found[ast.unparse(node.target)].append(str(path))
    return found


# A fact has one name where it is written down and where it is told; both are used through their module.
FACT = ["fedsoda_hub/events.py", "fedsoda_hub/federation/records.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_two_classes_of_a_package_have_two_names(package: str) -> None:
    names = class_names(package)
    twice = {name: paths for name, paths in names.items() if len(paths) > 1 and sorted(paths) != FACT}
    assert not twice, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in sorted(twice.items()))


def test_no_class_of_the_hub_has_the_name_of_one_of_the_edge() -> None:
    edge, hub = (class_names(package) for package in PACKAGES)
    both = sorted(edge.keys() & hub.keys() - {"RoundClosed"})  # the fact, and the message that carries it
    assert not both, "\n".join(f"{name}: {', '.join(edge[name] + hub[name])}" for name in both)
