import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.tasks import SequenceClassification
from fedpeft.data.rows import Row
from fedpeft.errors import DataError
from fedpeft.tasks import Example, Statistics, build_task, with_labels
from fedpeft.tasks.sequence_classification import collate, encode, figures, loss, score
from tests import tiny

SETTINGS = SequenceClassification(labels=("no", "maybe", "yes"), max_tokens=8)
CPU = torch.device("cpu")


class Fixed(torch.nn.Module):
    """Answers every batch with the same logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.fixed = torch.tensor(logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        return type("Output", (), {"logits": self.fixed})


def test_rows_become_tokens_labels_and_groups(tiny_model: Path) -> None:
    tokenizer = tiny.load(tiny_model).tokenizer
    rows = [Row("good film", "yes", "films"), Row("", "no"), Row("so " * 40, "maybe", "shops")]
    found = encode(rows, tokenizer, SETTINGS, "here")
    assert [(example.label, example.group) for example in found] == [(2, "films"), (0, ""), (1, "shops")]
    assert [len(example.tokens) for example in found] == [4, 2, 8]
    assert encode([], tokenizer, SETTINGS, "here") == ()


def test_tokens_are_cut_at_what_the_tokenizer_allows_too(tiny_model: Path) -> None:
    tokenizer = tiny.load(tiny_model).tokenizer
    settings = SequenceClassification(labels=("no", "yes"), max_tokens=500)
    assert len(encode([Row("so " * 99, "no")], tokenizer, settings, "here")[0].tokens) == 32


def test_an_unknown_label_is_one_sentence(tiny_model: Path) -> None:
    tokenizer = tiny.load(tiny_model).tokenizer
    rows = [Row("a", "yes"), Row("b", "YES")]
    with pytest.raises(DataError, match="here, row 2: expected one of the labels no, maybe, yes, found 'YES'"):
        encode(rows, tokenizer, SETTINGS, "here")


def test_a_batch_is_padded_to_its_longest_text() -> None:
    batch = collate([Example((5, 6, 7), 2, ""), Example((8,), 0, "x")], pad=9, device=CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_loss_and_score_by_hand() -> None:
    # Softmax of (0, ln 3) is (1/4, 3/4).
    model = Fixed([[0.0, math.log(3)], [0.0, math.log(3)]])
    batch = collate([Example((1,), 1, ""), Example((1,), 0, "")], 0, CPU)
    found = score(model, batch)
    assert found["loss"].tolist() == pytest.approx([math.log(4 / 3), math.log(4)], rel=1e-6)
    assert found["predicted"].tolist() == [1, 1]
    assert found["label"].tolist() == [1, 0]
    assert float(loss(model, batch)) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-6)


def measured(losses: list[float], predicted: np.ndarray | list[int], labels: np.ndarray | list[int]) -> Statistics:
    return {"loss": np.array(losses), "predicted": np.array(predicted), "label": np.array(labels)}


def test_figures_by_hand() -> None:
    # Class 0: 1 hit of 2 true and 1 guessed, F1 = 2/3; class 1: 1 hit of 1 true and 2 guessed, 2/3; class 2: never.
    found = figures(measured([1.0, 2.0, 3.0], [0, 1, 1], [0, 0, 1]), 3)
    assert found == {"loss": 2.0, "accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(2 / 3), "rows": 3}
    wrong = figures(measured([1.0], [1], [0]), 3)
    assert (wrong["accuracy"], wrong["macro_f1"]) == (0.0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_figures_are_between_nothing_and_all(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    found = figures(measured([0.0] * len(pairs), predicted, labels), 4)
    assert 0 <= found["macro_f1"] <= 1
    assert found["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert (found["accuracy"] == 1) == (found["macro_f1"] == 1)


def test_labels_are_those_of_the_settings_or_else_of_the_rows() -> None:
    rows = [Row("a", "z"), Row("b", "m"), Row("c", "z")]
    assert with_labels(SETTINGS, rows) is SETTINGS
    filled = with_labels(SequenceClassification(), rows)
    assert filled == SequenceClassification(labels=("m", "z"))
    assert build_task(filled).labels == ("m", "z")


def test_there_is_no_task_for_anything_else() -> None:
    with pytest.raises(TypeError, match="no task for settings of type str"):
        build_task("text")
    with pytest.raises(TypeError, match="no task for settings of type str"):
        with_labels("text", [])
