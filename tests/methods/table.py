"""The table of all methods on all architectures, as `docs/methods.md`; figures are measured, the rest is the code's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fedpeft.adapters import KINDS as MODULES
from fedpeft.config.adapters import REFUSED as NOT_OFFERED
from fedpeft.errors import ModelError
from tests.methods.cells import KINDS, METHODS, REFUSED, Cell, kinds_of, made, subject
from tests.methods.contract import ROUNDS_AT_START, layout, mean_keeps_its_word, mergeable, truncation_keeps_its_word

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

_TIERS = {"exact": "exact", "product": "by a rule", "inexact": "inexact"}
_NAMES = {"llama": "Llama", "bert": "BERT", "vit": "ViT", "t5": "T5"}

_TOP = """# What each adapter method comes to in a federation

Made by `python -m tests.methods.contract`; do not edit. Every method is put on a tiny model of each architecture, three
clients train it for four steps from one start, and the server merges what they send, five parts to two to one. The
figure is how far what the merged adapter does is from the weighted mean of what the clients' adapters do, relative to
that mean, where the server takes the **mean of the numbers** (`fedavg`); of several modules, the worst.

- **exact**: the mean of the numbers does the mean of what they do; what is left is float32.
- **by a rule**: the mean of the numbers does not, but the exact mean is known in factored form, and a rule such as
  `flora`, `fedex` or `flexlora` makes use of it. Behind the bar is what `flexlora` loses, where it can serve the
  method: the part of the exact mean that no adapter of this size can hold.
- **inexact**: no rule gives the exact mean. The numbers are averaged, and the journal and the report say so.

A cell with a dash is refused before a run begins, for the reason below. What is **saved as** "peft" is read by stock
`peft.PeftModel.from_pretrained`; "own files" are read by `fedpeft.models.load_adapter`. A method that is **merged**
can be exported as a plain transformers model too.
"""


def figure(cell: Cell) -> str:
    """What is measured of a cell."""
    error, tail = mean_keeps_its_word(subject(cell)), truncation_keeps_its_word(subject(cell))
    exact = all(MODULES[kind].mean == "exact" for kind in kinds_of(cell))
    return f"`{error:{'.0e' if exact else '.2g'}}" + (f" \\| {tail:.2g}`" if tail else "`")


def rendered(measure: Callable[[Cell], str]) -> str:
    """The page."""
    head = ["method", "kinds of modules", "mean of the numbers", *_NAMES.values(), "saved as", "merged"]
    lines = [_TOP, _row(head), _row(["---"] * len(head))]
    refusals = {cell: f"{at}" for at, cell in enumerate(REFUSED, 1)}
    lines += [_row(_cells(method, measure, refusals)) for method in METHODS]
    lines += ["", "## Refused cells", ""]
    lines += [f"{at}. {cell.method} on {_NAMES[cell.kind]}: {_said(cell)}" for cell, at in refusals.items()]
    lines += ["", "## Why a mean is exact or not", "", _row(["kind", "mean", "why"]), _row(["---"] * 3)]
    lines += [_row([name, _TIERS[kind.mean], kind.why]) for name, kind in MODULES.items()]
    lines += ["", "## What begins as nothing but for rounding", ""]
    lines += [f"- {name}: logits move by less than {most:g}." for name, most in ROUNDS_AT_START.items()]
    lines += ["- Prompts and prefixes add tokens, so the model computes something else from the start."]
    lines += ["", "## Not offered", "", *(f"- {name}: {why}." for name, why in NOT_OFFERED.items())]
    return "\n".join(lines) + "\n"


def masked(page: str) -> str:
    """The page without its figures."""
    return re.sub(r"`[\d.e+-]+( \\\| [\d.e+-]+)?`", "`#`", page)


def write() -> None:
    """`docs/methods.md` holds the table as it is now."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PAGE.write_text(rendered(figure), encoding="utf-8")


def _cells(method: str, measure: Callable[[Cell], str], refusals: Mapping[Cell, str]) -> list[str]:
    cells = [Cell(method, kind) for kind in KINDS]
    working = [cell for cell in cells if not cell.refusal]
    kinds = sorted(kinds_of(working[0]))
    tiers = [
        f"{kind}: {_TIERS[MODULES[kind].mean]}" if len(kinds) > 1 else _TIERS[MODULES[kind].mean] for kind in kinds
    ]
    figures = [f"– ({refusals[cell]})" if cell.refusal else measure(cell) for cell in cells]
    merges = [_NAMES[cell.kind] for cell in working if mergeable(cell)]
    merged = "yes" if len(merges) == len(working) else ", ".join(merges) or "no"
    return [method, ", ".join(kinds), "; ".join(tiers), *figures, layout(working[0]), merged]


def _said(cell: Cell) -> str:
    try:
        made(cell, 1)
    except ModelError as error:
        return str(error)
    raise AssertionError(f"{cell} is not refused")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
