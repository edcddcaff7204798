"""The law of what may go with what: a plan that breaks it is refused before its first round."""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft import codec_laws, privacy_laws
from fedpeft.adapters import KINDS, AdapterSpec, greatest_rank, low_rank_modules
from fedpeft.errors import PlanError
from fedpeft.merges import Method
from fedpeft.plans import Law, Plan
from fedpeft.stages import chain, layers_of
from fedpeft.strategy import Parts, stage_of


def check(
    parts: Parts,
    spec: AdapterSpec,
    ranks: Iterable[int] = (),
    updates: int = 1,
    *,
    carries: bool = False,
    spare: bool = False,
) -> None:
    """Raises PlanError, naming the two choices that clash, if the plan breaks one of `LAWS`.

    `ranks` are those that nodes may have (0: the server's), `updates` how many a round may come with at least,
    `carries` says that a late update counts in the round after, and `spare` that more are asked than are needed.
    """
    plan = Plan(
        chain(stage_of(parts.method), parts.stage) if _fits(parts.method, spec) else parts.stage,
        parts.codec,
        parts.method,
        parts.optimizer,
        spec,
        frozenset(ranks) - {0},
        updates,
        parts.controls > 0,
        carries,
        spare,
        parts.mechanism,
        parts.channel,
        parts.downlink,
    )
    for law in LAWS:
        reason = law.broken(plan)
        if reason:
            raise PlanError(reason)


def _fits(method: Method, spec: AdapterSpec) -> bool:
    return not method.kinds or any(module.kind in method.kinds for module in spec.modules)


def _of_its_kind(plan: Plan) -> str:
    if _fits(plan.method, plan.spec):
        return ""
    return (
        f"aggregation.merge.rule: expected a rule for adapters of family {plan.spec.family}, found one for "
        f"{', '.join(plan.method.kinds)}; set adapter.family={plan.method.kinds[0]}, or choose fedavg."
    )


def _frozen_and_local(plan: Plan) -> str:
    both = sorted(
        {key for r in plan.rounds for key in plan.stage.frozen(plan.spec, r)} & set(plan.stage.local(plan.spec, 1))
    )
    if not both:
        return ""
    return (
        f"aggregation.stages: expected each tensor either frozen or local, found {both[0]} in both; "
        "a frozen tensor is not trained, so drop it from one of the two lists."
    )


def _nothing_trained(plan: Plan) -> str:
    if all(set(plan.stage.frozen(plan.spec, round_)) != set(plan.spec.shapes) for round_ in plan.rounds):
        return ""
    return "aggregation.stages.frozen: expected some tensor left to train, found all frozen; shorten the list."


def _nothing_shared(plan: Plan) -> str:
    if all(plan.stage.shared(plan.spec, round_).shapes for round_ in plan.rounds):
        return ""
    return (
        "aggregation.stages: expected some tensor left to share, found every one frozen or local; "
        "shorten the lists, or train each site alone."
    )


def _new_factors(plan: Plan) -> str:
    lacking = sorted({module.kind for module in low_rank_modules(plan.spec) if KINDS[module.kind].solve is None})
    if plan.method.merge.gauge == "kept" or not lacking:
        return ""
    return (
        "aggregation.merge: expected an adapter that takes new factors, because this rule makes them, found "
        f'{", ".join(lacking)}; choose fedavg, or judge factors (space = "factors").'
    )


def _whole_modules(plan: Plan) -> str:
    if not plan.method.merge.whole:
        return ""
    kept = {*plan.stage.frozen(plan.spec, 1), *plan.stage.local(plan.spec, 1)}
    low_rank = [f"{m.path}.{name}" for m in low_rank_modules(plan.spec) for name, _ in m.shapes]
    found = [key for key in low_rank if key in kept]
    if not found:
        return ""
    return (
        "aggregation.merge.rule: expected both factors of every low-rank module trained and shared, because this rule "
        f"makes new ones, found {found[0]} frozen or local; choose fedavg, whose mean is exact with one factor frozen."
    )


