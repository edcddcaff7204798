"""`fedpeft check`: what a run will cost, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import typer

from fedpeft.adapters import AdapterSpec, at_rank, at_ranks, greatest_rank, inexact, low_rank_modules
from fedpeft.codecs import dense
from fedpeft.compatibility import table
from fedpeft.config import RunConfig, load
from fedpeft.config.observation import ObservationConfig
from fedpeft.engines.workers import require_cores
from fedpeft.errors import ConfigError, FedPeftError, sentence
from fedpeft.experiment import (
    adapted_model,
    check_plan,
    deal_rows,
    learner_of,
    parts_of,
    ranks_of,
    resolve,
    spent_of,
    strategy_of,
    test_examples,
)
from fedpeft.merges import Method
from fedpeft.privacy import SAMPLERS, Channel
from fedpeft.privacy.secure.packing import size_bytes
from fedpeft.ranks import RankRule
from fedpeft.report.tables import Table, render_plain
from fedpeft.report.units import between, human_bytes, human_count
from fedpeft.sinks import KINDS, remedy_of
from fedpeft.strategy import Strategy
from fedpeft.sweeps.cells import cells_of
from fedpeft.sweeps.settings import is_sweep, read_plan
from fedpeft.sweeps.work import loaded
from fedpeft.training import fit_memory_bytes

_Rows = tuple[tuple[str, str], ...]


class Messages(NamedTuple):
    """Bytes of one client's payloads: what it receives at first and after that, what it sends round after round.

    `up` has as many entries as there are rounds before it repeats. Where layers take `turns`, a client that took part
    of late receives less. The residual beside the base, which grows, is not counted.
    """

    first: int
    down: int
    up: tuple[int, ...]
    turns: int


def run_check(path: Path, overrides: list[str]) -> None:
    """Prints the costs of the run, and what goes with what; settings, data and model have been found usable.

    Of a sweep it prints whether each combination of its variants can run.
    """
    if is_sweep(path):
        _check_sweep(path, overrides)
        return
    config = resolve(load(path, overrides))
    require_cores(config)
    typer.echo(render_plain(costs(config)))
    typer.echo()
    typer.echo(render_plain(Table(*table())))


def _check_sweep(path: Path, overrides: list[str]) -> None:
    """Prints a line for each combination; those that differ in their seeds alone are one.

    Raises:
        ConfigError: the file is no usable sweep, or a combination cannot run.
    """
    plan = read_plan(path, overrides)
    root, cells = cells_of(plan, overrides)
    for where in {plan.sweep.draw, *(cell.measure for cell in cells)} - {""}:
        loaded(where)
    combinations = list({(cell.grid, cell.variants): cell for cell in reversed(cells)}.values())[::-1]
    refused = 0
    for cell in combinations:
        words = " ".join([cell.grid, *(variant for _, variant in cell.variants)])
        try:
            config = resolve(cell.config)
            require_cores(config)
            check_plan(config, adapted_model(config))
            typer.echo(f"can run  {words}")
        except FedPeftError as error:
            refused += 1
            typer.echo(f"refused  {words}: {error}")
    typer.echo(f"\n{len(combinations)} combinations, {len(cells)} runs below {root}")
    if refused:
        expected, found = f"{len(combinations)} combinations that can run", f"{refused} that cannot, told above"
        raise ConfigError(sentence(str(path), expected=expected, found=found, remedy="correct or leave out those"))


def costs(config: RunConfig) -> Table:
    """What the run trains, sends and holds in memory, each with how it was found.

    Raises:
        FedPeftError: settings, data or model cannot be used.
    """
    adapted = adapted_model(config)
    check_plan(config, adapted)
    dealt = deal_rows(config)
    base, exchanges = adapted.base_parameters, config.rounds * config.federation.cohort
    trained = strategy_of(config).stage.trained(adapted.spec).parameters
    share = trained / base
    fit_bytes = fit_memory_bytes(learner_of(config, test_examples(config)))
    rows = (
        ("base model", f"{human_count(base)} parameters, {human_bytes(4 * base)} in float32"),
        ("trained", f"{human_count(trained)} parameters ({share:.2%} of the base)"),
        *traffic(config, adapted.spec),
        *protection(config),
        ("the full model would move", human_bytes(8 * base * exchanges)),
        (
            "memory to train",
            f"{human_bytes(4 * base + fit_bytes)}: base, adapter, AdamW, one longest batch; libraries apart",
        ),
        ("rows to train on", f"{dealt.report.train_rows}, of which sites hold {sum(map(len, dealt.sites))}"),
        ("held-out rows", f"{dealt.report.test_rows}, {dealt.report.test_overlap:.1%} also in training"),
        ("repeats removed", str(dealt.report.repeats_removed)),
        *_lacking_sinks(config.observation),
    )
    return Table(("what", "how much"), rows)


def protection(config: RunConfig) -> _Rows:
    """What the run promises to protect, by its settings."""
    mechanism, promise = parts_of(config).mechanism, config.privacy.chosen
    if mechanism is None:
        return (("protected", "nothing but that rows stay where they are"),)
    spent = mechanism.charge(0)
    rows = [("protected", f"{config.privacy.name}: one {mechanism.unit}")]
    if spent:
        whole = spent_of(config, (spent,) * config.rounds)
        whose = "" if SAMPLERS[spent.sampler].draw else " for a client that trains in each"
        rows.append(("privacy after all rounds", f"ε = {whole:.3g} at δ = {promise.delta:.2g}{whose}"))
        if promise.epsilon:
            rows.append(("budget", f"stops before a round that would exceed ε = {promise.epsilon:g}"))
        rows.append(("noise", f"{spent.noise_multiplier:g} times the clipping norm, in every round"))
        rows.append(("a draw claims", SAMPLERS[spent.sampler].claims))
    return tuple(rows)


def _lacking_sinks(settings: ObservationConfig) -> _Rows:
    """The sinks that the run would go on without, because their library is not installed."""
    remedies = {name: remedy_of(KINDS[name]) for name in settings.sinks}
    return tuple(
        (f"no sink {name}", f"{KINDS[name].library} is not installed: {remedy}")
        for name, remedy in remedies.items()
        if remedy
    )


def traffic(config: RunConfig, spec: AdapterSpec) -> _Rows:
    """Who sends how much of an adapter of `spec`, by rank, in a round and in the run, and what the rule adds to it."""
    rule, strategy = ranks_of(config), strategy_of(config)
    sizes = {rank: messages(strategy, at_rank(spec, rank)) for rank in _possible(rule, spec)}
    if strategy.channel:
        sizes = {rank: _under_masks(strategy, strategy.channel, spec, size, config) for rank, size in sizes.items()}
    return (
        ("merge rule", config.aggregation.merge.name),
        *(("averaged inexactly", f"{kind}: {why}") for kind, why in inexact(spec).items()),
        *_ranks(config.federation.ranks.name, rule, sizes),
        *_totals(config, rule, sizes),
        *((("not counted", "keys and shares of secure sums"),) if strategy.channel else ()),
        *_residual(parts_of(config).method, spec),
    )


def messages(strategy: Strategy, spec: AdapterSpec) -> Messages:
    """The bytes of what travels to and from a client that holds `spec`."""
    kept = {*strategy.stage.constant(spec), *strategy.stage.local(spec, 1)}
    again = spec.only(key for key in spec.shapes if key not in kept)
    shared = [strategy.stage.shared(spec, round_) for round_ in range(1, strategy.stage.period + 1)]
    variates = [dense().size(part) if strategy.controls else 0 for part in shared]
    sent = [strategy.codec.size(part) + variate for part, variate in zip(shared, variates, strict=True)]
    return Messages(
        (0 if strategy.builds else dense().size(spec)) + variates[0],
        dense().size(again) + variates[0],
        tuple(sent),
        strategy.stage.turns,
    )


def _under_masks(
    strategy: Strategy, channel: Channel, spec: AdapterSpec, size: Messages, config: RunConfig
) -> Messages:
    """What travels in secure sums: integers, as many at every rank; with two sums, those of both, and bases between."""
    cohort, bases = config.federation.cohort, 0
    up: list[int] = []
    for round_ in range(1, strategy.stage.period + 1):
        passes = strategy.passes(spec, round_)
        sums = [strategy.stage.shared(spec, round_)] if passes is None else [passes.first, passes.second]
        counts = [one.parameters for one in sums]
        up.append(sum(size_bytes(count, channel.width(cohort, count)) for count in counts))
        bases = dense().size(passes.bases) if passes else 0
    return size._replace(first=size.first + bases, down=size.down + bases, up=tuple(up))


def _possible(rule: RankRule, spec: AdapterSpec) -> tuple[int, ...]:
    """The ranks that a node may have, as far as settings tell: also that of one which asks for the server's."""
    cap = greatest_rank(spec)
    return tuple(sorted({min(rank or cap, cap) for rank in (*rule.possible, rule.rank(0, {"rank": cap}))}))


