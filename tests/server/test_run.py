from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.errors import ConfigError
from server.run import last_words, main

FULL = "round-000002.safetensors: expected room for 9 bytes, found No space left on device; free disk space."
FLOWER = f"""Using SuperLink: lab (127.0.0.1:59173)
\x1b[92mINFO \x1b[0m:      Start `flwr-serverapp` process
warning: round 1: the node of partition 1 failed: another reason, an error
\x1b[91mERROR \x1b[0m:     ServerApp raised an exception: {FULL}
\x1b[91mERROR \x1b[0m:     Exit Code: 201

An unhandled exception occurred in the ServerApp.

For more information, visit: <https://flower.ai/docs/framework/1.41/en/ref-exit-codes/201.html>
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (FLOWER, FULL),
        ("INFO: fine\nConnectionError: nobody there\n", "ConnectionError: nobody there"),
        ("INFO: fine\n", "nothing in its log"),
        ("", "nothing in its log"),
        (f"ServerApp raised an exception: {'x' * 10_000}", "x" * 500),
    ],
)
def test_the_reason_of_an_end_is_the_sentence_of_the_exception(log: str, words: str) -> None:
    assert last_words(log) == words


def test_a_setting_that_flower_does_not_pass_on_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set: expected no double quotes.*; write a list as a,b"):
        main("simulations/demo.toml", tmp_path / "out", ['adapter.lora.target_modules=["query"]'])
