"""How each figure that a run may be told by is named, written and drawn."""

from __future__ import annotations

from typing import NamedTuple

from fedpeft.report.units import NOTHING, percent, points

UNNAMED = "accuracy"
"""The figure of a journal whose settings name none."""


class Metric(NamedTuple):
    """A figure: its name in a sentence, what it is, whether it is a share in [0, 1], what a model does that has it."""

    title: str
    caption: str
    share: bool = True
    verb: str = ""

    @property
    def reached(self) -> str:
        """A piece of a sentence with a place for the figure and one for the rows that it was measured on."""
        return self.verb or f"has {_article(self.title)}{self.title} of {{}} on {{}}"

    @property
    def heading(self) -> str:
        """The name at the head of a plot."""
        return self.title[:1].upper() + self.title[1:]

    def text(self, value: float | None, spread: float | None = None) -> str:
        """`71.3 ± 3.4 %` for a share, `12.31 ± 0.42` for another number."""
        if self.share or value is None:
            return percent(value, spread) if value is not None else NOTHING
        return f"{value:.4g}" + ("" if spread is None else f" ± {spread:.2g}")

    def difference(self, value: float) -> str:
        """`5.2 points above`, or `0.31 below` for what is no share."""
        if self.share:
            return points(value)
        return f"{abs(value):.3g} {'above' if value > 0 else 'below'}" if value else "level with"


METRICS = {
    "accuracy": Metric("accuracy", "Share of rows classified rightly", verb="classifies {} of {} rightly"),
    "macro_f1": Metric("macro F1", "Mean of the labels' F1"),
    "loss": Metric("loss", "Mean loss", share=False),
    "perplexity": Metric("perplexity", "Exponential of the mean loss of a token", share=False),
    "token_accuracy": Metric("token accuracy", "Share of tokens foretold rightly from those before them"),
    "entity_f1": Metric("entity F1", "F1 of the entities, found only where bounds and kind are right"),
    "exact_match": Metric("exact match", "Share of rows answered to the letter"),
    "margin": Metric("margin", "Mean reward of the chosen answer less that of the rejected one", share=False),
    "reward_accuracy": Metric("reward accuracy", "Share of pairs whose chosen answer has the greater reward"),
}


def metric(name: str) -> Metric:
    """How the figure `name` is told; one that is not known goes by its own name."""
    return METRICS.get(name, Metric(name.replace("_", " "), name.replace("_", " "), share=False))


def _article(title: str) -> str:
    return "an " if title[0] in "aeiou" else "a "
