"""A small COMPARE.toml with its rows, for tests of the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.hub.runs import WORDS

SMALL: dict[str, dict[str, Any]] = {
    "compare": {"data": ["rows.jsonl"], "edges": 2, "seeds": [0], "least_rows": 2, "baselines": []},
    "method": {"distance": "angular", "adapter_layers": 2, "layers_per_group": 1, "groups": 2, "realign_every": 1},
    "lora": {"rank": 4},  # alpha by default
    "public": {"text": "public.txt", "sequences": 4, "length": 16},
    "align": {
        "heal": False,
        "border_map": "none",
        "steps": 2,
        "realign_steps": 1,
        "batch_size": 4,
        "learning_rate": 1e-2,
    },
    "rounds": {"count": 2},
    "local": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "max_length": 64},
    "task": {"prompt": "Say {word}:", "completion": "{answer}", "eval_data": "eval.jsonl"},
}


def write_comparison(
    directory: Path, model: Path, variants: dict[str, dict[str, Any]] | None = None, **tables: dict[str, Any]
) -> Path:
    """`tables` change SMALL; variants as they stand in the file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "public.txt").write_text(" ".join(WORDS * 12))
    for name, ends in (("rows", ("", "s")), ("eval", ("ed",))):
        rows = [{"word": w + end, "answer": "yes" if i % 3 else "no"} for end in ends for i, w in enumerate(WORDS)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"model = {json.dumps(str(model))}", 'device = "cpu"', 'dtype = "bfloat16"']
    for table in {**SMALL, **tables}:
        lines.append(f"[{table}]")
        lines += [f"{k} = {json.dumps(v)}" for k, v in {**SMALL.get(table, {}), **tables.get(table, {})}.items()]
    for name, values in (variants or {}).items():
        for table, inner in values.items():
            lines.append(f"[variants.{name}.{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in inner.items()]
    path = directory / "compare.toml"
    path.write_text("\n".join(lines))
    return path
