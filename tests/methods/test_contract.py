"""Every adapter method on every architecture: what it can do it does, what it cannot it says."""

from __future__ import annotations

import pytest

from fedpeft.adapters import KINDS, OWN_KINDS
from fedpeft.config.adapters import ADAPTERS
from fedpeft.errors import ModelError
from tests.methods.cells import REFUSED, TOGETHER, VARIANTS, WORKING, Cell, kinds_of, made, subject
from tests.methods.contract import CHECKS
from tests.methods.table import PAGE, masked, rendered

# What peft and torch say of their own of a method that works.
_SAID = (
    ".*is_gradient_checkpointing:FutureWarning",
    "Note that `r` is not used in AdaLora:UserWarning",
    "Specified to not (save|load):UserWarning",
    "Sparse invariant checks:UserWarning",
    "Failed to load the CUDA extension:UserWarning",
    "Unsupported layer type:UserWarning",
    "Setting boft_n_butterfly_factor to 1:UserWarning",
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    *(pytest.mark.filterwarnings(f"ignore:{said}") for said in _SAID),
]


@pytest.mark.parametrize(
    ("cell", "check"), [(cell, check) for cell in WORKING for check in CHECKS], ids=lambda item: str(item)
)
def test_the_contract_is_kept(cell: Cell, check: str) -> None:
    CHECKS[check](subject(cell))


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_what_cannot_work_is_refused_in_a_sentence(cell: Cell) -> None:
    with pytest.raises(ModelError) as refused:
        made(cell, 1)
    said = str(refused.value)
    assert cell.refusal in said
    assert said.startswith("adapter.")
    assert "\n" not in said
    assert said.endswith(".")


def test_no_family_and_no_kind_of_module_is_left_out() -> None:
    tried = {name for cell in WORKING for name in (TOGETHER.get(cell.method) or [cell.method])}
    assert {VARIANTS[name][0] if name in VARIANTS else name for name in tried} == set(ADAPTERS.members)
    seen = {"full"}.union(*(kinds_of(cell) for cell in WORKING))
    assert set(KINDS) == seen
    assert set(OWN_KINDS.values()) <= seen


def test_the_page_of_methods_says_what_the_code_does() -> None:
    assert masked(PAGE.read_text(encoding="utf-8")) == rendered(lambda _: "`#`"), (
        "run python -m tests.methods.contract to write the page anew"
    )
