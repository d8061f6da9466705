"""Cases of part A, rows: what `fedsoda-edge data check` and the hub's checks answer to files that people bring."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bench_inputs_case import Case, Ended, command

TASK = ("Report: {text}\nDepartment:", "{department}")
DEFAULT = ("{prompt}", "{completion}")
DEMO = Path(__file__).resolve().parent.parent / "fedsoda_hub" / "demo"
NO_TEXT = "a value that is no text becomes text"
NOTHING = "nothing to learn"
HALVES = "text that UTF-8 cannot hold"
ALIKE = "labels that differ by white space"
FORMAT = "file format by suffix, case-sensitive"
ELSEWHERE = "rows that are valid elsewhere"
PRIVATE = "a refusal that tells private text"
LONG = "one row too long"
JUDGED = "conversations as evaluation data"


def check(path: Path, home: Path, task: tuple[str, str] = TASK) -> Ended:
    """Run `data check` on a file."""
    prompt, completion = task
    return command(
        "fedsoda_edge", "data", "check", str(path), "--prompt", prompt, "--completion", completion, "--json", home=home
    )


def prepare(home: Path, rows: Path, task: tuple[str, str] = TASK, table: str = "eval") -> Ended:
    """Run the hub's `prepare` with a file as evaluation data ("eval"), or as rows like the task's ("like")."""
    prompt, completion = task
    public = f"like_task = {json.dumps(str(rows))}\n" if table == "like" else ""
    judged = f"eval_data = {json.dumps(str(rows))}\n" if table == "eval" else ""
    (home / "run.toml").write_text(
        f'name = "case"\nmodel = {json.dumps(str(DEMO / "model"))}\ndevice = "cpu"\n'
        f"[public]\ntext = {json.dumps(str(DEMO / 'public.txt'))}\nsequences = 4\nlength = 32\n{public}"
        "[method]\nlayers_per_group = 1\ngroups = 1\n"
        f"[task]\nprompt = {json.dumps(prompt)}\ncompletion = {json.dumps(completion)}\n{judged}"
    )
    return command("fedsoda_hub", "prepare", str(home / "run.toml"), "--json", home=home, seconds=240)


def refused(kind: str, path: Path, *words: str, task: tuple[str, str] = TASK) -> Case:
    """Make a case of a file that `data check` refuses with these words."""
    return Case("A", kind, path.name, lambda home: check(path, home, task).lacks(2, *words))


def taken(
    kind: str, path: Path, rows: int, skipped: Mapping[str, int] | None = None, task: tuple[str, str] = TASK
) -> Case:
    """Make a case of a file of which so many rows are taken; skipped: how many are not, by reason."""

    def wrong(home: Path) -> str:
        ended = check(path, home, task)
        if said := ended.lacks(0):
            return said
        found = json.loads(ended.out)
        reasons = {one["reason"]: one["rows"] for one in found["skipped_for"]}
        return "" if (found["taken"], reasons) == (rows, dict(skipped or {})) else f"{found['taken']} taken, {reasons}"

    return Case("A", kind, path.name, wrong)


def written(kind: str, name: str, rows: Iterable[object], wrong: Callable[[Path, Path], str]) -> Case:
    """Make a case of rows that are written for it; wrong: called with the home and the file."""

    def tried(home: Path) -> str:
        path = home / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return wrong(home, path)

    return Case("A", kind, name, tried)


def cases(shared: Path) -> list[Case]:
    """List the cases of rows."""
    at = shared / "cases" / "rows"
    call = {"role": "assistant", "content": "x" * 70_000}
    asked = {"role": "user", "content": "where?"}
    answer = {"role": "assistant", "content": "left"}

    def shows(home: Path) -> str:
        ended = check(at / "eval_space.jsonl", home)
        return ended.lacks(
            0, "differ by white space or case alone", "'plumbing' (1)", "'plumbing ' (1)", "'electric\\n' (1)"
        )

    def tells_little(home: Path, path: Path) -> str:
        ended = check(path, home)
        return ended.lacks(2, "rows.jsonl:1: 'department' is ['xxx") or (
            "" if len(ended.text) < 1000 else "all is printed"
        )

    def is_skipped(home: Path, path: Path) -> str:
        return check(path, home, DEFAULT).lacks(0, '"first_line": 2', '"taken": 1', '"reason": "long"')

    def reaches(home: Path) -> str:
        return check(at / "chat_tool_role.jsonl", home, DEFAULT).lacks(0, '"taken": 1', '"tools": "list"')

    def with_mark(home: Path) -> str:
        (home / "fedsoda-home").mkdir()
        (home / "fedsoda-home" / "config.toml").write_bytes(b'\xef\xbb\xbf[data.check]\nprompt = "{text}"\n')
        path = at / "plain.parquet"
        ran = command("fedsoda_edge", "data", "check", str(path), "--completion", "{department}", home=home)
        return ran.lacks(0, "taken")

    def run_with_mark(home: Path) -> str:
        (home / "run.toml").write_bytes(
            'name = "case"\nmodel = "gone"\n[public]\ntext = "gone.txt"\n'.encode("utf-8-sig")
        )
        ran = command("fedsoda_hub", "token", "list", str(home / "run.toml"), home=home)
        return "the BOM is no TOML" if "not TOML" in ran.text else ran.lacks(ran.status)

    def dataset(home: Path) -> str:
        return check(at / "dict_ds", home).lacks(2, "holds the splits train; name one of them")

    tables = [
        taken(FORMAT, at / name, 6) for name in ("bom.jsonl", "bom.json", "UPPER.JSON", "rows.jsonl.gz", "upper.JSONL")
    ]
    tables += [taken(FORMAT, at / name, 6) for name in ("list.jsonl", "cr_only.jsonl", "crlf.jsonl")]
    tables += [
        taken(FORMAT, at / "plain.pq", 6),
        taken(FORMAT, at / "rows.csv", 2),
        taken(FORMAT, at / "pretty.jsonl", 6),
    ]
    tables += [taken(FORMAT, at / "categorical.parquet", 6), taken(FORMAT, at / "u2028.jsonl", 1)]
    talks = ("chat_tool_null", "sharegpt", "conversations_role", "chat_prompt_col", "prompt_list", "chat_parts")
    return [
        taken(NO_TEXT, at / "null_prompt.jsonl", 6, {"null": 1}),
        taken(NO_TEXT, at / "null_label.jsonl", 6, {"null": 1}),
        refused(NO_TEXT, at / "nested.jsonl", "nested.jsonl:1: 'text' is", "an object and not text"),
        refused(NO_TEXT, at / "listcol.jsonl", "listcol.jsonl:1: 'text' is", "a list and not text"),
        refused(NO_TEXT, at / "bytes.parquet", "bytes.parquet:1: 'text' is", "bytes and not text; cast the column"),
        refused(NO_TEXT, at / "nan.jsonl", "nan.jsonl:1: 'text' is nan, not a finite number"),
        refused(NO_TEXT, at / "bool_label.jsonl", "bool_label.jsonl:1: 'department' is false, not a string"),
        refused(NOTHING, at / "all_empty.jsonl", "none of the 3 rows", "empty or blank"),
        taken(NOTHING, at / "empty_label.jsonl", 6, {"empty": 1}),
        taken(NOTHING, at / "chat_empty_answer.jsonl", 4, {"empty": 1}, DEFAULT),
        Case("A", NOTHING, "all empty, at the hub", lambda home: prepare(home, at / "all_empty.jsonl").lacks(2, "none of the 3 rows")),
        refused(HALVES, at / "surrogate.jsonl", "surrogate.jsonl:1: 'text' has half a character", "at character 11"),
        Case("A", ALIKE, "eval_space.jsonl", shows),
        Case(
            "A", ALIKE, "eval_space.jsonl, at the hub",
            lambda home: prepare(home, at / "eval_space.jsonl").lacks(2, "differ by white space alone"),
        ),
        *tables,
        Case("A", FORMAT, "config.toml with a BOM", with_mark),
        Case("A", FORMAT, "RUN.toml with a BOM", run_with_mark),
        Case("A", FORMAT, "dict_ds", dataset),
        refused(FORMAT, at / "utf16.jsonl", "truncated data", "save it as UTF-8"),  # half a character at its end
        refused(FORMAT, at / "latin1.jsonl", "latin1.jsonl:1: not UTF-8: the byte 0xe9"),
        refused(FORMAT, at / "empty.jsonl", "has no rows"),
        refused(FORMAT, at / "trailing_comma.jsonl", "trailing_comma.jsonl:1: not JSON"),
        refused(FORMAT, at / "truncated.jsonl", "not JSON"),
        refused(FORMAT, at / "dupkey.jsonl", "the key 'text' stands twice"),
        *(taken(ELSEWHERE, at / f"{name}.jsonl", 1, task=DEFAULT) for name in talks),
        taken(ELSEWHERE, at / "messages.parquet", 4, task=DEFAULT),
        taken(ELSEWHERE, at / "mixed_null.jsonl", 2, task=DEFAULT),
        Case("A", ELSEWHERE, "chat_tool_role.jsonl", reaches),
        written(PRIVATE, "a completion of 140 kB", [{"text": "a", "department": ["x" * 140_000]}], tells_little),
        refused(PRIVATE, at / "intlabel.parquet", "'department' is 0, not a string", "cast the column to strings"),
        refused(PRIVATE, at / "int_label.jsonl", "'department' is 0, not a string", "write it in quotes"),
        written(LONG, "a conversation over 64 KiB", [{"messages": [asked, answer]}, {"messages": [asked, call]}], is_skipped),
        Case(
            "A", JUDGED, "chat.jsonl, with a model that has no chat template",
            lambda home: prepare(home, at / "chat.jsonl", DEFAULT).lacks(2, "this model has no chat template"),
        ),
    ]  # fmt: skip
