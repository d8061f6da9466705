"""RUN.toml files for tests of the settings."""

from __future__ import annotations

from pathlib import Path

from fedsoda_hub.settings.run import RunSettings, read_settings

# Every key that docs/guide.md (g2-run) shows, with its default where it has one.
WRITTEN = """
name = "triage"
model = "path-or-hub-id"
seed = 0
device = "auto"
dtype = "bfloat16"
[method]
name = "fedsoda"
emulator = "sub"
adapter_layers = 3
layers_per_group = 3
groups = 4
realign_every = 0
adapter_base = "nf4"
[lora]
rank = 8
alpha = 16
targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
[public]
text = "public.txt"
sequences = 128
length = 512
[align]
steps = 0
realign_steps = 30
learning_rate = 1e-4
representation_weight = 1.0
kl_weight = 1.0
[rounds]
count = 20
min_edges = 1
cohort = 10
quorum = 0.8
deadline_seconds = 3600
[local]
epochs = 1
max_steps = 0
batch_size = 8
learning_rate = 1e-4
weight_decay = 0.01
max_grad_norm = 1.0
proximal_mu = 0.01
max_length = 512
[wire]
codec = "nf4"
stall_seconds = 60
[task]
prompt = "Review: {sentence}\\nSentiment:"
completion = "{label}"
choices = "auto"
shots = 0
eval_data = "eval.jsonl"
[listen]
host = "127.0.0.1"
port = 8470
"""
SHORT = 'name = "triage"\nmodel = "m"\n[public]\ntext = "public.txt"\n'
FULL = SHORT + '[method]\nemulator = "full"\n'


def read(folder: Path, text: str) -> RunSettings:
    path = folder / "run.toml"
    path.write_text(text)
    return read_settings(path)
