"""Cases of part B, tokenizer and chat template, and of part A those of conversations that are judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_inputs_case import Case, Ended, command

DEMO = Path(__file__).resolve().parent.parent / "fedsoda_hub" / "demo"
TASK = ("Report: {text}\nDepartment:", "{department}")
DEFAULT = ("{prompt}", "{completion}")
ENVIRONMENT = "template environment only partly Transformers'"
LOST = "template that strips part of an answer, forbids a system role, knows no generation prompt"
OVER = "token ids at or over vocab_size"
IDS = "added tokens known only to tokenizer_config.json; eos as list, absent, or added by the tokenizer itself"
SPACE = "prompt template that ends in a space"
SHOWN = "data check shows text, not what is supervised"
JUDGED = "conversations as evaluation data"
ROWS = [{"text": "fever </s> <dept> now", "department": "ward 7"}, {"text": "a  leak", "department": "plumbing"}]
ADDED = {"4096": {"content": "<dept>", "special": True}}
SECONDS = 300  # of a command on a busy machine


def model(
    home: Path,
    chat: object = None,
    config: Mapping[str, object] | None = None,
    adds_end: bool = False,
    **tokenizer: Any,
) -> Path:
    """Copy the demo's model with another chat template, and with other fields; None takes a field out."""
    to = home / "model"
    shutil.copytree(DEMO / "model", to)
    for name, fields in (
        ("config.json", config or {}),
        ("tokenizer_config.json", {"chat_template": chat, **tokenizer}),
    ):
        path = to / name
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({key: value for key, value in {**held, **fields}.items() if value is not None}))
    if adds_end:
        path = to / "tokenizer.json"
        held = json.loads(path.read_text())
        end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
        number = next(token["id"] for token in held["added_tokens"] if token["content"] == "</s>")
        held["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [number], "tokens": ["</s>"]}},
        }
        path.write_text(json.dumps(held))
    return to


def check(rows: Path, tokenizer: Path, home: Path, task: tuple[str, str] = DEFAULT) -> Ended:
    """Run `data check` with a model's tokenizer."""
    words = ("data", "check", str(rows), "--prompt", task[0], "--completion", task[1], "--tokenizer", str(tokenizer))
    return command("fedsoda_edge", *words, "--json", home=home, seconds=SECONDS)


def prepare(home: Path, of: Path, task: tuple[str, str] = DEFAULT, rows: Path | None = None) -> Ended:
    """Run `prepare` on a small run of a model."""
    judged = "" if rows is None else f"eval_data = {json.dumps(str(rows))}\n"
    (home / "run.toml").write_text(
        f'name = "case"\nmodel = {json.dumps(str(of))}\ndevice = "cpu"\n'
        f"[public]\ntext = {json.dumps(str(DEMO / 'public.txt'))}\nsequences = 8\nlength = 32\n"
        "[local]\nmax_length = 128\n"
        '[method]\ndistance = "angular"\nlayers_per_group = 1\ngroups = 1\n'
        '[align]\nsteps = 2\nheal = false\nborder_map = "none"\n'
        f"[task]\nprompt = {json.dumps(task[0])}\ncompletion = {json.dumps(task[1])}\n{judged}"
    )
    return command("fedsoda_hub", "prepare", str(home / "run.toml"), "--json", home=home, seconds=SECONDS)


def supervised(ended: Ended) -> list[list[int]]:
    """List the ids that are learned, of the samples that are shown."""
    return [[piece["id"] for piece in sample["supervised"]] for sample in json.loads(ended.out)["samples"]]


def as_transformers(tokenizer: Path, row: Mapping[str, Any]) -> list[int]:
    """List the ids of a conversation's last answer, as Transformers has them."""
    from transformers import AutoTokenizer

    made, messages, tools = AutoTokenizer.from_pretrained(str(tokenizer)), row["messages"], row.get("tools")
    whole = made.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    before = made.apply_chat_template(messages[:-1], tools=tools, return_dict=True, add_generation_prompt=True)
    start = next((at for at, one in enumerate(before["input_ids"]) if one != whole[at]), len(before["input_ids"]))
    ids = list(whole[start:])
    return ids if ids[-1] == made.eos_token_id else [*ids, made.eos_token_id]


def talks_of(rows: Path) -> list[dict[str, Any]]:
    """Read the conversations of a file."""
    return [json.loads(line) for line in rows.read_text().splitlines()]


def learned(source: Path, rows: Path) -> Case:
    """Make a case of a template with which the ids that are learned must be Transformers'."""

    def wrong(home: Path) -> str:
        held = source.read_text()
        of = model(home, json.loads(held) if held.startswith("[") else held)
        ended = check(rows, of, home)
        if said := ended.lacks(0):
            return said
        expected = [as_transformers(of, row) for row in talks_of(rows)[:3]]
        return "" if supervised(ended) == expected else f"{supervised(ended)} instead of {expected}"

    return Case("B", ENVIRONMENT, f"{source.name} with {rows.name}", wrong)


def judged(name: str, made: Callable[[Path], tuple[Path, Path]]) -> Case:
    """Make a case of conversations as evaluation data; made: writes model and rows."""

    def wrong(home: Path) -> str:
        of, rows = made(home)
        return prepare(home, of, TASK, rows).lacks(0)

    return Case("A", JUDGED, name, wrong)


