"""Whether a cohort trains together or one by one: what is right for a model is tried, and the faster is taken."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedpeft.cohort import Member, fit_cohort, gradients, most_tokens_of_a_batch, unserved
from fedpeft.cohort_layers import WAYS
from fedpeft.errors import FedPeftError
from fedpeft.example_gradients import Taken
from fedpeft.gradient_checks import same
from fedpeft.training import TorchLearner

ALONE = "one by one"
"""The choice to train clients one after another; any other choice is the name of one of `cohort_layers.WAYS`."""

TRIED = 3
"""How many members of a cohort are tried on."""

_MOVED = 0.05
"""How far from their start the numbers are at which gradients are compared."""

_MOST_SHARE = 0.03
"""The most that measuring may take, as a share of all steps of a run."""

_SMALL_TOKENS = 256
"""Batches of no more tokens gain so much by training together that it need not be measured."""

_MOST_SHARE_OF_CHECKING = 0.1
"""The most that holding gradients against each other may take where batches are small, as a share of a run's steps."""

_logger = logging.getLogger(__name__)


def right_way(members: Sequence[Member], most_tokens: int) -> str:
    """The first of `WAYS` that gives each of the first members its own gradients; `ALONE` where none does.

    What was found against training together is said in the log.
    """
    tried = members[:TRIED]
    reason = unserved(tried[0].learner)
    if not reason:
        for name in WAYS:
            if _is_right(tried, most_tokens, name):
                return name
        reason = f"the layers of {tried[0].learner.adapted.family.name} cannot be computed for several clients"
    _logger.warning("clients train one by one, not together: %s", reason)
    return ALONE


def faster_way(members: Sequence[Member], most_tokens: int) -> str:
    """As `right_way`, but `ALONE` too where it is faster.

    In a run that is too short for measuring to pay, small batches train together and others one by one.
    """
    learner = members[0].learner
    tried = members[:TRIED]
    steps = learner.rounds * learner.settings.steps * len(members)
    if 6 * len(tried) > _MOST_SHARE * steps:
        small = all(most_tokens_of_a_batch(one.learner) <= _SMALL_TOKENS for one in members)
        pays = 2 * len(tried) <= _MOST_SHARE_OF_CHECKING * steps
        return right_way(tried, most_tokens) if small and pays else ALONE
    name = right_way(tried, most_tokens)
    if name == ALONE:
        return ALONE
    short = [replace(one, learner=_for_one_step(one)) for one in tried]
    seconds = {ALONE: float("inf"), name: float("inf")}
    for _ in range(2):
        seconds[ALONE] = min(seconds[ALONE], _timed(lambda: [m.learner.fit(m.adapter, m.job) for m in short]))
        seconds[name] = min(seconds[name], _timed(lambda: fit_cohort(short, most_tokens, WAYS[name])))
    found = min(seconds, key=lambda one: seconds[one])
    _logger.info(
        "%d clients take a step in %.3f s one by one and in %.3f s together: they train %s",
        len(tried),
        seconds[ALONE],
        seconds[name],
        ALONE if found == ALONE else f"together, {found}",
    )
    return found


CHOICES = {"on": right_way, "auto": faster_way}
"""How the setting `compute.cohort` is settled on a run's first cohort; "off" settles nothing."""


def _is_right(members: Sequence[Member], most_tokens: int, name: str) -> bool:
    adapted = members[0].learner.adapted
    try:
        found, right = gradients(members, most_tokens, WAYS[name], _MOVED)
    except FedPeftError:
        raise
    except Exception as error:  # a layer may refuse in any words to compute in a way that it was not written for
        _logger.debug("training a cohort %s is left out: %s", name, type(error).__name__)
        return False
    finally:
        adapted.model.zero_grad(set_to_none=True)  # layers that do not serve may have left their own there
    none = torch.zeros(len(members))
    return same(Taken(tuple(found), none), Taken(tuple(right), none), adapted.precision)


def _for_one_step(member: Member) -> TorchLearner:
    return replace(member.learner, settings=replace(member.learner.settings, steps=1))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
