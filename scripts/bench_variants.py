"""What `bench_compare` compares: variants by what differs from the defaults, sets of them, and what a cell of a model costs.

Rows are `bench_tasks.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench_tasks import LIKE_TASK, Sizes

ROOT = Path(__file__).resolve().parent.parent
Table = dict[str, Any]  # a table of COMPARE.toml
Tables = dict[str, Table]

PROMPTS: Tables = {
    "sst2": {"prompt": "Review: {sentence}\nSentiment:", "completion": "{label}"},
    "dolly": {"prompt": "Instruction: {instruction}\nCategory:", "completion": "{category}"},
    "boolq": {"prompt": "{passage}\nQuestion: {question}\nAnswer:", "completion": "{answer}"},
    "gsm8k": {"prompt": "Question: {question}\nAnswer:", "completion": "{answer}", "choices": "none"},
}


@dataclass(frozen=True)
class Task:
    """A task with a model: its rows, the splits that its results are of, and what of COMPARE.toml is its own."""

    splits: tuple[str, ...]
    sizes: Sizes
    tables: Tables = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """The settings of all cells with one model.

    tables: of every variant. alignments: [align] of the methods that align by steps. realign_every: FedSODA's as in the
    paper. tasks: by name. quick: what `--quick` changes in tables. quick_steps: what it changes in the alignments.
    """

    model: Path
    tables: Tables
    alignments: Tables
    realign_every: int
    tasks: dict[str, Task]
    quick: Tables
    quick_steps: Table


# Cells of two to six minutes of one core; FedOT and FedPETuning up to thirty.
REF24 = Setup(
    model=ROOT / "fedsoda_hub" / "demo" / "model",
    tables={
        "compare": {
            "rows": 1600,
            "edges": 4,
            "seeds": [0, 1, 2],
            "eval_rows": 1000,
            "eval_every": 8,
            "baselines": ["untouched"],
        },
        "public": {"sequences": 96, "length": 96},
        "rounds": {"count": 16},
        "local": {"epochs": 100, "max_steps": 50, "learning_rate": 2e-3, "max_length": 96},
    },
    alignments={
        "fedsoda": {"steps": 60, "realign_steps": 15, "learning_rate": 3e-3},
        "fedbiot": {"steps": 60, "realign_steps": 5, "learning_rate": 3e-3},
        "fedot": {"steps": 60, "learning_rate": 3e-3},
    },
    realign_every=8,
    tasks={
        "sst2": Task(("dirichlet-0.5",), Sizes()),
        # Dolly is learned in half the steps.
        "dolly": Task(("files",), Sizes(judged=400), {"local": {"max_steps": 25}}),
        # More steps overfit, since few passages are short enough.
        "boolq": Task(
            ("dirichlet-0.5",),
            Sizes(judged=300, like_task=150, length=400),
            {"compare": {"rows": 0}, "local": {"max_steps": 4, "max_length": 192}},
        ),
    },
    quick={
        "compare": {"rows": 1200, "seeds": [0], "eval_rows": 400, "eval_every": 0},
        "public": {"sequences": 48, "length": 64},
        "rounds": {"count": 3},
        "local": {"max_steps": 15},
    },
    quick_steps={"steps": 20, "realign_steps": 5},
)
# Cells of three minutes of one core with AVX512-BF16, and of at most twenty; preparing, which cells share, is not counted.
SMOLLM2 = Setup(
    model=ROOT / "bench-models" / "smollm2",
    tables={
        "compare": {
            "rows": 4000,  # 1,600 rows hold less than this LoRA can learn; a cell draws 3,840
            "edges": 4,
            "seeds": [0, 1, 2, 3, 4],
            "prepare": "once",  # 200 steps of ODA take 12 minutes
            "eval_rows": 1000,
            "eval_every": 0,
            "baselines": ["untouched", "alone", "central"],
        },
        "public": {"sequences": 64, "length": 128},
        "rounds": {"count": 6},
        "local": {"epochs": 100, "max_steps": 20, "learning_rate": 1e-3, "max_length": 96},
    },
    alignments={
        "fedsoda": {"steps": 200, "realign_steps": 30},
        "fedbiot": {"steps": 200, "realign_steps": 10},
        "fedot": {"steps": 200},
    },
    realign_every=5,
    tasks={
        "sst2": Task(("iid", "dirichlet-0.5"), Sizes()),
        "dolly": Task(
            ("files",),
            Sizes(judged=600),
            {"compare": {"eval_rows": 0}},
        ),
        # Long rows: these are the steps that FedPETuning has time for.
        "boolq": Task(
            ("iid", "dirichlet-0.5"),
            Sizes(judged=500, like_task=100, length=600),
            {"compare": {"rows": 0, "eval_rows": 0}, "local": {"max_steps": 8, "max_length": 256}},
        ),
        # Answers are generated too, which takes most of the time of judging; hardly one is right.
        "gsm8k": Task(
            ("iid",),
            Sizes(length=400),
            {
                "compare": {"rows": 1200, "eval_rows": 100, "eval_every": 0},
                "local": {"max_steps": 6, "max_length": 224},
            },
        ),
    },
    quick={
        "compare": {"rows": 800, "seeds": [0], "eval_rows": 200, "eval_every": 0, "baselines": ["untouched"]},
        "public": {"sequences": 16, "length": 64},
        "rounds": {"count": 2},
        "local": {"max_steps": 10},
    },
    quick_steps={"steps": 10, "realign_steps": 2},
)
SETUPS = {"ref24": REF24, "smollm2": SMOLLM2}


def quick(setup: Setup) -> Setup:
    """Return the setup with what `--quick` changes."""
    tables = {name: {**table, **setup.quick.get(name, {})} for name, table in setup.tables.items()}
    tasks = {
        name: replace(task, tables={of: {**table, **setup.quick.get(of, {})} for of, table in task.tables.items()})
        for name, task in setup.tasks.items()
    }
    steps = {
        method: {key: setup.quick_steps.get(key, value) for key, value in align.items()}
        for method, align in setup.alignments.items()
    }
    return replace(setup, tables=tables, tasks=tasks, alignments=steps)


# What the paper does not have.
PAPER: Table = {"heal": False, "border_map": "none"}


def variants(setup: Setup) -> dict[str, Tables]:
    """List what differs in COMPARE.toml, by variant: "ours" is the defaults, "published" FedSODA as in the paper."""
    published: Tables = {
        "method": {"distance": "angular", "realign_every": setup.realign_every},
        "align": {**PAPER, **setup.alignments["fedsoda"]},
    }

    def but(**tables: Table) -> Tables:
        """Return "published" with these tables on top."""
        return {**published, **{name: {**published.get(name, {}), **table} for name, table in tables.items()}}

    never, prompts = {"realign_every": 0}, {"like_task": LIKE_TASK}
    return {
        "ours": {},
        "published": published,
        "exact": {"method": {"name": "exact"}},
        "fedbiot": {"method": {"name": "fedbiot", "realign_every": 1}, "align": setup.alignments["fedbiot"]},
        "fedot": {"method": {"name": "fedot"}, "align": setup.alignments["fedot"]},
        "fedpetuning": {"method": {"name": "fedpetuning"}},
        "neither": but(method=never, align={"steps": 0}),
        "realign": but(align={"steps": 0}),
        "pre-align": but(method=never),
        "mapped": but(method=never, align={"steps": 0, "border_map": "ridge"}, public=prompts),
        "published-mapped": but(align={"border_map": "ridge"}, public=prompts),
        "n2-p6": but(method={"layers_per_group": 2, "groups": 6}),
        "n4-p3": but(method={"layers_per_group": 4, "groups": 3}),
        "int8": but(wire={"codec": "int8"}),
        "bf16": but(wire={"codec": "bf16"}),
        "ours-bf16": {"wire": {"codec": "bf16"}},
        "ours-klt": {"wire": {"codec": "klt"}},
        "ours-klt-fine": {"wire": {"codec": "klt-fine"}},
        "ours-bf16-rolora": {"wire": {"codec": "bf16"}, "aggregation": {"rule": "rolora"}},
        "ours-klt-rolora": {"wire": {"codec": "klt"}, "aggregation": {"rule": "rolora"}},
        "public-like-task": but(public={"text": "like_task.txt"}),
        "public-self": but(public={"text": "self-generated"}),
        "ours-angular": {"method": {"distance": "angular"}},
        "ours-aligned": {"align": {"steps": setup.alignments["fedsoda"]["steps"]}},
        "ours-mapped": {"align": {"border_map": "ridge"}},
        "ours-n2-p6": {"method": {"layers_per_group": 2, "groups": 6}},
        "ours-n4-p3": {"method": {"layers_per_group": 4, "groups": 3}},
        "ours-public-like-task": {"public": {"text": "like_task.txt"}},
        "ours-public-self": {"public": {"text": "self-generated"}},
        "fedpruner": {"method": {"name": "fedpruner"}},
        "fedpruner-once": {"method": {"name": "fedpruner", "reprune_every": 0}},
        "fedpruner+": {"method": {"name": "fedpruner+"}},
        "fedpruner-uniform": {"method": {"name": "fedpruner", "layer_choice": "uniform"}},
        "fedpruner-random": {"method": {"name": "fedpruner", "layer_choice": "random"}},
        "fedpruner-top": {"method": {"name": "fedpruner", "layer_choice": "top"}},
    }


SETS: dict[str, tuple[str, ...]] = {
    "methods": ("ours", "published", "fedbiot", "fedot", "fedpetuning", "exact"),
    "border-map": ("published", "mapped", "published-mapped", "ours", "exact"),
    "ablation": ("neither", "pre-align", "realign", "published"),
    "healing": ("ours", "ours-angular", "ours-aligned", "ours-mapped", "published", "exact"),
    "groups": ("n2-p6", "published", "n4-p3", "ours-n2-p6", "ours", "ours-n4-p3"),
    "codecs": (
        *("ours", "ours-bf16", "ours-klt", "ours-klt-fine"),
        *("ours-bf16-rolora", "ours-klt-rolora"),
    ),
    "public": (
        *("published", "public-like-task", "public-self"),
        *("ours", "ours-public-like-task", "ours-public-self"),
    ),
    "pruning": (
        *("fedpruner", "fedpruner-once", "fedpruner+"),
        *("fedpruner-uniform", "fedpruner-random", "fedpruner-top"),
    ),
}
