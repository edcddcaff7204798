"""Codecs as settings: parts by name, joined with +."""

from dataclasses import replace

import pytest

from fedpeft.codecs import Codec
from fedpeft.config import RunConfig, choose
from fedpeft.config.aggregation import AggregationConfig
from fedpeft.config.codecs import CODECS, Int4, TopK
from fedpeft.errors import PlanError
from fedpeft.experiment import strategy_of
from tests.config.test_parse import refusal
from tests.toys import WIDE


def made(kind: str, **members: object) -> Codec:
    codec: Codec = choose(CODECS, kind, **members).chosen.build()
    return codec


def test_parts_make_one_codec_in_any_order() -> None:
    # WIDE: a head of 1, and 104 numbers, a half of which is 52: 13 bytes of places, 26 of digits, a step, a checksum.
    joined = {made(kind, top_k=TopK(0.5)).size(WIDE) for kind in ("top_k+int4", "int4+top_k", "dense+int4 + top_k")}
    assert joined == {4 + 13 + 26 + 2 + 4}
    assert made("top_k+int4+zstd", top_k=TopK(0.5)).size(WIDE) == joined.pop() + 1
    assert made("int4", int4=Int4(block=8)).size(WIDE) == 4 + 13 * 2 + 52 + 4


def test_every_part_alone_is_a_codec() -> None:
    sizes = {name: made(name).size(WIDE) for name in CODECS.members}
    assert sizes["ternary"] < sizes["int2"] < sizes["int4"] < sizes["int8"] < sizes["bf16"] < sizes["dense"] == 420
    assert made("dense").additive
    assert made("error_feedback").remembers


@pytest.mark.parametrize(("kind", "part"), [("int8+int4", "rounding"), ("top_k+low_rank", "reduction")])
def test_two_that_decide_the_same_are_refused(kind: str, part: str) -> None:
    with pytest.raises(PlanError, match=rf"aggregation\.codec\.kind, .*: expected one {part} at most, found two"):
        made(kind)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("aggregation.codec.int4.block=0", "aggregation.codec.int4.block: expected a number between 1 and 65536"),
        ("aggregation.codec.int4.rounding=up", "aggregation.codec.int4.rounding: expected one of stochastic, nearest"),
        (
            "aggregation.codec.top_k.share=0",
            "aggregation.codec.top_k.share: expected a number above 0 and of at most 1",
        ),
        ("aggregation.codec.low_rank.rank=0", "aggregation.codec.low_rank.rank: expected a number at least 1"),
        ("aggregation.codec.zstd.level=20", "aggregation.codec.zstd.level: expected a number between 1 and 19"),
        ("aggregation.codec.kind=gzip", "aggregation.codec.kind: expected one of dense, bf16"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, words: str) -> None:
    assert refusal(setting).startswith(words)


def test_a_run_draws_its_rounding_from_its_seed() -> None:
    aggregation = AggregationConfig(codec=choose(CODECS, "int4"))
    config = replace(RunConfig(), seed=11, aggregation=aggregation)
    assert strategy_of(config).seed == 11
    assert not strategy_of(config).codec.exact