def _coupled(plan: Plan) -> str:
    kept = [{*plan.stage.frozen(plan.spec, r), *plan.stage.local(plan.spec, r)} for r in plan.rounds]
    for module in plan.spec.modules:
        coupled = KINDS[module.kind].coupled
        still = [[name for name in coupled if f"{module.path}.{name}" in keys] for keys in kept]
        # A module may stand still as a whole while it waits for its turn, but never in every round.
        found = next((names for names in still if names and (len(names) < len(coupled) or all(still))), None)
        if found:
            return (
                f"aggregation.stages: expected {' and '.join(KINDS[module.kind].coupled)} of {module.kind} modules "
                f"trained and shared, because training any of them moves all, found {module.path}.{found[0]} frozen or "
                "local; leave them alone, or set adapter.family=lora."
            )
    return ""


def _kept_gauge(plan: Plan) -> str:
    if plan.method.merge.gauge == "kept" or plan.optimizer.plain:
        return ""
    return (
        "aggregation.optimizer: expected sgd with learning_rate 1, because the rule in aggregation.merge chooses new "
        "factors each round and moments of the old ones mean nothing there, found another; "
        "choose that, or fedex, which keeps the factors' coordinates and is as exact."
    )


def _control_variates(plan: Plan) -> str:
    if not plan.controls:
        return ""
    if plan.method.merge.gauge != "kept":
        return (
            "training.scaffold: expected a rule that keeps the factors' coordinates from round to round, because a "
            "control variate is a gradient in them, found one that chooses new factors; "
            "choose fedex, or set training.scaffold=false."
        )
    moved = sorted({module.kind for module in plan.spec.modules if KINDS[module.kind].moved})
    if moved:
        return (
            "training.scaffold: expected an adapter that is trained in the numbers that travel, because a control "
            f"variate is a gradient, found {', '.join(moved)}; set adapter.family=lora, or training.scaffold=false."
        )
    if plan.method.pruning:
        return (
            "training.scaffold: expected nodes that keep their rank, because the mean control variate of a row is "
            "unknown where some do not hold it, found a rule by which they lower it; "
            "set aggregation.merge.hetlora.keep=1 or training.scaffold=false."
        )
    if len(plan.ranks) > 1:
        return (
            "training.scaffold: expected one rank for all nodes, because the mean control variate of a row is unknown "
            f"where some do not hold it, found ranks {', '.join(map(str, sorted(plan.ranks)))}; "
            "choose equal ranks, or set training.scaffold=false."
        )
    return ""


def _unlike_ranks(plan: Plan) -> str:
    if plan.method.merge.mixed or plan.ranks <= {greatest_rank(plan.spec)}:
        return ""
    return (
        "federation.ranks: expected one rank for all nodes, because the rule in aggregation.merge compares updates "
        f"number by number, found ranks {', '.join(map(str, sorted(plan.ranks)))}; "
        'choose equal ranks, or judge products (space = "products").'
    )


def _capped(plan: Plan) -> str:
    cap = greatest_rank(plan.spec)
    above = sorted(rank for rank in plan.ranks if rank > cap)
    if not above:
        return ""
    if not cap:
        return (
            f"federation.ranks: expected equal ranks, because nodes cannot hold adapters of family {plan.spec.family} "
            f"at ranks of their own, found {above[-1]}; set federation.ranks.rule=equal, or adapter.family=lora."
        )
    return (
        f"federation.ranks: expected ranks of at most {cap}, the server's, found {above[-1]}; "
        f"raise adapter.{plan.spec.family}.rank to {above[-1]} or lower the rank."
    )


def _enough_updates(plan: Plan) -> str:
    if plan.updates >= plan.method.merge.least:
        return ""
    return (
        f"federation.quorum: expected at least {plan.method.merge.least} updates in every round, with fewer of which "
        f"the rule in aggregation.merge cannot tell a liar, found {plan.updates}; raise quorum and cohort."
    )


def _carried(plan: Plan) -> str:
    if not plan.carries:
        return ""
    turns = plan.stage.period > 1
    odd = next(
        (
            reason
            for holds, reason in (
                (not plan.method.merge.linear, "a rule that makes more of updates than their mean"),
                (turns, "a rule by which tensors take turns"),
                (plan.controls, "control variates, which are of one round"),
                (bool(plan.method.pruning), "nodes that lower their rank"),
            )
            if holds
        ),
        "",
    )
    if not odd:
        return ""
    return (
        "federation.late: expected drop, because an update of the round before can only be added to today's adapter, "
        f'found carry with {odd}; set federation.late = "drop", or choose fedavg.'
    )


