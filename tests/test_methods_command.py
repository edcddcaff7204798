from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.adapters import KINDS, own_family, peft_family, together
from fedpeft.commands.methods import run_methods
from fedpeft.config.adapters import ADAPTERS, REFUSED
from fedpeft.config.adapters.methods import methods
from fedpeft.config.fields import choose
from fedpeft.errors import ConfigError, PlanError


def told(capsys: Any, path: Path | None = None) -> dict[str, dict[str, Any]]:
    run_methods(path, [], as_json=True)
    return {method["name"]: method for method in json.loads(capsys.readouterr().out)}


def test_every_method_is_told_with_its_tier_and_why(capsys: Any) -> None:
    found = told(capsys)
    assert {*ADAPTERS.members, *REFUSED} <= found.keys()
    assert all(method.keys() == {"name", "family", "tier", "reason"} for method in found.values())
    assert {method["tier"] for method in found.values()} == {"exact", "special rule", "inexact", "refused"}
    tiers = {name: found[name]["tier"] for name in ("ia3", "lora", "lora with freeze_a", "houlsby", "xlora")}
    assert tiers == {
        "ia3": "exact",
        "lora": "special rule",
        "lora with freeze_a": "exact",
        "houlsby": "inexact",
        "xlora": "refused",
    }
    assert found["lora"]["reason"] == KINDS["lora"].why
    assert {method.group for method in methods()} == {"additive", "selective", "reparameterised", "hybrid"}


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")  # sixteen features are fewer than a block of it
def test_on_a_model_each_method_is_told_with_what_it_costs_there(tmp_path: Path, tiny_run: str, capsys: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tiny_run)
    found = told(capsys, path)
    assert found.keys() == ADAPTERS.members.keys()
    refused = {name for name, method in found.items() if method["tier"] == "refused"}
    assert {"llama_adapter", "trainable_tokens"} <= refused
    for name in found.keys() - refused:
        assert 0 < 4 * found[name]["trained"] <= found[name]["bytes_a_round"], name
        assert found[name]["memory_bytes"] > 0
    assert found["head_only"]["trained"] == 51  # sixteen weights and a bias for each of three labels
    assert found["bitfit"]["trained"] > found["head_only"]["trained"]
    run_methods(path, [], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "tier", "trained", "bytes", "a", "round", "memory", "bytes", "reason"]
    assert len(lines) == 1 + len(found)


def test_a_refused_name_is_answered_with_why() -> None:
    with pytest.raises(ConfigError, match="found 'pissa'; it takes the adapter out of the base"):
        choose(ADAPTERS, "pissa")


@pytest.mark.parametrize("other", ["ia3", "road", "ssf", "ln_tuning"])
def test_families_of_which_one_multiplies_what_the_other_adds_do_not_join(other: str) -> None:
    members = [ADAPTERS.members[name]().build() for name in ("bitfit", other)]
    with pytest.raises(PlanError, match=rf"expected bitfit or {other}, found both"):
        together(members)


def test_peft_installs_one_family_at_most() -> None:
    with pytest.raises(PlanError, match="at most one family that peft installs, found one and two"):
        together([peft_family("one", "LORA", {}), own_family("bitfit"), peft_family("two", "IA3", {})])
