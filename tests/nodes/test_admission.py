from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from fedpeft.config import RunConfig, override
from fedpeft.config.node import LimitsConfig, NodeConfig
from fedpeft.errors import PacketError
from fedpeft.nodes import require_admissible
from tests.config.strategies import run_configs

NODE = NodeConfig()


def refusal(*overrides: str, node: NodeConfig = NODE) -> str:
    with pytest.raises(PacketError) as caught:
        require_admissible(override(RunConfig(), overrides), node)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@settings(max_examples=20)
@given(run_configs())
def test_settings_of_everyday_sizes_are_admitted(config: RunConfig) -> None:
    require_admissible(replace(config, model=replace(config.model, revision="refs/pr/1")), NODE)


@pytest.mark.parametrize(
    ("override_text", "most"),
    [
        ("adapter.lora.rank=1000000000", "8192"),
        ("adapter.prompt_tuning.virtual_tokens=1000000000", "8192"),
        ("adapter.p_tuning.hidden=1000000", "8192"),
        ("adapter.houlsby.size=1000000", "8192"),
        ("adapter.fourierft.frequencies=1000000000", "1048576"),
        ("adapter.tinylora.numbers=1000000000", "1048576"),
        ("task.sequence_classification.max_tokens=1000000000", "131072"),
        ("task.image_classification.image_size=100000", "2048"),
        ("training.batch_size=1000000", "4096"),
        ("training.steps=1000000000", "1000000"),
        ("evaluation.batch_size=1000000", "4096"),
        ("compute.threads=1000000", "1024"),
        ("federation.ranks.listed.ranks=2,1000000000", "8192"),
        ("adapter.lora.rank_pattern=query = 1000000000", "8192"),
        ('adapter.lora.options=["r = 1000000000"]', "8192"),
        (f"adapter.lora.target_modules={','.join(['query'] * 20000)}", "16384 items"),
        (f"task.causal_lm.template={{text}}{'x' * 5000}", "4096 characters"),
    ],
)
def test_a_size_that_would_fill_any_memory_is_refused(override_text: str, most: str) -> None:
    message = refusal(override_text)
    assert message.startswith(override_text.partition("=")[0])
    assert "at most" in message
    assert most in message


def test_seeds_may_be_any_number() -> None:
    texts = ["seed=9223372036854775807", 'adapter.vera.options=["projection_prng_key = 123456789"]']
    require_admissible(override(RunConfig(), texts), NODE)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*a", "a{1,9999}", "[a-z]+[a-z]+b", "(?=a)"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_may_match_for_ever_is_refused(key: str, pattern: str) -> None:
    message = refusal(f'adapter.lora.{key}=["{pattern} = 2"]')
    assert f"adapter.lora.{key}: expected patterns of letters" in message


@pytest.mark.parametrize("pattern", ["query", "layer.0.*", "layers.1.self_attn.q_proj", "query|value"])
def test_patterns_of_everyday_are_admitted(pattern: str) -> None:
    require_admissible(override(RunConfig(), [f'adapter.lora.rank_pattern=["{pattern} = 2"]']), NODE)


@pytest.mark.parametrize(
    "option",
    [
        'megatron_core = "antigravity"',
        'target_modules = "(a+)+$"',
        'exclude_modules = "(a+)+$"',
        'layers_pattern = "(a+)+$"',
        'tokenizer_name_or_path = "/etc"',
        'init_lora_weights = "/etc/passwd"',
        "layer_replication = [[0, 100000000]]",
        'auto_mapping = {"parent_library": "os", "base_model_class": "x"}',
        'modules_to_save = ["a"]',
    ],
)
def test_settings_of_pefts_own_load_no_code_and_take_no_files_or_patterns(option: str) -> None:
    quoted = option.replace('"', '\\"')
    assert "adapter.loha.options: expected numbers and switches" in refusal(f'adapter.loha.options=["{quoted}"]')


@pytest.mark.parametrize("option", ["use_rslora = true", 'bias = \\"none\\"', 'init_weights = \\"gaussian\\"', "r = 4"])
def test_settings_of_pefts_own_that_are_plain_are_admitted(option: str) -> None:
    require_admissible(override(RunConfig(), [f'adapter.loha.options=["{option}"]']), NODE)


@pytest.mark.parametrize("revision", ["../../x", "a b", "/etc"])
def test_a_revision_is_no_path(revision: str) -> None:
    assert "model.revision: expected a branch" in refusal(f"model.revision={revision}")


def test_rows_are_as_long_as_the_node_allows() -> None:
    node = NodeConfig(limits=LimitsConfig(tokens=100))
    require_admissible(override(RunConfig(), ["task.sequence_classification.max_tokens=100"]), node)
    message = refusal("task.sequence_classification.max_tokens=101", node=node)
    assert "task.sequence_classification.max_tokens: expected at most 100, this node's limits.tokens" in message
    message = refusal("task=seq2seq", "task.seq2seq.max_tokens=90", "task.seq2seq.max_target_tokens=101", node=node)
    assert message.startswith("task.seq2seq.max_target_tokens")