def _every_layer(plan: Plan) -> str:
    turns, layers = plan.stage.turns, len(layers_of(plan.spec))
    if turns > max(layers, 1):
        return (
            f"aggregation.stages.turns: expected no more groups than the {layers} layers that the adapter is on, "
            f"because a group without a layer learns nothing, found {turns}; lower it to {max(layers, 1)}."
        )
    if turns % 2 == 0 and plan.method.alternating:
        return (
            "aggregation.stages.turns: expected an odd number beside a rule whose factors take turns of two rounds, "
            f"because some factors would never have theirs, found {turns}; set turns={turns + 1}, or choose fedavg."
        )
    return ""


_SILENCE = "let every site speak"


def _turns_at_one_rank(plan: Plan) -> str:
    cap = greatest_rank(plan.spec)
    if plan.stage.turns == 1 or (plan.ranks <= {cap} and not plan.method.pruning):
        return ""
    found = (
        "a rule by which nodes lower it" if plan.method.pruning else f"ranks {', '.join(map(str, sorted(plan.ranks)))}"
    )
    return (
        "aggregation.stages.turns: expected nodes that keep the server's rank, because they keep layers that wait for "
        f"their turn, found {found}; choose equal ranks and fedavg, or set turns=1."
    )


def _nothing_said(plan: Plan) -> str:
    if not plan.stage.silent:
        return ""
    found, remedy = next(
        (
            (found, remedy)
            for holds, found, remedy in (
                (not plan.method.merge.mean, "a rule that makes more of updates than their mean", "choose fedavg"),
                (plan.controls, "control variates, which travel beside updates", "set training.scaffold=false"),
                (bool(plan.method.pruning), "nodes that lower their rank", "choose a rule without pruning"),
                (plan.channel is not None, "secure sums, in which every update is as long as every other", _SILENCE),
                (plan.mechanism is not None, "a private run, which silence would tell of", _SILENCE),
            )
            if holds
        ),
        ("", ""),
    )
    if not found:
        return ""
    return (
        "aggregation.stages.silent_below: expected a plan in which a zero may stand for an update that comes later, "
        f"found {found}; {remedy}, or set aggregation.stages.silent_below=0."
    )


LAWS = (
    Law("the rule is for this kind of adapter", _of_its_kind),
    Law("each group of layers that take turns has one", _every_layer),
    Law("layers take turns among nodes of one rank", _turns_at_one_rank),
    Law("a tensor is frozen or local, never both", _frozen_and_local),
    Law("something is trained", _nothing_trained),
    Law("something is shared", _nothing_shared),
    Law("what moves together is trained and shared together", _coupled),
    Law("a rule that makes new factors is for modules that take them", _new_factors),
    Law("a rule that makes new factors needs both of them", _whole_modules),
    Law("a rule that makes new factors goes with no optimiser that remembers", _kept_gauge),
    Law("control variates go with a rule that keeps coordinates", _control_variates),
    Law("a rule that compares numbers goes with equal ranks", _unlike_ranks),
    Law("no node's rank is above the server's", _capped),
    Law("late updates go with a plain mean", _carried),
    Law("a robust rule sees enough updates to fire", _enough_updates),
    Law("central privacy goes with plain means of equal weights", privacy_laws.private_sum),
    Law("a secure sum goes with plain means of equal weights", privacy_laws.secure_sum),
    Law("a secure sum goes with a codec whose sums are sums", codec_laws.summed),
    Law("error feedback goes with a codec that loses less than it is given", codec_laws.growing),
    Law("error feedback goes with a rule that keeps coordinates", codec_laws.moving),
    Law("what goes down coded goes with means, equal ranks and codecs that contract", codec_laws.down),
    Law("noise that is taken back goes with tensors that are always trained", privacy_laws.private_turns),
    Law("a site may say nothing where a plain mean sees each update", _nothing_said),
    Law("nothing travels beside an update that carries its own noise", privacy_laws.private_beside),
)
"""Every reason why a plan is refused before its first round."""
