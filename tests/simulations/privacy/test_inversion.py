"""Inputs that anybody can compute are those that a layer reads; attacks are judged by what was really trained on."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedpeft import models
from fedpeft.config import RunConfig
from fedpeft.config.tasks import CausalLM
from fedpeft.config.training import ModelConfig
from fedpeft.data.rows import Row
from fedpeft.errors import ConfigError, PlanError
from fedpeft.experiment import adapted_model, deal_rows
from fedpeft.models import extract, install, trained
from fedpeft.tasks.examples import Example
from simulations.privacy.inputs import first_inputs
from simulations.privacy.inversion import Inversion, common_words, judged, one_step
from simulations.privacy.recording import Recorded, public_of, record
from tests import tiny


def first_layer(**changes: Any) -> dict[str, Any]:
    return {"adapter": {"family": "lora", "lora": {"rank": 3, "alpha": 5.0, "layers": [0, 1]}}, **changes}


def test_inputs_of_single_words_are_what_the_first_layer_reads_of_a_text(tiny_config: Callable[..., RunConfig]) -> None:
    adapted = adapted_model(tiny_config(**first_layer()))
    inputs = first_inputs(adapted, adapted.initial, 6)
    assert [path.split("layer.")[1] for path in inputs.paths] == ["0.attention.self.query", "0.attention.self.value"]
    seen: list[torch.Tensor] = []
    module = dict(adapted.model.named_modules())[f"base_model.model.{inputs.paths[0]}"]
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    batch = tiny.batch()
    with torch.no_grad():
        adapted.model(**batch)
    hook.remove()
    for position in range(5):
        read = inputs.at(position)
        assert read.shape == (inputs.words, 16)
        np.testing.assert_allclose(read[batch["input_ids"][:, position]], seen[0][:, position].numpy(), atol=1e-5)
    assert inputs.positions == 6
    assert np.abs(inputs.at(0) - inputs.at(1)).max() > 0.01


def test_a_base_that_does_not_tell_positions_apart_there_has_one(tiny_llama: Path) -> None:
    adapted = tiny.load(tiny_llama, replace(tiny.FAMILIES["lora"], layers=(0,)))
    inputs = first_inputs(adapted, adapted.initial, 9)
    assert inputs.positions == 1
    assert all("layers.0.self_attn" in path for path in inputs.paths)


def test_modules_that_read_single_words_through_a_norm_of_their_own_are_left_out(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    settings = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        base = transformers.GPTNeoXForCausalLM(settings)
        torch.nn.init.normal_(base.gpt_neox.layers[0].post_attention_layernorm.weight)
        base.save_pretrained(str(tmp_path))
    both = replace(tiny.FAMILIES["lora"], target_modules=("query_key_value", "dense_h_to_4h"))
    adapted = models.load(ModelConfig(source=str(tmp_path), device="cpu"), both.build(), CausalLM().head, 0)
    inputs = first_inputs(adapted, adapted.initial, 4)  # attention and the layers beside it, each behind its norm
    assert len(adapted.spec.modules) == 2
    assert len(inputs.paths) == 1


def test_layers_that_read_whole_texts_are_no_way_in(tiny_config: Callable[..., RunConfig]) -> None:
    adapted = adapted_model(tiny_config(adapter={"family": "lora", "lora": {"rank": 3, "alpha": 5.0, "layers": [1]}}))
    with pytest.raises(PlanError, match=r"expected low-rank modules that read single words.*found 2 low-rank modules"):
        first_inputs(adapted, adapted.initial, 4)


def test_one_step_is_the_learning_rate_times_the_gradient_and_no_more(
    tiny_config: Callable[..., RunConfig], recorded: tuple[RunConfig, Recorded]
) -> None:
    config, run = recorded
    view = run.clients[-1]
    batch = run.batches[view.round, view.partition][:4]
    stepped = one_step(config, view, batch)
    public = public_of(config)
    adapted = public.adapted
    install(adapted, view.received)
    loss = public.task.loss(adapted.model, public.task.collate(list(batch), 0, adapted.device))
    parameters = trained(adapted)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for key, gradient in zip(parameters, gradients, strict=True):
        scale = adapted.bindings[key].scale
        np.testing.assert_allclose(
            stepped.delta[key], -config.training.learning_rate * scale * gradient.numpy(), atol=1e-6
        )
    assert stepped.examples == 4
    assert stepped.tokens == sum(example.size for example in batch)


def test_scores_are_judged_by_the_words_that_were_in_the_batch(tiny_config: Callable[..., RunConfig]) -> None:
    public = public_of(tiny_config())
    batch = (Example((2, 5, 6, 3), 0, ""), Example((2, 7, 3), 1, ""))
    scores = np.zeros(19)
    scores[[5, 6, 9]] = 2.0, 1.5, 1.8  # 5 and 6 were in the batch, 7 is missed, 9 is picked wrongly
    found = {one.metric.split(",")[0]: one for one in judged(Inversion(), [scores], [batch], public, 3)}
    assert (found["words found"].value, found["words found"].n) == (pytest.approx(1 / 3), 3)  # 6 is below 9
    assert found["words found by pursuit"].value == pytest.approx(2 / 3)
    assert found["of words found by pursuit"].value == pytest.approx(2 / 3)
    assert found["distinct words over rank"].value == pytest.approx(5 / 3)


def test_words_that_every_text_has_are_no_secret(tiny_config: Callable[..., RunConfig]) -> None:
    rows = [Row(f"the {word}", "yes") for word in ("film", "shop", "news")]
    public = public_of(tiny_config(), rows)
    known = common_words(public)
    assert public.adapted.tokenizer.convert_tokens_to_ids("the") in known
    assert public.adapted.tokenizer.convert_tokens_to_ids("film") not in known
    assert {0, 2, 3} <= known


@pytest.fixture
def worst_case(wide_model: Path, tiny_rows: Path) -> Callable[..., RunConfig]:
    """One text a batch, and one step."""

    def made(**changes: Any) -> RunConfig:
        return tiny.run_config(
            wide_model,
            tiny_rows,
            Path("nowhere"),
            rounds=4,
            adapter={"family": "lora", "lora": {"rank": 6, "alpha": 6.0, "layers": [0, 1]}},
            data={"partition": {"most_rows": 12}},
            training={"steps": 1, "batch_size": 1, "learning_rate": 0.01},
            evaluation={"every": 0},
            **changes,
        )

    return made


def metrics(settings: Inversion, config: RunConfig) -> dict[str, float]:
    return {one.metric.split(",")[0]: one.value for one in settings.run(config)}


def test_a_gradient_of_one_text_gives_its_words_away_and_noise_hides_them(
    worst_case: Callable[..., RunConfig],
) -> None:
    config = worst_case()
    bare = metrics(Inversion(update="gradient", false_positives=0.1, most=3), config)
    hidden = metrics(
        Inversion(update="gradient", false_positives=0.1, most=3, clip_norm=0.1, noise_multiplier=2.0), config
    )
    assert bare["words found"] >= 0.9
    assert hidden["words found"] <= 0.5
    assert bare["distinct words over rank"] == hidden["distinct words over rank"] < 2


def test_updates_as_sent_and_aggregates_can_be_attacked(worst_case: Callable[..., RunConfig]) -> None:
    config = worst_case()
    for settings in (Inversion(), Inversion(view="aggregate")):
        found = settings.run(config)
        assert {one.adversary for one in found} == {settings.adversary}
        assert all(0 <= one.low <= one.value <= one.high for one in found)


def test_rows_of_sites_with_frozen_a_are_attacked_by_b(worst_case: Callable[..., RunConfig]) -> None:
    config = worst_case(aggregation={"merge": {"rule": "ffa_lora"}})
    assert Inversion(update="gradient", after=0).run(config)[0].n > 0


def test_a_setting_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="view: expected client or aggregate, found 'server'"):
        Inversion(view="server")
    with pytest.raises(ConfigError, match="update: expected sent, with the view aggregate"):
        Inversion(view="aggregate", update="gradient")


def test_held_out_rows_alone_are_public(worst_case: Callable[..., RunConfig]) -> None:
    config = worst_case()
    dealt = deal_rows(config)
    assert not {row.text for row in dealt.test} & {row.text for site in dealt.sites for row in site}
    assert record(config).final.adapter.spec == extract(adapted_model(config)).spec
