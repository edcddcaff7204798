"""What a run's settings may ask of any node, judged before anything is read, loaded or allocated for them.

A server may send any settings that parse. Here is what a node refuses all the same: sizes that would fill its memory
before they could be measured, patterns that take for ever to match, and settings of peft's own that load code, take
files, or take regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.config.adapters.common import read_options
from fedpeft.config.fields import walk
from fedpeft.config.node import NodeConfig
from fedpeft.errors import PacketError, sentence

MOST: Mapping[str, int] = {
    "accumulation": 4096,
    "batch_size": 4096,
    "block_size": 8192,
    "default": 8192,
    "factors": 64,
    "frequencies": 2**20,
    "group_size": 8192,
    "hidden": 8192,
    "image_size": 2048,
    "max_target_tokens": 2**17,
    "max_tokens": 2**17,
    "numbers": 2**20,
    "rank": 8192,
    "ranks": 8192,
    "sample_tokens": 2**17,
    "size": 8192,
    "steps": 10**6,
    "threads": 1024,
    "virtual_tokens": 8192,
}
"""The greatest value of a setting, by the last part of its key, that a node considers at all."""

MOST_OTHER, MOST_TEXT, MOST_ITEMS, MOST_OPTION = 2**31, 4096, 16384, 8192
"""The greatest other whole number, the longest text, the longest list, the greatest number in `options`."""

_SEEDS = re.compile(r"(.*_)?(seed|key)")
_TEXT_OPTIONS = re.compile(r"init_\w+|bias|act_fn|variant|wavelet_family")
_WORD = re.compile(r"[\w-]{0,64}")
_PATTERN = re.compile(r"[\w.\-|\\]*([*][\w.\-|\\]*){0,3}")
_REVISION = re.compile(r"(?!.*\.\.)([A-Za-z0-9][\w./-]*)?")


def require_admissible(config: RunConfig, node: NodeConfig) -> None:
    """Nothing in `config` is beyond what `node` considers.

    Raises:
        PacketError: a setting is.
    """
    for key, value in walk(config):
        _require_size(key, value)
        last = key.rpartition(".")[2]
        if last in _CHECKS:
            for item in value:
                _CHECKS[last](key, item)
    _require(
        _REVISION.fullmatch(config.model.revision) is not None,
        "model.revision",
        "a branch, tag or commit",
        config.model.revision,
    )
    if node.limits.tokens:
        for key in ("max_tokens", "max_target_tokens"):
            asked = getattr(config.task.chosen, key, 0)
            _require(
                asked <= node.limits.tokens,
                f"task.{config.task.name}.{key}",
                f"at most {node.limits.tokens}, this node's limits.tokens",
                asked,
            )


def _require_size(key: str, value: Any) -> None:
    """Raises PacketError for a number, text or list that is too great; seeds may be any number."""
    items, last = value if isinstance(value, tuple) else (value,), key.rpartition(".")[2]
    _require(len(items) <= MOST_ITEMS, key, f"at most {MOST_ITEMS} items", len(items))
    for item in items:
        if isinstance(item, str):
            _require(len(item) <= MOST_TEXT, key, f"at most {MOST_TEXT} characters", len(item))
        elif isinstance(item, int) and not _SEEDS.fullmatch(last):
            most = MOST.get(last, MOST_OTHER)
            _require(abs(item) <= most, key, f"at most {most}", item)


def _require_option(key: str, option: str) -> None:
    """Raises PacketError for a setting of peft's that is no switch and no number, nor a word where peft wants one."""
    for name, value in read_options((option,)).items():
        if isinstance(value, str):
            _require(
                _TEXT_OPTIONS.fullmatch(name) is not None and _WORD.fullmatch(value) is not None,
                key,
                "numbers and switches, and words for how a method begins",
                option,
            )
        else:
            plain = value is None or isinstance(value, bool | int | float)
            _require(plain, key, "numbers and switches, no lists and tables", option)
            small = not isinstance(value, int | float) or _SEEDS.fullmatch(name) or abs(value) <= MOST_OPTION
            _require(bool(small), key, f"numbers of at most {MOST_OPTION}", option)


def _require_pattern(key: str, item: str) -> None:
    """Raises PacketError for a pattern of module paths that may take for ever to match, or a number too great."""
    pattern, _, number = item.rpartition("=")
    _require(
        _PATTERN.fullmatch(pattern.strip()) is not None,
        key,
        "patterns of letters, digits, dots, | and at most three *",
        pattern.strip(),
    )
    _require(float(number) <= MOST_OPTION, key, f"numbers of at most {MOST_OPTION}", number.strip())


_CHECKS = {"options": _require_option, "rank_pattern": _require_pattern, "alpha_pattern": _require_pattern}
"""Settings whose items are looked into, by the last part of their key."""


def _require(holds: bool, place: str, expected: str, found: object) -> None:
    if not holds:
        shown = json.dumps(found)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise PacketError(
            sentence(place, expected=expected, found=shown, remedy="change the run's settings, or leave this node out")
        )
