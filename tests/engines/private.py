"""Private runs of the shrunk demo that repeat to the bit, whatever carries them."""

from __future__ import annotations

DENSE = ("aggregation.codec.kind=dense", "aggregation.downlink.kind=dense")
"""Under masks only numbers that add up can travel."""

RULE = ("aggregation.merge.rule=ffa_lora", "aggregation.merge.ffa_lora.weights=uniform")

CENTRAL = (
    *RULE,
    "privacy.mechanism=central",
    "privacy.central.noise_multiplier=0.8",
    "privacy.central.clip_norm=0.5",
    "privacy.central.entropy=seed",
)
"""Noise of the server's, from the run's seed."""

SUMS = (*RULE, *DENSE, "federation.channel.kind=secure")
"""Masks are secret and fall out of the sum; what rounds the numbers under them comes from the run's seed."""

PRODUCTS = (
    *DENSE,
    "aggregation.merge.rule=flexlora",
    "aggregation.merge.flexlora.weights=uniform",
    "federation.channel.kind=secure",
)
"""Two sums a round, of sketches and of products."""

EXAMPLE = ("privacy.mechanism=example", "privacy.example.noise_multiplier=1.5", "privacy.example.entropy=seed")
"""Noise in each step of each client's training, from the run's seed."""

LOCAL = (
    "privacy.mechanism=local",
    "privacy.local.noise_multiplier=2",
    "privacy.local.clip_norm=0.01",
    "privacy.local.delta=1e-5",
)
"""Noise of each client's own, which is the operating system's: no two such runs are alike."""
