import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from fedpeft.bases import load_tokenizer
from fedpeft.config import RunConfig, override
from fedpeft.config.tasks import TokenClassification
from fedpeft.config.training import ModelConfig
from fedpeft.data.fields import Row
from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks import IGNORED, Example, build_task, with_labels
from fedpeft.tasks.token_classification import collate, encode, figures, score

NAMES = ("O", "B-a", "I-a")
SETTINGS = TokenClassification(labels=NAMES, max_tokens=8)
CPU = torch.device("cpu")


def row(words: str, tags: str) -> Row:
    return Row(words, fields={"words": tuple(words.split()), "tags": tuple(tags.split())})


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelConfig(source=str(tiny_model)))


def test_a_word_has_its_tag_on_its_first_piece_alone(tokenizer: Any) -> None:
    (found,) = encode([row("good-film news", "B-a O")], tokenizer, SETTINGS, "here")
    assert tokenizer.convert_ids_to_tokens(list(found.tokens)) == ["[CLS]", "good", "[UNK]", "film", "news", "[SEP]"]
    assert found.label == (IGNORED, 1, IGNORED, IGNORED, 0, IGNORED)


def test_pieces_are_those_of_the_sentence_where_a_space_is_part_of_a_piece() -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    (found,) = encode([row("é b", "B-a I-a")], bytes_alone, SETTINGS, "here")
    # Two bytes of é, a space, and b.
    assert found.label == (1, IGNORED, IGNORED, 2)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("so so", "O"), "here, row 2: expected words, and as many tags, found 2 words and 1 tags"),
        (row("", ""), "found 0 words and 0 tags"),
        (Row("so"), "found 0 words and 0 tags"),
        (row("so", "B-b"), "here, row 2: expected tags among O, B-a, I-a, found 'B-b'"),
        (row("so " * 7, "O " * 7), "here, row 2: expected words of at most 8 tokens, .* found 9; .*max_tokens"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_sentence(bad: Row, said: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=said):
        encode([row("so", "O"), bad], tokenizer, SETTINGS, "here")


def test_labels_are_both_tags_of_each_kind_and_the_one_outside() -> None:
    rows = [row("a b", "B-z O"), row("a", "I-m")]
    filled = with_labels(TokenClassification(), rows)
    assert filled == TokenClassification(labels=("O", "B-m", "I-m", "B-z", "I-z"))
    assert with_labels(SETTINGS, rows) is SETTINGS
    assert build_task(filled).labels == filled.labels  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="the training rows: expected tags among O, B-KIND, I-KIND, found 'NOUN'"):
        with_labels(TokenClassification(), [row("a", "NOUN")])
    with pytest.raises(ConfigError, match=r"task.token_classification.labels: expected O, B-KIND and I-KIND"):
        override(RunConfig(), ["task.token_classification.labels=O,NOUN"])


class Fixed(torch.nn.Module):
    """Answers every batch with the same labels, with a logit of ln 3 against 0 elsewhere, after a virtual token."""

    def __init__(self, guesses: list[list[int]]) -> None:
        super().__init__()
        spoken = torch.tensor([[0, *guess] for guess in guesses])
        self.fixed = math.log(3) * torch.nn.functional.one_hot(spoken, len(NAMES)).float()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        return type("Output", (), {"logits": self.fixed})


def test_score_and_figures_by_hand() -> None:
    examples = [
        Example((2, 5, 6, 7, 3), (IGNORED, 1, 2, 0, IGNORED), "x"),
        Example((2, 8, 3), (IGNORED, 1, IGNORED), ""),
    ]
    batch = collate(examples, 0, CPU)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist()[1] == [IGNORED, 1, IGNORED, IGNORED, IGNORED]
    # The first entity is found too short, and a word outside is taken for one; the second is right.
    found = score(Fixed([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]), batch, NAMES)
    assert {key: value.tolist() for key, value in found.items() if key != "loss"} == {
        "tokens": [3, 1], "hits": [1, 1], "true": [1, 1], "guessed": [2, 1], "matched": [0, 1]
    }  # fmt: skip
    # Softmax of (ln 3, 0, 0) is (3/5, 1/5, 1/5).
    assert found["loss"].tolist() == pytest.approx([math.log(5 / 3) + 2 * math.log(5), math.log(5 / 3)], rel=1e-6)
    told = figures(found)
    assert (told["accuracy"], told["entity_f1"], told["rows"]) == (0.5, pytest.approx(2 * 1 / (2 + 3)), 2)
    assert told["loss"] == pytest.approx((2 * math.log(5 / 3) + 2 * math.log(5)) / 4, rel=1e-6)


def test_nothing_to_find_and_nothing_found_is_all_right() -> None:
    nothing = {key: np.array([0]) for key in ("true", "guessed", "matched", "hits")}
    assert figures({**nothing, "loss": np.array([1.0]), "tokens": np.array([2])})["entity_f1"] == 1.0
