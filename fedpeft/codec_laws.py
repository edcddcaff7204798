"""The laws of codecs: what may travel in fewer bits, up and down, and what cannot."""

from __future__ import annotations

from fedpeft.adapters import greatest_rank
from fedpeft.plans import Plan


def summed(plan: Plan) -> str:
    """Under masks only numbers that add up can travel."""
    if plan.channel is None or plan.codec.additive:
        return ""
    return (
        "aggregation.codec.kind: expected dense, because under masks only numbers that add up can travel, "
        'found a codec whose bytes do not; set aggregation.codec.kind = "dense", or federation.channel.kind = "plain".'
    )


def growing(plan: Plan) -> str:
    """What a codec lost comes back, so it must lose less than it is given."""
    if not plan.codec.remembers or plan.codec.contracts:
        return ""
    return (
        "aggregation.codec.kind: expected a codec that loses less than it is given, because what error feedback brings "
        "back would grow from round to round, found one that may lose more; choose finer steps, smaller blocks or "
        'rounding = "nearest", or drop error_feedback.'
    )


def moving(plan: Plan) -> str:
    """What was lost must mean the same a round later."""
    if not plan.codec.remembers or plan.method.merge.gauge == "kept":
        return ""
    return (
        "aggregation.codec.kind: expected a codec without error_feedback, because what was lost of one round's factors "
        "means nothing to the new ones that the rule in aggregation.merge makes, found error_feedback; drop it, or "
        "choose fedavg."
    )


def down(plan: Plan) -> str:
    """Deltas go down only where every node trains from the same adapter, and the merge only adds to it."""
    if plan.downlink.additive:
        return ""
    odd = next(
        (
            f"{found}; {remedy}"
            for holds, found, remedy in (
                (not plan.method.merge.mean, "a rule that makes more of updates than their mean", "choose fedavg"),
                (bool(plan.channel), "secure sums", 'set federation.channel.kind = "plain"'),
                (bool(plan.method.pruning), "nodes that lower their rank", "choose a rule without pruning"),
                (not plan.ranks <= {greatest_rank(plan.spec)}, "nodes of unlike rank", "choose equal ranks"),
                (plan.stage.turns > 1, "layers that take turns", "set aggregation.stages.turns=1"),
                (plan.downlink.remembers, "error_feedback, which a delta is without it", "drop it"),
                (
                    not plan.downlink.contracts,
                    "one that may lose more than it is given",
                    'choose finer steps, smaller blocks or rounding = "nearest"',
                ),
            )
            if holds
        ),
        "",
    )
    if not odd:
        return ""
    return (
        "aggregation.downlink.kind: expected a codec that contracts, and a plan in which a delta from what all nodes "
        f'have is enough, found {odd}, or set aggregation.downlink.kind = "dense".'
    )
