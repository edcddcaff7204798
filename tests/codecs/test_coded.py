"""Laws that every codec keeps, whatever it is put together from, and what it does with what is hostile."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft.adapters import AdapterSpec, ModuleSpec, Tensors, norm
from fedpeft.codecs import Codec, bf16, coded, dense, low_rank, steps, top_k, zstd
from fedpeft.codecs.rounding import MOST
from fedpeft.errors import AdapterError, PacketError
from tests.adapters.test_spec import specs

CODECS: dict[str, Codec] = {
    "everything": coded(),
    "bf16": coded(rounding=bf16()),
    **{
        f"{levels} levels, {rounding}": coded(rounding=steps(levels, 8, rounding))
        for levels in (3, 4, 15, 255)
        for rounding in ("stochastic", "nearest")
    },
    "a tenth": coded(top_k(0.1)),
    "a half": coded(top_k(0.5)),
    "all, as places": coded(top_k(1.0)),
    "rank 1": coded(low_rank(1)),
    "zstd": coded(entropy=zstd(3)),
    "a half in 15 levels, squeezed": coded(top_k(0.5), steps(15, 8, "stochastic"), zstd(3)),
    "rank 1 in 255 levels": coded(low_rank(1), steps(255, 8, "stochastic")),
    "heads in 15 levels": coded(top_k(0.5), steps(3, 8, "nearest"), zstd(3), heads=steps(15, 8, "stochastic")),
    "heads alone": coded(heads=steps(255, 8, "nearest")),
}
NAMES = {id(codec): name for name, codec in CODECS.items()}
every = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
contracting = pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.contracts])
SHAPES = (("A", (3, 20)), ("B", (5, 3)))
SPEC = AdapterSpec(
    "base",
    "lora",
    (ModuleSpec("head", "full", 0, 1.0, (("weight", (4,)),)), ModuleSpec("layer", "lora", 3, 1.0, SHAPES)),
)
LAYER = SPEC.only(["layer.A", "layer.B"])
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


def drawn(spec: AdapterSpec, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {key: random.standard_normal(shape).astype(np.float32) for key, shape in spec.shapes.items()}


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def there_and_back(codec: Codec, tensors: Tensors, spec: AdapterSpec, seed: int = 1) -> Tensors:
    return codec.decode(codec.encode(tensors, spec, generator(seed)), spec)


def lost(one: Tensors, other: Tensors) -> float:
    """The squared length of the difference, in float64."""
    return norm({key: one[key].astype(np.float64) - other[key] for key in one}) ** 2


@every
@given(spec=specs, seed=st.integers(0, 9))
@settings(max_examples=25)
def test_what_comes_back_has_the_shapes_of_what_went(codec: Codec, spec: AdapterSpec, seed: int) -> None:
    tensors = drawn(spec, seed)
    data = codec.encode(tensors, spec, generator())
    assert len(data) <= codec.size(spec)
    found = codec.decode(data, spec)
    spec.require(found, "decoded")
    assert list(found) == list(spec.shapes)
    assert not codec.exact or all(np.array_equal(tensors[key], found[key]) for key in tensors)
    assert all(value.flags.writeable for value in found.values())
    assert codec.encode(tensors, spec, generator()) == data


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith("heads")])
def test_a_head_beside_an_adapter_travels_to_the_bit(name: str) -> None:
    codec = CODECS[name]
    tensors = {key: value * 1e-3 for key, value in drawn(SPEC).items()}
    found = there_and_back(codec, tensors, SPEC)
    assert np.array_equal(found["head.weight"], tensors["head.weight"])
    alone = SPEC.only(["head.weight"])
    head = {"head.weight": tensors["head.weight"]}
    assert codec.exact or lost(head, there_and_back(codec, head, alone)) > 0 or "rank 1" in NAMES[id(codec)]


def test_a_head_alone_is_coded() -> None:
    codec, alone = coded(rounding=steps(15, 64, "nearest")), SPEC.only(["head.weight"])
    # Four digits of half a byte, a step of two bytes, a checksum of four.
    assert codec.size(alone) == 2 + 2 + 4
    # Beside an adapter of 75 numbers: four in float32, two blocks.
    assert codec.size(SPEC) == 4 * 4 + 2 * 2 + 38 + 4


def test_a_head_is_rounded_where_that_is_asked_for() -> None:
    """Four numbers of a head in half a byte each and a step of two bytes, in place of 16 bytes."""
    alone, whole = coded(heads=steps(15, 64, "nearest")), coded()
    assert whole.size(SPEC) - alone.size(SPEC) == 4 * 4 - (2 + 2)
    tensors = drawn(SPEC)
    found = there_and_back(alone, tensors, SPEC)
    assert all(np.array_equal(found[key], tensors[key]) for key in LAYER.shapes)
    step = float(np.abs(tensors["head.weight"]).max()) / 7
    assert 0 < float(np.abs(found["head.weight"] - tensors["head.weight"]).max()) <= 0.51 * step
    assert alone.expands_norm
    assert alone.contracts
    assert not alone.exact
    with pytest.raises(AdapterError, match=r"update to encode, tensor head.weight: expected numbers of at most"):
        alone.encode({**tensors, "head.weight": np.full(4, 2 * MOST, np.float32)}, SPEC, generator())


@every
def test_nothing_and_nothing_but_zeros_come_back(codec: Codec) -> None:
    empty = AdapterSpec("base", "lora", ())
    assert there_and_back(codec, {}, empty) == {}
    zeros = {key: np.zeros(shape, np.float32) for key, shape in SPEC.shapes.items()}
    assert norm(there_and_back(codec, zeros, SPEC)) == 0


@pytest.mark.parametrize("levels", [3, 4, 15, 255])
def test_the_mean_of_many_draws_is_what_was_sent(levels: int) -> None:
    rounding, values, draws = steps(levels, 80, "stochastic"), drawn(LAYER)["layer.A"].ravel(), 2000
    seen = [rounding.decode(rounding.encode(values, generator(seed)), len(values)) for seed in range(draws)]
    # A draw is one of two numbers a step s apart, so the mean of many deviates by s / 2 √draws at most: five of those.
    step = float(np.abs(values).max()) * (1 + 2.0**-7) / ((levels - 1) / 2)
    error = np.abs(np.stack(seen).astype(np.float64).mean(axis=0) - values)
    assert (error <= 5 * step / 2 / math.sqrt(draws)).all()


@pytest.mark.parametrize("levels", [3, 4, 15, 255])
@given(values=hnp.arrays(np.float32, st.integers(1, 40), elements=NUMBERS), seed=st.integers(0, 99))
def test_no_number_moves_by_more_than_a_step(levels: int, values: np.ndarray, seed: int) -> None:
    rounding = {kind: steps(levels, 16, kind) for kind in ("stochastic", "nearest")}
    most = [np.abs(values[at : at + 16]).max() for at in range(0, len(values), 16)]
    step = np.repeat(most, 16)[: len(values)].astype(np.float64) * (1 + 2.0**-7) / ((levels - 1) / 2) + 2.0**-132
    for kind, share in (("stochastic", 1.0), ("nearest", 0.5)):
        found = rounding[kind].decode(rounding[kind].encode(values, generator(seed)), len(values))
        assert (np.abs(found.astype(np.float64) - values) <= share * step * (1 + 1e-6)).all()


@contracting
@given(
    values=hnp.arrays(
        np.float32, LAYER.parameters, elements=st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    )
)
@settings(max_examples=30)
def test_a_codec_that_contracts_loses_less_than_it_is_given(name: str, values: np.ndarray) -> None:
    tensors = {"layer.A": values[:60].reshape(3, 20), "layer.B": values[60:].reshape(5, 3)}
    draws = [lost(tensors, there_and_back(CODECS[name], tensors, LAYER, seed)) for seed in range(20)]
    assert np.mean(draws) <= norm(tensors) ** 2 * (1 - 1e-3) or norm(tensors) == 0


@pytest.mark.parametrize(
    ("levels", "block", "rounding"),
    [(3, 64, "stochastic"), (4, 64, "stochastic"), (4, 64, "nearest"), (15, 512, "stochastic")],
)
def test_a_codec_that_does_not_contract_can_lose_more_than_it_is_given(levels: int, block: int, rounding: str) -> None:
    codec = coded(rounding=steps(levels, block, rounding))
    assert not codec.contracts
    spec = AdapterSpec("base", "lora", (ModuleSpec("layer", "lora", 1, 1.0, (("A", (1, block)),)),))
    # One great number, and others that are least served by the steps.
    half = (levels - 1) / 2
    row = np.full((1, block), 0.0 if levels == 4 else 0.5 / half, np.float32)
    row[0, 0] = 1.0
    draws = [lost({"layer.A": row}, there_and_back(codec, {"layer.A": row}, spec, seed)) for seed in range(20)]
    share = float(np.mean(draws)) / norm({"layer.A": row}) ** 2
    assert share > (1.0 if levels == 4 else 0.7)


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if not codec.expands_norm])
@given(values=hnp.arrays(np.float32, LAYER.parameters, elements=NUMBERS))
def test_what_does_not_expand_norms_never_does(name: str, values: np.ndarray) -> None:
    tensors = {"layer.A": values[:60].reshape(3, 20), "layer.B": values[60:].reshape(5, 3)}
    assert norm(there_and_back(CODECS[name], tensors, LAYER)) <= norm(tensors)


def test_rounding_makes_some_updates_longer_and_says_so() -> None:
    for name in ("15 levels, stochastic", "15 levels, nearest", "bf16"):
        longer = [
            norm(there_and_back(CODECS[name], drawn(LAYER, seed), LAYER)) > norm(drawn(LAYER, seed))
            for seed in range(20)
        ]
        assert any(longer), name
        assert CODECS[name].expands_norm


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * MOST])
def test_numbers_that_cannot_be_coded_are_refused_where_they_arise(codec: Codec, value: float) -> None:
    tensors = drawn(LAYER)
    tensors["layer.B"][1, 1] = value
    with pytest.raises(
        AdapterError, match=r"update to encode, tensor layer\.B: expected .* found .*lower the learning"
    ):
        codec.encode(tensors, LAYER, generator())


@every
@pytest.mark.parametrize("scale", [2.0**-149, 1e-38, 1e-20, 1e20, 2.0**123])
def test_an_enormous_range_stays_finite(codec: Codec, scale: float) -> None:
    tensors = drawn(LAYER)
    tensors["layer.A"][0] *= np.float32(scale)
    LAYER.require(there_and_back(codec, tensors, LAYER), "decoded")


def test_rounding_that_draws_needs_something_to_draw_from() -> None:
    with pytest.raises(ValueError, match="needs a generator"):
        CODECS["15 levels, stochastic"].encode(drawn(LAYER), LAYER)


@every
def test_no_bit_can_be_flipped_unseen(codec: Codec) -> None:
    data = codec.encode(drawn(SPEC), SPEC, generator())
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = codec.decode(bytes(flipped), SPEC)
        except PacketError as error:
            assert "coded payload" in str(error)  # noqa: PT017
        else:  # a bit of a frame's header that says nothing of its contents
            sound = codec.decode(data, SPEC)
            assert codec.size(SPEC) > len(data)
            assert all(np.array_equal(found[key], sound[key]) for key in sound)


@every
def test_a_payload_that_is_cut_or_goes_on_is_refused(codec: Codec) -> None:
    data = codec.encode(drawn(SPEC), SPEC, generator())
    for odd in (*(data[:size] for size in range(len(data))), data + b"\0", data + data, bytes(len(data))):
        with pytest.raises(PacketError, match=r"coded payload: expected .*, found .*; .*"):
            codec.decode(odd, SPEC)


@every
@given(data=st.data())
@settings(max_examples=60)
def test_noise_under_a_true_checksum_is_finite_numbers_or_refused(codec: Codec, data: st.DataObject) -> None:
    length = codec.size(SPEC) - 4
    noise = data.draw(st.binary(min_size=length, max_size=length))
    body = noise + zlib.crc32(noise).to_bytes(4, "little")
    if NAMES[id(codec)] in ("zstd", "a half in 15 levels, squeezed"):
        inner = noise[1:]
        body = b"\0" + inner + zlib.crc32(inner).to_bytes(4, "little")
    try:
        found = codec.decode(body, SPEC)
    except PacketError as error:
        assert "coded payload" in str(error)  # noqa: PT017
    else:
        SPEC.require(found, "decoded")


@every
@pytest.mark.parametrize("more", [-1, 1, 4])
def test_a_payload_of_another_length_is_refused_whatever_its_checksum(codec: Codec, more: int) -> None:
    squeezing = NAMES[id(codec)] in ("zstd", "a half in 15 levels, squeezed")
    noise = bytes(codec.size(SPEC) - 4 - squeezing + more)
    with pytest.raises(PacketError, match=r"coded payload: expected \d+ bytes"):
        codec.decode(b"\0" * squeezing + noise + zlib.crc32(noise).to_bytes(4, "little"), SPEC)


def frames(raw: bytes) -> dict[str, bytes]:
    """What a hostile client may send in place of a frame that holds `raw`."""
    squeezed = zstandard.ZstdCompressor().compress(raw)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    long = zstandard.ZstdCompressor().compress(bytes(2**24))
    header = bytearray(zstandard.ZstdCompressor().compress(bytes(2**33 // 2**20)))
    # A header of single segment with eight bytes for the size says that a terabyte follows.
    terabyte = bytes(header[:4]) + b"\xe0" + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"
    skipped = (0x184D2A50).to_bytes(4, "little") + len(raw).to_bytes(4, "little") + raw
    lying = bytes(header[:4]) + b"\xe0" + len(raw).to_bytes(8, "little") + long[9:]
    return {
        "no length": silent,
        "sixteen megabytes": long,
        "a terabyte": terabyte,
        "a frame to skip": skipped,
        "a true length before a bomb": lying,
        "two frames": squeezed + squeezed,
        "cut": squeezed[:-3],
        "nothing": b"",
        "no frame": b"\x28\xb5\x2f",
    }


@pytest.mark.parametrize("name", list(frames(b"")))
def test_a_frame_that_claims_or_holds_something_else_is_refused(name: str) -> None:
    codec = CODECS["zstd"]
    raw = b"\0" * (codec.size(SPEC) - 1)
    with pytest.raises(PacketError, match=r"coded payload: expected a frame of \d+ bytes, found one"):
        codec.decode(b"\x01" + frames(raw)[name], SPEC)


def test_a_frame_is_used_only_where_it_is_shorter() -> None:
    codec, zeros = CODECS["zstd"], {key: np.zeros(shape, np.float32) for key, shape in SPEC.shapes.items()}
    assert len(codec.encode(zeros, SPEC)) < 40
    assert len(codec.encode(drawn(SPEC), SPEC)) <= codec.size(SPEC) == 4 * SPEC.parameters + 5


def test_traits_say_what_a_codec_does() -> None:
    exact = {name for name, codec in CODECS.items() if codec.exact}
    assert exact == {"everything", "all, as places", "zstd"}
    assert not any(codec.additive for codec in CODECS.values())
    assert dense().additive
    assert dense().exact
    assert not dense().expands_norm
    assert coded(top_k(0.5), remembers=True).expands_norm
