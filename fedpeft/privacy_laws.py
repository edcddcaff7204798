"""The laws of privacy: what goes with noise, and what goes with sums alone."""

from __future__ import annotations

from fedpeft.adapters import greatest_rank, low_rank_modules
from fedpeft.merges import WEIGHTS
from fedpeft.plans import Plan
from fedpeft.privacy import EXAMPLE


def private_sum(plan: Plan) -> str:
    """What noise is added to must be a plain sum of clipped updates."""
    odd = _no_plain_sum(plan) if plan.mechanism and plan.mechanism.sums else ""
    if not odd:
        return ""
    return (
        "privacy.mechanism: expected a plan in which every client's part in what is released is one clipped update of "
        f"equal weight, found {odd}"
    )


def secure_sum(plan: Plan) -> str:
    """What the server needs must be in sums."""
    if plan.channel is None:
        return ""
    sketched = plan.method.sketch is not None
    odd = _no_plain_sum(plan, sketched=sketched) or (_no_sketch(plan) if sketched else "")
    if not odd and plan.channel.noise and len(plan.ranks | {greatest_rank(plan.spec)}) > 1:
        odd = "nodes of unlike rank, which cannot tell what their update does to the product; choose equal ranks."
    if not odd:
        return ""
    return f"federation.channel: expected a plan that needs no more than the plain sum of updates, found {odd}"


def _no_sketch(plan: Plan) -> str:
    """Why products cannot be summed by way of a sketch, and what to do; or nothing."""
    noisy = plan.channel is not None and plan.channel.noise is not None
    odd = sorted({module.kind for module in low_rank_modules(plan.spec)} - {"lora"})
    least, width = greatest_rank(plan.spec), plan.method.sketch or 0
    return next(
        (
            f"{found}; {remedy}."
            for holds, found, remedy in (
                (
                    noisy,
                    "noise that clients add, which two sums of one update would need twice",
                    "choose ffa_lora, rolora, fed_sb or fedavg, or protect at the clients (privacy.mechanism = local)",
                ),
                (
                    bool(odd),
                    f"products of {', '.join(odd)}, which two sums do not give back",
                    "set adapter.family=lora",
                ),
                (
                    0 < width < least,
                    f"a sketch of {width} columns, which cannot hold an adapter of rank {least}",
                    f"set aggregation.merge.flexlora.sketch={2 * least} or more, or 0",
                ),
            )
            if holds
        ),
        "",
    )


def _no_plain_sum(plan: Plan, *, sketched: bool = False) -> str:
    """What of a plan makes more of updates than their sum, with each weighing the same, and what to do; or nothing.

    Where products are `sketched`, their sum will do.
    """
    return next(
        (
            f"{found}; {remedy}."
            for holds, found, remedy in (
                (
                    not (plan.method.merge.mean or sketched),
                    "a rule that makes more of updates than their mean",
                    "choose ffa_lora, rolora, fed_sb or fedavg, or protect at the clients (privacy.mechanism = local)",
                ),
                (
                    plan.method.merge.weigh is not WEIGHTS["uniform"],
                    "a rule that weighs clients by what they say they have",
                    'set weights = "uniform" of that rule',
                ),
                (plan.controls, "control variates, which travel beside updates", "set training.scaffold=false"),
                (bool(plan.method.pruning), "nodes that lower their rank", "choose a rule without pruning"),
                (plan.carries, "federation.late = carry", 'set federation.late = "drop"'),
                (plan.spare, "federation.spare above 0", "set federation.spare=0"),
            )
            if holds
        ),
        "",
    )


def private_turns(plan: Plan) -> str:
    """Noise that is taken back goes with tensors that are always trained."""
    if plan.mechanism is None or plan.mechanism.turns:
        return ""
    if plan.stage.period == 1:
        return ""
    return (
        "privacy.central.bands: expected the same tensors in every round, because noise is taken back in later ones, "
        "found a rule by which tensors take turns; set bands=1, or choose ffa_lora."
    )


def private_beside(plan: Plan) -> str:
    """Nothing travels beside an update that carries its own noise."""
    if plan.mechanism is None or plan.mechanism.sums:
        return ""
    if plan.controls:
        return (
            "training.scaffold: expected false, because control variates travel without noise, found true; "
            "set training.scaffold=false."
        )
    if plan.mechanism.unit == EXAMPLE and plan.method.merge.weigh is WEIGHTS["tokens"]:
        return (
            "aggregation.merge: expected weights of examples or equal ones, because how many tokens a step drew tells "
            'of single examples, found tokens; set weights = "examples" of that rule.'
        )
    if plan.method.pruning and plan.mechanism.unit == EXAMPLE:
        return (
            "aggregation.merge.rule: expected nodes that keep their rank, because by how much they lower it nothing "
            "protects their examples, found a rule by which they lower it; set aggregation.merge.hetlora.keep=1."
        )
    return ""
