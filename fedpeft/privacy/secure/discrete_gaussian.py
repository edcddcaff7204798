"""Gaussian noise on the integers, exactly in law, and what the sum of many clients' noise is worth.

Noise in floating point gives itself away by its gaps, and cannot be summed modulo a power of 2; integer noise has
neither fault. The sum of n discrete Gaussians is not one, but nearly: `concentration` says by how much.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np

from fedpeft.errors import ConfigError, sentence
from fedpeft.privacy.secure.entropy import SYSTEM, Entropy, words

_WORD = 2.0**-64
_ROUNDING = 2.0**-48
"""Relative error allowed for a handful of operations of float64, log and exp among them; each has 2^−51 at most."""

_MOST_VARIANCE = 2**60
_BATCH = 2**18


def discrete_gaussian(variance: float | Fraction, count: int, entropy: Entropy = SYSTEM) -> np.ndarray:
    """So many independent integers, int64, each y with a chance proportional to e^(−y²/(2 `variance`)), exactly.

    Where float64 cannot tell on which side of a bound a uniform number lies, more of its bits are drawn and the bound
    is computed to as many digits as that takes; at a variance of 10⁶ that befalls one in 10¹⁰ draws.

    Raises:
        ConfigError: the variance is not positive, or above 2^60.

    Source: Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", algorithm 3: draws
    from the discrete Laplace distribution, each kept with a chance of e^(−(|y| − σ²/t)²/(2σ²)), t = ⌊σ⌋ + 1. Their
    coin tosses are replaced by uniform numbers of as many bits as each comparison needs.
    """
    exact = Fraction(variance) if math.isfinite(variance) else Fraction(0)
    if not 0 < exact <= _MOST_VARIANCE:
        expected, remedy = "a variance above 0 and up to 2^60", "correct the noise's setting"
        raise ConfigError(sentence("discrete Gaussian", expected=expected, found=str(variance), remedy=remedy))
    parts, left = [np.zeros(0, np.int64)], count
    while left > 0:
        # About three in four are kept where the variance is large, half where it is 1.
        kept = _candidates(exact, min(left + left // 2 + 16, _BATCH), entropy)[:left]
        parts.append(kept)
        left -= len(kept)
    return np.concatenate(parts)


def gap(variance: float, clients: int) -> float:
    """τ, how far in total the sum of so many discrete Gaussians is from being one: 10 Σ e^(−2π²σ²k/(k + 1)).

    Source: Kairouz et al. 2021, "The Distributed Discrete Gaussian Mechanism", theorem 1; for variances from 1/4.
    """
    k = np.arange(1, clients)
    return 10.0 * float(np.exp(-2.0 * math.pi**2 * variance * k / (k + 1)).sum())


def concentration(variance: float, clients: int, norm: float, norm_1: float, size: int) -> float:
    """ρ of the concentrated differential privacy (ρ-zCDP) of a sum of `size` integers with `clients`' noise in it.

    `variance` is that of one client's noise, in squared steps; one client more or less moves the sum of the inputs by
    at most `norm`, and by `norm_1` in sum of magnitudes (see `fixed_point.rounded_norm`). `clients` are those whose
    noise is in the sum and who do not tell the adversary theirs. The Rényi divergence of order α is α ρ at most; see
    `renyi`, which is tighter.

    Raises:
        ConfigError: the variance is below 1/4, where the theorem does not hold.

    Source: Kairouz et al. 2021, theorem 1: ρ = ε²/2 with
    ε² = min(Δ₂²/(nσ²) + 2τd, Δ₂²/(nσ²) + 2τΔ₁/(√n σ) + τ²d, (Δ₂/(√n σ) + τ√d)²).
    """
    return renyi(1.0, variance, clients, norm, norm_1, size)


def renyi(order: float, variance: float, clients: int, norm: float, norm_1: float, size: int) -> float:
    """The Rényi divergence of order `order`, at least 1, of the sums with and without a client; see `concentration`.

    Raises:
        ConfigError: the variance is below 1/4, where the theorem does not hold.

    Source: Kairouz et al. 2021, proposition 14:
    min(αΔ₂²/(2nσ²) + τd, α/2 (Δ₂²/(nσ²) + 2τΔ₁/(√n σ) + τ²d), α/2 (Δ₂/(√n σ) + τ√d)²).
    """
    if variance < 0.25:
        expected, remedy = "a variance of at least 1/4 of a squared step", "take a finer grid or more noise"
        raise ConfigError(sentence("noise of a client", expected=expected, found=f"{variance:g}", remedy=remedy))
    sigma, tau = math.sqrt(clients * variance), gap(variance, clients)
    near = order * norm**2 / (2.0 * sigma**2) + tau * size
    mixed = order / 2.0 * (norm**2 / sigma**2 + 2.0 * tau * norm_1 / sigma + tau**2 * size)
    far = order / 2.0 * (norm / sigma + tau * math.sqrt(size)) ** 2
    return min(near, mixed, far)


def _candidates(variance: Fraction, count: int, entropy: Entropy) -> np.ndarray:
    """Those that are kept of `count` draws from the discrete Laplace distribution, int64."""
    scale = math.isqrt(math.floor(variance)) + 1
    sizes = _magnitudes(scale, words(entropy, count), entropy)
    kept = _kept(sizes, variance, scale, words(entropy, count), entropy)
    negative = (np.frombuffer(entropy(count), np.uint8) & 1).astype(bool)
    # Zero has one sign, or it would come twice as often as it should.
    kept &= (sizes > 0) | ~negative
    found: np.ndarray = np.where(negative, -sizes, sizes)[kept]
    return found


def _magnitudes(scale: int, drawn: np.ndarray, entropy: Entropy, rounding: float = _ROUNDING) -> np.ndarray:
    """⌊−`scale` ln u⌋ for uniform numbers u that begin with the words `drawn`.

    It is m or more with a chance of e^(−m/scale).
    """
    uniform = np.maximum(drawn.astype(np.float64), 1.0)
    found = -scale * np.log(uniform * _WORD)
    error = scale * (2.0 / uniform + rounding) + rounding * found
    least, most = np.floor(found - error), np.floor(found + error)
    sizes = least.astype(np.int64)
    for at in np.flatnonzero((least != most) | (drawn == 0)).tolist():
        sizes[at] = exact_magnitude(scale, int(drawn[at]), entropy)
    return sizes


def _kept(
    sizes: np.ndarray, variance: Fraction, scale: int, drawn: np.ndarray, entropy: Entropy, rounding: float = _ROUNDING
) -> np.ndarray:
    """Whether uniform numbers that begin with the words `drawn` are below e^(−(size − σ²/t)²/(2σ²))."""
    spread = float(variance)
    from_peak = sizes - spread / scale
    error = (sizes + spread / scale) * rounding
    exponent = from_peak**2 / (2.0 * spread)
    doubt = (np.abs(from_peak) + error) * error / spread + exponent * rounding
    least, most = np.exp(-exponent - doubt) * (1.0 - rounding), np.exp(doubt - exponent) * (1.0 + rounding)
    uniform = drawn.astype(np.float64)
    below = (uniform + 1.0) * (_WORD * (1.0 + rounding)) <= least
    above = (uniform * (_WORD * (1.0 - rounding)) >= most) & (drawn > 0)
    for at in np.flatnonzero(~(below | above)).tolist():
        exact = (sizes[at].item() - variance / scale) ** 2 / (2 * variance)
        below[at] = exact_below(exact, int(drawn[at]), entropy)
    return below


def exact_magnitude(scale: int, drawn: int, entropy: Entropy) -> int:
    """⌊−`scale` ln u⌋ for a uniform u that begins with the word `drawn`, however close to an integer that is."""
    bits, number = 64, drawn
    while True:
        bits, number = bits + 64, (number << 64) | int.from_bytes(entropy(8), "little")
        if number:
            with localcontext(prec=bits) as context:
                whole, slack = Decimal(2) ** bits, Decimal(2) ** -bits
                most, least = (-scale * (Decimal(one) / whole).ln(context) for one in (number, number + 1))
                floors = max(math.floor(least - slack), 0), math.floor(most + slack)
            if floors[0] == floors[1]:
                return floors[0]


def exact_below(exponent: Fraction, drawn: int, entropy: Entropy) -> bool:
    """Whether a uniform number that begins with the word `drawn` is below e^(−`exponent`), however close they are."""
    bits, number = 64, drawn
    while True:
        bits, number = bits + 64, (number << 64) | int.from_bytes(entropy(8), "little")
        with localcontext(prec=bits) as context:
            bound = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp(context) * Decimal(2) ** bits
            if number + 2 <= bound:
                return True
            if number >= bound + 1:
                return False
        if not exponent:
            return True
