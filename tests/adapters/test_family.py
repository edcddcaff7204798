import pytest

from fedpeft.adapters import Family, head_only, ia3, lora, prompt_tuning

LORA = lora(rank=2, alpha=4, dropout=0, rank_stabilised=False, target_modules=(), layers=())
IA3 = ia3(target_modules=(), feedforward_modules=())
PROMPT = prompt_tuning(virtual_tokens=3)


@pytest.mark.parametrize(
    ("family", "parameter", "place"),
    [
        (LORA, "base_model.model.bert.q.lora_A.default.weight", ("bert.q", "lora", "A")),
        (LORA, "base_model.model.bert.q.lora_B.default.weight", ("bert.q", "lora", "B")),
        (LORA, "base_model.model.wte.lora_embedding_A.default", ("wte", "lora", "A")),
        (LORA, "base_model.model.classifier.modules_to_save.default.weight", ("classifier", "full", "weight")),
        (
            LORA,
            "base_model.model.classifier.modules_to_save.default.dense.weight",
            ("classifier", "full", "dense.weight"),
        ),
        (IA3, "base_model.model.bert.k.ia3_l.default", ("bert.k", "ia3", "l")),
        (PROMPT, "prompt_encoder.default.embedding.weight", ("prompt_tuning", "prompt", "embedding")),
        (PROMPT, "base_model.classifier.modules_to_save.default.bias", ("classifier", "full", "bias")),
        (head_only(), "classifier.weight", ("classifier", "full", "weight")),
        (head_only(), "classifier.out_proj.bias", ("classifier.out_proj", "full", "bias")),
    ],
)
def test_parameter_is_located(family: Family, parameter: str, place: tuple[str, str, str]) -> None:
    assert family.locate(parameter) == place
