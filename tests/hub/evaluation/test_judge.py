"""The models of a run are judged together: figures for the ledger, samples for people."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_hub.evaluation.evaluator import Evaluator
from fedsoda_hub.evaluation.judge import check_evaluation, evaluate_path, judge, judged_models
from fedsoda_hub.evaluation.questions import read_questions
from fedsoda_hub.settings.run import RunSettings
from tests.hub.evaluation.test_conversations import CHAT, TALKS
from tests.hub.runs import finish, make_run, prepare


def test_samples_show_what_each_model_answers(prepared: RunSettings) -> None:
    bundle, source = Bundle.open(prepared.run_dir / "bundle"), Checkpoint.open(prepared.model)
    models = judged_models(bundle, source, bundle.adapter_lora(), bundle.emulator_lora())
    tokenizer = SampleTokenizer(source.path / "tokenizer.json", 2)
    assert prepared.eval_data is not None
    for shots in (0, 2):
        questions = read_questions(prepared.eval_data, prepared.prompt, prepared.completion, shots)
        assert questions[0].prompt.count("Say ") == 1 + shots
        judgement = judge(Evaluator(questions, tokenizer), models)
        samples = judgement.samples(2)
        assert [set(sample) for sample in samples] == [{"prompt", "completion", "full", "sub_llm", "plug_in"}] * 2
        assert {sample["full"] for sample in samples} <= {"yes", "no"}
        assert [sample["prompt"] for sample in samples] == ["Say the:", "Say cat:"]  # read without their examples
        assert judgement.samples(0) == ()


def test_a_run_judges_conversations(tiny_llama: Path, tmp_path: Path) -> None:
    """Before its rounds, after them, and by a file that is given later."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    settings = make_run(tmp_path, model)
    assert settings.eval_data is not None
    settings.eval_data.write_text("".join(json.dumps(row) + "\n" for row in TALKS))
    check_evaluation(settings)
    result = prepare(settings)
    finish(settings, result.master, result.sub_llms[0].emulator_view)
    found = evaluate_path(Path(settings.path), settings.eval_data, samples=2)
    assert found.num_examples == len(TALKS)
    assert set(found.right_shares) == {"left", "right", "up"}
    assert set(found.accuracy) == set(found.loss) == {"full", "sub_llm", "plug_in"}
    assert all(loss is not None and loss > 0 for loss in found.loss.values())
    assert found.samples[0]["completion"] == "left"
