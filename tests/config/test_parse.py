from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from fedpeft.config import RunConfig, digest, from_flat, from_tree, load, override, to_flat, to_toml, to_tree
from fedpeft.config.adapters import Ia3, Lora
from fedpeft.config.parse import nest
from fedpeft.errors import ConfigError
from tests.config.strategies import run_configs, tables

laws = settings(max_examples=60, deadline=None)
TABLES = tables()
MEMBERS = [(key, name) for key, table in TABLES.items() for name in table.members]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@laws
@given(run_configs())
def test_tree_is_inverse(config: RunConfig) -> None:
    assert from_tree(to_tree(config)) == config


@laws
@given(run_configs())
def test_toml_is_inverse(config: RunConfig) -> None:
    assert from_tree(tomllib.loads(to_toml(config))) == config


@laws
@given(run_configs())
def test_flat_is_inverse(config: RunConfig) -> None:
    flat = to_flat(config)
    assert from_flat(flat) == config
    assert all(type(value) in (bool, int, float, str) for value in flat.values())


@laws
@given(run_configs())
def test_texts_are_read_as_the_type_of_their_key(config: RunConfig) -> None:
    texts = {
        key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in to_flat(config).items()
    }
    assert from_flat(texts) == config


@laws
@given(run_configs(), run_configs())
def test_equal_settings_have_equal_hash_and_digest(one: RunConfig, two: RunConfig) -> None:
    copy = from_tree(to_tree(one))
    assert hash(copy) == hash(one)
    assert digest(copy) == digest(one)
    if one.training != two.training or one.aggregation != two.aggregation or one.adapter != two.adapter:
        assert digest(one) != digest(two)


def test_digest_leaves_out_what_cannot_change_a_node() -> None:
    same = ["name=other", "out=elsewhere", "compute.threads=1", "evaluation.every=3", "model.device=cpu"]
    assert digest(override(RunConfig(), same)) == digest(RunConfig())
    assert digest(override(RunConfig(), ["seed=1"])) != digest(RunConfig())


@pytest.mark.parametrize(("key", "name"), MEMBERS)
def test_every_member_is_chosen_by_its_name_and_comes_back(key: str, name: str) -> None:
    table = TABLES[key]
    config = override(RunConfig(), [f"{key}={name}"])
    assert config == override(RunConfig(), [f"{key}.{table.key}={name}"])
    assert from_tree(to_tree(config)) == from_flat(to_flat(config)) == config
    chosen: Any = config
    for part in key.split("."):
        chosen = getattr(chosen, part)
    assert chosen.chosen == table.members[name]()


def test_file_holds_settings_of_members_that_are_not_in_force(write: Any) -> None:
    path = write('adapter = "lora"\n')
    assert load(path) == RunConfig()
    path = write('[adapter]\nfamily = "lora"\n[adapter.ia3]\ntarget_modules = ["key"]\n')
    assert load(path).adapter.chosen == Lora()
    for override_text in ("adapter=ia3", "adapter.family=ia3"):
        assert load(path, [override_text]).adapter.chosen == Ia3(target_modules=("key",))
        assert override(load(path), [override_text]).adapter.chosen == Ia3(target_modules=("key",))


def test_override_of_a_member_keeps_the_choice(write: Any) -> None:
    path = write('adapter = "ia3"\n')
    for overrides in (["adapter.ia3.target_modules=key"], ["adapter=ia3", "adapter.ia3.target_modules=key"]):
        assert load(path, overrides).adapter.chosen == Ia3(target_modules=("key",))
        assert load(path, overrides[::-1]).adapter.chosen == Ia3(target_modules=("key",))


def test_overrides_win_over_the_file_and_the_last_over_the_first(write: Any) -> None:
    path = write("rounds = 5\nseed = 4\n[federation]\nclients = 8\ncohort = 2\n")
    config = load(path, ["rounds=6", "federation.cohort=3", " rounds = 7 "])
    assert (config.rounds, config.seed) == (7, 4)
    assert (config.federation.clients, config.federation.cohort) == (8, 3)