def _ranks(name: str, rule: RankRule, sizes: Mapping[int, Messages]) -> _Rows:
    """What each rank costs a client."""
    if max(sizes) == 0:
        return _one_client("a client", sizes[0])
    told = f"as each node says, {between(sizes)}" if rule.asks else ", ".join(map(str, sizes))
    ranks = ("ranks", f"{name}: {told}")
    if len(sizes) == 1:
        return (ranks, *_one_client("a client", *sizes.values()))
    return (ranks, *(row for rank, size in sizes.items() for row in _one_client(f"rank {rank}", size)))


def _one_client(who: str, size: Messages) -> _Rows:
    first = f", {human_bytes(size.first)} the first time" if size.first != size.down else ""
    most = "at most " if size.turns > 1 else ""
    return ((f"{who} receives", f"{most}{human_bytes(size.down)} a round{first}"), (f"{who} sends", _sends(size.up)))


def _sends(up: tuple[int, ...]) -> str:
    """What goes up, round after round of those that repeat."""
    if len(set(up)) == 1:
        return f"{human_bytes(up[0])} a round"
    if len(up) == 2:
        return f"{human_bytes(up[0])} in odd rounds, {human_bytes(up[1])} in even ones"
    return f"{human_bytes(min(up))} to {human_bytes(max(up))} a round, {human_bytes(mean(up))} in the mean"


