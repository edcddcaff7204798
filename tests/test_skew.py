from __future__ import annotations

from dataclasses import replace

import pytest

from fedpeft.skew import LIBRARIES, Installation, installed, refusal, remark, said_in
from fedpeft.version import VERSION

VERSIONS = {"flwr": "1.41.0", "peft": "0.21.2", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
SERVER = Installation("0.1.0", VERSIONS, "b" * 64, "a" * 64)


def node(*, base: str = SERVER.base, adapter: str = SERVER.adapter, **libraries: str) -> Installation:
    return Installation("0.1.0", {**VERSIONS, **libraries}, base, adapter)


def test_a_process_knows_what_it_has_itself() -> None:
    assert set(installed()) == set(LIBRARIES)
    assert Installation().fedpeft == VERSION
    assert said_in(Installation(base="b1", adapter="a1").fields) == Installation(base="b1", adapter="a1")


@pytest.mark.parametrize(
    "found",
    [
        SERVER,
        node(torch="2.13.0+cu128"),
        node(base="", adapter=""),
        Installation("0.1.0", {}),
    ],
)
def test_a_node_that_has_the_same_or_does_not_say_is_let_in_without_a_word(found: Installation) -> None:
    assert refusal(SERVER, found, "asset:minilm") == ""
    assert remark(SERVER, found) == ""


@pytest.mark.parametrize(
    ("found", "model", "expected"),
    [
        (
            replace(node(), fedpeft="0.0.9"),
            "asset:minilm",
            "fedpeft: expected 0.1.0, found 0.0.9; install the same version on the node: pip install 'fedpeft==0.1.0'.",
        ),
        (
            replace(node(), fedpeft=""),
            "asset:minilm",
            "fedpeft: expected 0.1.0, found no version; "
            "install the same version on the node: pip install 'fedpeft==0.1.0'.",
        ),
        (
            node(peft="0.20.1"),
            "asset:minilm",
            "libraries of the node: expected peft 0.21, found peft 0.20.1; run there: pip install 'peft==0.21.2'.",
        ),
        (
            node(torch="2.12.0", transformers="6.0.0"),
            "asset:minilm",
            "libraries of the node: expected torch 2.13, transformers 5.23, found torch 2.12.0, transformers 6.0.0; "
            "run there: pip install 'torch==2.13.0' 'transformers==5.23.0'.",
        ),
        (
            node(base="c" * 64),
            "asset:minilm",
            "base model of the node: expected that of asset:minilm, digest bbbbbbbbbbbb, found digest cccccccccccc; "
            "take its own out of the cache there (FEDPEFT_HOME) and run: fedpeft assets fetch minilm.",
        ),
        (
            node(base="c" * 64),
            "maker/model@v2",
            "base model of the node: expected that of maker/model@v2, digest bbbbbbbbbbbb, found digest cccccccccccc; "
            "copy the server's folder of it to the node and name that as model.folder in the node's file, "
            "or fetch that revision.",
        ),
        (
            node(adapter="c" * 64, peft="0.21.1"),
            "asset:minilm",
            "adapter on the node's base: expected digest aaaaaaaaaaaa, found digest cccccccccccc; "
            "run there: pip install 'peft==0.21.2'.",
        ),
        (
            node(adapter="c" * 64),
            "asset:minilm",
            "adapter on the node's base: expected digest aaaaaaaaaaaa, found digest cccccccccccc; "
            "install fedpeft there from where the server has it, and copy the server's base with its config.json.",
        ),
    ],
)
def test_a_node_that_has_something_else_is_told_what_to_install(found: Installation, model: str, expected: str) -> None:
    assert refusal(SERVER, found, model) == expected


def test_another_patch_release_is_a_remark() -> None:
    found = node(transformers="5.23.1", peft="0.21.0")
    assert refusal(SERVER, found, "asset:minilm") == ""
    assert remark(SERVER, found) == (
        "libraries of the node: expected peft 0.21.2, transformers 5.23.0, found peft 0.21.0, transformers 5.23.1; "
        "run there: pip install 'peft==0.21.2' 'transformers==5.23.0'."
    )


@pytest.mark.parametrize(
    "value", [7, True, 1.5, "", "0.21.2\n", "a b", "1" * 65, "0.21;rm", "Ada.Lovelace", "\uff10.21"]
)
def test_what_looks_like_no_version_and_no_digest_is_not_known(value: object) -> None:
    found = said_in({"version": value, "library.peft": value, "base": value, "adapter": value, "library.more": "1"})
    assert found == Installation("", {}, "", "")