def test_override_leaves_its_argument_alone() -> None:
    config = RunConfig()
    assert override(config, ["rounds=3"]).rounds == 3
    assert config.rounds == RunConfig().rounds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter.lora.layers=4,5", (4, 5)),
        ("adapter.lora.layers=[4, 5]", (4, 5)),
        ("adapter.lora.layers=", ()),
        ("adapter.lora.layers=[]", ()),
    ],
)
def test_lists_on_the_command_line(text: str, expected: tuple[int, ...]) -> None:
    assert override(RunConfig(), [text]).adapter.chosen.layers == expected


def test_value_may_hold_an_equals_sign() -> None:
    assert override(RunConfig(), ["model.source=a=b"]).model.source == "a=b"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override(RunConfig(), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override_text", "place", "nearest"),
    [
        ("round=3", "round:", "did you mean rounds"),
        ("federation.cohrt=3", "federation.cohrt:", "did you mean federation.cohort"),
        ("adapter.lora.rnak=3", "adapter.lora.rnak:", "did you mean adapter.lora.rank"),
        ("adapter.llora.rank=3", "adapter.llora:", "did you mean adapter.lora"),
        ("data.origin.csv.columns.txt=a", "data.origin.csv.columns.txt:", "did you mean data.origin.csv.columns.text"),
        ("cohort=3", "cohort:", "did you mean federation.cohort"),
        ("training.rank=3", "training.rank:", "did you mean adapter.lora.rank"),
        ("federation..cohort=3", "federation.:", "did you mean federation."),
    ],
)
def test_unknown_key_names_the_nearest(override_text: str, place: str, nearest: str) -> None:
    message = refusal(override_text)
    assert message.startswith(place)
    assert nearest in message
    assert "\n" not in message


def test_unknown_key_where_there_are_no_keys() -> None:
    message = refusal("aggregation.codec.dense.bits=8")
    assert message.startswith("aggregation.codec.dense.bits: expected no settings")


@pytest.mark.parametrize(
    ("key", "name"), [("adapter", "lorra"), ("data.origin", "josnl"), ("data.partition.by", "group2")]
)
def test_unknown_member_names_the_nearest(key: str, name: str) -> None:
    message = refusal(f"{key}={name}")
    table = TABLES[key]
    assert message.startswith(f"{key}.{table.key}: expected one of {', '.join(table.members)}, found {name!r}")
    assert "did you mean" in message


