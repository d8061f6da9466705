"""The models of a run are judged together: figures for the ledger, samples for people."""

from __future__ import annotations

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_hub.evaluation.evaluator import Evaluator
from fedsoda_hub.evaluation.judge import judge, judged_models
from fedsoda_hub.evaluation.questions import read_questions
from fedsoda_hub.settings.run import RunSettings


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