def _residual(method: Method, spec: AdapterSpec) -> _Rows:
    """That a rule lets the base take up what the adapter does not hold, and what that may cost."""
    if not method.merge.drifts:
        return ()
    modules = [module for module in low_rank_modules(spec) if module.kind in method.kinds]
    sides = {module.path: min(dict(module.shapes)["B"][0], dict(module.shapes)["A"][1]) for module in modules}
    ranks = {path: min(method.budget or side, side) for path, side in sides.items()}
    taken = spec.only(f"{module.path}.{name}" for module in modules for name, _ in module.shapes)
    most = dense().size(at_ranks(taken, ranks))
    return (
        (
            "the base takes up",
            f"a residual of rank up to {max(ranks.values())}; an export has that on top of rank {greatest_rank(spec)}",
        ),
        ("the residual adds", f"at most {human_bytes(most)} to what a client receives in a round"),
    )


def _totals(config: RunConfig, rule: RankRule, sizes: Mapping[int, Messages]) -> _Rows:
    """What a round and the run move, the residual apart."""
    cohort, clients, rounds = config.federation.cohort, config.federation.clients, config.rounds
    cap = max(sizes)
    held = [] if rule.asks else [sizes[min(rule.rank(site, {}) or cap, cap)] for site in range(clients)]
    newcomers = min(clients, rounds * cohort)
    each = [size.down + mean(size.up) for size in held or sizes.values()]
    more = [size.first - size.down for size in held or sizes.values()]
    costs = [(cohort * one, rounds * cohort * one + newcomers * extra) for one, extra in zip(each, more, strict=True)]
    of_round, of_run = ([cost[at] for cost in costs] for at in (0, 1))
    told = [_amount(amounts, known=bool(held)) for amounts in (of_round, of_run)]
    return (
        ("a round moves", f"{told[0]} over {cohort} clients"),
        ("the run moves", f"{told[1]} over {rounds} rounds"),
    )


def _amount(amounts: list[float], *, known: bool) -> str:
    """Bytes: the mean where it is known who has which rank, else from the least to the most."""
    least, most = human_bytes(min(amounts)), human_bytes(max(amounts))
    if least == most:
        return least
    return f"about {human_bytes(mean(amounts))}" if known else f"{least} to {most}"