@pytest.mark.parametrize(
    ("tree", "place", "found"),
    [
        ({"rounds": 2.5}, "rounds", "2.5"),
        ({"rounds": True}, "rounds", "True"),
        ({"rounds": "three"}, "rounds", "'three'"),
        ({"rounds": {"a": 1}}, "rounds", "{'a': 1}"),
        ({"rounds": [1]}, "rounds", "[1]"),
        ({"evaluation": {"on_clients": 1}}, "evaluation.on_clients", "1"),
        ({"evaluation": {"on_clients": "yes"}}, "evaluation.on_clients", "'yes'"),
        ({"training": {"learning_rate": False}}, "training.learning_rate", "False"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate", "nan"),
        ({"training": {"learning_rate": "inf"}}, "training.learning_rate", "'inf'"),
        ({"training": 3}, "training", "3"),
        ({"adapter": 3}, "adapter", "3"),
        ({"adapter": {"family": ["lora", "lroa"]}}, "adapter.family", "'lora+lroa'"),
        ({"adapter": {"lora": "x"}}, "adapter.lora", "'x'"),
        ({"adapter": {"lora": {"layers": 4}}}, "adapter.lora.layers", "4"),
        ({"adapter": {"lora": {"layers": ["a"]}}}, "adapter.lora.layers", "'a'"),
        ({"adapter": {"lora": {"layers": "[4,"}}}, "adapter.lora.layers", "'[4,'"),
        ({"adapter": {"lora": {"target_modules": [["a"]]}}}, "adapter.lora.target_modules", "['a']"),
    ],
)
def test_wrong_type(tree: dict[str, Any], place: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_tree(tree)
    message = str(caught.value)
    assert message.startswith(f"{place}: expected ")
    assert f"found {found}; " in message


@pytest.mark.parametrize(
    ("override_text", "place"),
    [
        ("rounds=0", "rounds"),
        ("seed=-1", "seed"),
        (f"seed={2**63}", "seed"),
        ("name=Not OK", "name"),
        ("adapter.lora.rank=0", "adapter.lora.rank"),
        ("adapter.lora.dropout=1", "adapter.lora.dropout"),
        ("adapter.prompt_tuning.virtual_tokens=0", "adapter.prompt_tuning.virtual_tokens"),
        ("federation.cohort=13", "federation.cohort"),
        ("federation.quorum=7", "federation.quorum"),
        ("training.learning_rate=0", "training.learning_rate"),
        ("training.steps=0", "training.steps"),
        ("aggregation.stages.clip_norm=-1", "aggregation.stages.clip_norm"),
        ("federation.most_update_norm=-1", "federation.most_update_norm"),
        ("federation.ranks.listed.ranks=", "federation.ranks.listed.ranks"),
        ("federation.ranks.listed.ranks=2,0", "federation.ranks.listed.ranks"),
        ("federation.ranks.declared.default=0", "federation.ranks.declared.default"),
        ("federation.ranks.by_memory.ranks=2,4", "federation.ranks.by_memory.gigabytes"),
        ("federation.ranks.by_memory.gigabytes=4,3,2,1", "federation.ranks.by_memory.gigabytes"),
        ("aggregation.merge.fedavg.weights=votes", "aggregation.merge.fedavg.weights"),
        ("aggregation.merge.fedavg.missing=one", "aggregation.merge.fedavg.missing"),
        ("aggregation.merge.hetlora.keep=1.5", "aggregation.merge.hetlora.keep"),
        ("aggregation.merge.flora.budget=-1", "aggregation.merge.flora.budget"),
        ("aggregation.merge.lora_fair.strength=0", "aggregation.merge.lora_fair.strength"),
        ("data.test_fraction=1", "data.test_fraction"),
        ("data.partition.by.dirichlet.alpha=0", "data.partition.by.dirichlet.alpha"),
        ("evaluation.metric=f2", "evaluation.metric"),
        ("model.precision=int8", "model.precision"),
        ("compute.cpus_per_client=0", "compute.cpus_per_client"),
    ],
)
def test_out_of_range(override_text: str, place: str) -> None:
    message = refusal(override_text)
    assert message.startswith(f"{place}: expected ")
    assert "found " in message


@pytest.mark.parametrize("text", ["rounds", "=3", "", " = "])
def test_override_that_is_no_assignment(text: str) -> None:
    assert refusal(text).startswith("--set: expected key=value, found")


@pytest.mark.parametrize("keys", [("a", "a.b"), ("a.b", "a"), ("a.b.c", "a.b")])
def test_key_that_is_both_a_value_and_a_table(keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="remove one of the two keys"):
        nest(dict.fromkeys(keys, 1))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: expected a TOML file, found no such file"):
        load(tmp_path / "absent.toml")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file, found"):
        load(tmp_path)


def test_file_in_place_of_a_folder(write: Any) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file, found"):
        load(write("rounds = 3\n") / "run.toml")


def test_not_toml(write: Any) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: expected a TOML file, found .*line 2"):
        load(write("rounds = 3\nseed =\n"))


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"name = '\xff'\n")
    with pytest.raises(ConfigError, match="expected a TOML file, found"):
        load(path)


def test_error_in_a_file_names_the_key(write: Any) -> None:
    with pytest.raises(ConfigError, match=r"^training\.stepz: .* did you mean training\.steps\.$"):
        load(write("[training]\nstepz = 3\n"))