def ids_of(name: str, **changes: Any) -> Case:
    """Make a case of a changed tokenizer with which ids must be AutoTokenizer's and samples end in the model's own end."""

    def wrong(home: Path) -> str:
        from transformers import AutoTokenizer

        of, rows = model(home, **changes), home / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        ended = check(rows, of, home, TASK)
        if said := ended.lacks(0):
            return said
        made = AutoTokenizer.from_pretrained(str(of))
        for row, ids in zip(ROWS, supervised(ended), strict=True):
            whole = made(f"Report: {row['text']}\nDepartment: {row['department']}").input_ids
            end = changes.get("config", {}).get("eos_token_id") or made.eos_token_id
            end = made.eos_token_id if isinstance(end, list) and made.eos_token_id in end else end
            expected = [one for one in whole[-len(ids) :] if one != end] + [end]
            if ids != expected[-len(ids) :] or ids[-2] == end:
                return f"{ids} instead of {expected}"
        return ""

    return Case("B", IDS, name, wrong)


def cases(shared: Path) -> list[Case]:
    """List the cases of tokenizers, chat templates and conversations that are judged."""
    rows, templates = shared / "cases" / "rows", shared / "cases" / "templates"
    plain = (templates / "template_plain.jinja").read_text()

    def date(home: Path) -> str:
        of = model(home, (templates / "template_date.jinja").read_text())
        return check(rows / "chat.jsonl", of, home).lacks(0, "Date: 26 July 2024")

    def tojson(home: Path) -> str:
        source = "{{ messages | tojson(indent=2, separators=(',', ' : '), sort_keys=true, ensure_ascii=true) }}" + plain
        return check(rows / "chat.jsonl", model(home, source), home).lacks(0, "content")

    def unused(home: Path) -> str:
        of, data = model(home, "{% for %}"), home / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return check(data, of, home, TASK).lacks(0) or prepare(home, of, TASK).lacks(0)

    def tried(home: Path) -> str:
        return prepare(home, model(home, "{% for %}")).lacks(0, "conversations will be refused", "cannot be read")

    def named(home: Path) -> str:
        of = model(home, json.loads((templates / "template_named.jinja").read_text()))
        return check(rows / "chat.jsonl", of, home).lacks(2, "none named default")

    def loses(template: str, said: str, content: str = " left ") -> Callable[[Path], str]:
        def wrong(home: Path) -> str:
            data = home / "rows.jsonl"
            turns = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": content}]
            data.write_text(json.dumps({"messages": turns}) + "\n")
            return check(data, model(home, (templates / template).read_text()), home).lacks(0, said)

        return wrong

    def system(home: Path) -> str:
        of = model(home, (templates / "template_alternate.jinja").read_text())
        return check(rows / "chat_system.jsonl", of, home).lacks(2, "chat_system.jsonl:1", "roles must alternate")

    def over(home: Path) -> str:
        vocab = int(json.loads((DEMO / "model" / "config.json").read_text())["vocab_size"])
        token = {"content": "<dept>", "special": True}
        of = model(home, added_tokens_decoder={str(vocab): token})
        return prepare(home, of).lacks(2, f"beyond the {vocab} ids", "'<dept>'")

    def space(home: Path) -> str:
        task = (TASK[0] + " ", TASK[1])
        data = home / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        said = ("ends in a space", r"write prompt = 'Report: {text}\nDepartment:'")
        of = model(home)
        return check(data, of, home, task).lacks(0, *said) or prepare(home, of, task).lacks(0, *said)

    def shows(home: Path) -> str:
        data = home / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        ended = check(data, model(home), home, TASK)
        if said := ended.lacks(0):
            return said
        first = json.loads(ended.out)["samples"][0]
        return "" if first["joined"] == " " and first["supervised"][-1]["piece"] == "</s>" else json.dumps(first)

    def choices(home: Path) -> tuple[Path, Path]:
        return model(home, plain), rows / "chat.jsonl"

    def calls(home: Path) -> tuple[Path, Path]:
        return model(home, (templates / "template_toolcalls.jinja").read_text()), rows / "chat_tool_null.jsonl"

    found = [
        learned(templates / f"template_{name}.jinja", rows / f"{talk}.jsonl")
        for name, talk in (
            ("generation", "chat_multi"),
            ("plain", "chat_special"),
            ("bos_in_template", "chat"),
            ("eosdiff", "chat_multi"),
        )
    ]
    return [
        *found,
        Case("B", ENVIRONMENT, "template_date.jinja", date),
        Case("B", ENVIRONMENT, "tojson's arguments", tojson),
        Case("B", ENVIRONMENT, "template_named.jinja", named),
        Case("B", ENVIRONMENT, "an odd template of a model that is asked with a run's own", unused),
        Case("B", ENVIRONMENT, "an odd template is tried in prepare", tried),
        Case("B", LOST, "strips the answer", loses("template_trimlast.jinja", "writes the answer otherwise")),
        Case("B", LOST, "knows no generation prompt", loses("template_nogenprompt.jinja", "no generation prompt")),
        Case("B", LOST, "forbids a system role", system),
        Case("B", OVER, "a token beyond the embedding", over),
        ids_of("as it is"),
        ids_of("added token in the config alone", config={"vocab_size": 4200}, added_tokens_decoder=ADDED),
        ids_of("eos as a list", config={"eos_token_id": [0, 2]}),
        ids_of("eos absent", config={"eos_token_id": None}),
        ids_of("eos added by the tokenizer", adds_end=True),
        ids_of("add_bos and add_eos", add_bos_token=True, add_eos_token=True),
        Case("B", SPACE, "Department: and a space", space),
        Case("B", SHOWN, "a pair", shows),
        judged("chat.jsonl", choices),
        judged("chat_tool_null.jsonl", calls),
    ]
