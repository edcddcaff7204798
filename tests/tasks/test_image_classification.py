import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fedpeft import models
from fedpeft.bases import ImageProcessor, load_tokenizer
from fedpeft.config import RunConfig
from fedpeft.config.adapters import Lora
from fedpeft.config.tasks import ImageClassification
from fedpeft.config.training import ModelConfig
from fedpeft.data.fields import Row
from fedpeft.errors import ConfigError, DataError, ModelError, PlanError
from fedpeft.evaluation import evaluate
from fedpeft.experiment import adapted_model, check_plan, evaluator_of
from fedpeft.federate import federate
from fedpeft.models import AdaptedModel
from fedpeft.runs import folder_for
from fedpeft.tasks import build_task, with_labels
from fedpeft.tasks.image_classification import collate, resized
from tests import tiny, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("down", "left", "plain")
SETTINGS = ImageClassification(labels=LABELS, image_size=24)
CPU = torch.device("cpu")
LORA = Lora(rank=3, alpha=6.0, target_modules=("q_proj", "v_proj"))
BASES = ("dinov2", "vit")
every_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models made for images of 16 pixels; only DINOv2's says how images are prepared."""
    folders = {base: tmp_path_factory.mktemp(base) for base in BASES}
    for base, folder in folders.items():
        tiny_models.MODELS[base]().save_pretrained(str(folder))
    told = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 128}
    (folders["dinov2"] / "preprocessor_config.json").write_text(json.dumps({**told, **colours}))
    return folders


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two groups: dark below, dark on the left, or neither."""
    root, random = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for at in range(72):
        image = random.integers(120, 256, (20, 20), np.uint8)
        if at % 3 == 0:
            image[10:] //= 8
        if at % 3 == 1:
            image[:, :10] //= 8
        folder = root / ("day", "night")[at % 2] / LABELS[at % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{at}.png")
    return root


def rows_in(root: Path) -> list[Row]:
    files = sorted(root.glob("*/*/*.png"))
    return [Row("", path.parent.name, path.parents[1].name, {"image": str(path)}) for path in files]


def load(source: Path, seed: int = 0) -> AdaptedModel:
    return models.load(ModelConfig(source=str(source), device="cpu"), LORA.build(), SETTINGS.head, seed)


def test_a_base_says_how_it_sees_images_or_they_go_from_minus_one_to_one(bases: dict[str, Path]) -> None:
    told, untold = (load_tokenizer(ModelConfig(source=str(bases[base]))) for base in BASES)
    assert told == ImageProcessor(32, 1 / 128, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert untold == ImageProcessor(16, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 30, "do_normalize": False, "do_rescale": False}, ImageProcessor(30, 1.0, (0.0,) * 3, (1.0,) * 3)),
        (
            {"size": {"shortest_edge": 28}, "image_mean": 0.2, "image_std": [0.1]},
            ImageProcessor(28, 1 / 255, (0.2,) * 3, (0.1,) * 3),
        ),
        ({"image_processor": {"size": {"height": 8, "width": 8}}}, ImageProcessor(8, 1 / 255, (0.5,) * 3, (0.5,) * 3)),
    ],
)
def test_settings_of_images_come_in_several_forms(settings: Any, expected: ImageProcessor, tmp_path: Path) -> None:
    tiny_models.vit().save_pretrained(str(tmp_path))
    name = "processor_config.json" if "image_processor" in settings else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(settings))
    source = ModelConfig(source=str(tmp_path))
    found = load_tokenizer(source)
    assert found == expected
    found.save_pretrained(str(tmp_path))
    assert load_tokenizer(source) == expected


def test_settings_that_are_torn_are_one_sentence(tmp_path: Path) -> None:
    tiny_models.vit().save_pretrained(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(ModelError, match=r"model\.source .*: expected a model that transformers can load"):
        load_tokenizer(ModelConfig(source=str(tmp_path)))


def test_a_batch_is_scaled_and_normalised_by_hand(bases: dict[str, Path], tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    task = build_task(ImageClassification(labels=LABELS))
    processor = load_tokenizer(ModelConfig(source=str(bases["dinov2"])))
    row = Row("", "left", "day", {"image": str(tmp_path / "a.png")})
    (example,) = task.encode([row], processor, "here")
    assert (example.label, example.group, example.size) == (1, "day", 1)
    batch = task.collate([example, example], 0, CPU)
    expected = (image.transpose(2, 0, 1) / 128 - np.array([[[0.1]], [[0.2]], [[0.3]]])) / [[[0.4]], [[0.5]], [[0.6]]]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    np.testing.assert_allclose(batch["pixel_values"][1], expected, rtol=1e-5, atol=1e-6)
    assert batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize("side", [8, 28, 60])
def test_resizing_is_pillows_bilinear(side: int) -> None:
    image = np.random.default_rng(2).integers(0, 256, (28, 20, 3), np.uint8)
    expected = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)).astype(float)
    found = resized(image, side).numpy().transpose(1, 2, 0)
    assert abs(found - expected).max() <= 1
    assert abs(found - expected).mean() < 0.2
    assert (found == found.round()).all()


@every_base
def test_another_size_than_the_bases_own_is_learned_from(base: str, bases: dict[str, Path], stripes: Path) -> None:
    adapted, task = load(bases[base]), build_task(SETTINGS)
    examples = task.encode(rows_in(stripes)[:6], adapted.tokenizer, "here")
    batch = task.collate(examples, 0, CPU)
    assert batch["pixel_values"].shape == (6, 3, 24, 24)
    loss = task.loss(adapted.model, batch)
    torch.autograd.backward(loss)
    assert any(binding.parameter.grad.abs().max() > 0 for binding in adapted.bindings.values())
    inner: Any = adapted.model.get_base_model()  # type: ignore[operator]
    stretch = {"interpolate_pos_encoding": True} if base == "vit" else {}
    logits = inner(pixel_values=batch["pixel_values"], **stretch).logits.detach()
    assert float(loss.detach()) == pytest.approx(float(functional.cross_entropy(logits, batch["labels"])), rel=1e-6)
    found = evaluate(adapted, task, examples, 4)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == batch["labels"]).float().mean()))


@every_base
def test_at_its_own_size_a_base_is_as_it_is_published(base: str, bases: dict[str, Path], stripes: Path) -> None:
    adapted, task = load(bases[base]), build_task(ImageClassification(labels=LABELS, image_size=16))
    batch = task.collate(task.encode(rows_in(stripes)[:3], adapted.tokenizer, "here"), 0, CPU)
    inner: Any = adapted.model.get_base_model()  # type: ignore[operator]
    expected = functional.cross_entropy(inner(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    torch.testing.assert_close(task.loss(adapted.model, batch), expected)


def test_images_are_mirrored_by_the_jobs_own_coins_and_only_in_training(bases: dict[str, Path], stripes: Path) -> None:
    adapted = load(bases["vit"])
    plain, flipped = (build_task(ImageClassification(LABELS, 16, flip=flip)) for flip in (False, True))
    examples = plain.encode([row for row in rows_in(stripes) if row.label == "left"][:8], adapted.tokenizer, "here")
    batch = plain.collate(examples, 0, CPU)
    seen: list[float] = []
    for task, training in ((plain, True), (flipped, False), (flipped, True), (flipped, True)):
        adapted.model.train(training)
        torch.manual_seed(4)
        seen.append(float(task.loss(adapted.model, batch).detach()))
    torch.manual_seed(4)
    mirrored = torch.rand(8) < 0.5
    assert 0 < int(mirrored.sum()) < 8
    images = batch["pixel_values"].clone()
    images[mirrored] = images[mirrored].flip(-1)
    by_hand = float(plain.loss(adapted.model, {**batch, "pixel_values": images}).detach())
    assert seen[0] == seen[1]
    assert seen[2] == seen[3] == by_hand != seen[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row("", "up", fields={"image": "a.png"}), "here, row 2: .* labels down, left, plain, found 'up'; .*labels"),
        (Row("so", "left"), "here, row 2: expected an image, .* found no image"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_sentence(row: Row, said: str, bases: dict[str, Path]) -> None:
    processor = load_tokenizer(ModelConfig(source=str(bases["vit"])))
    good = Row("", "left", fields={"image": "a.png"})
    with pytest.raises(DataError, match=said):
        build_task(SETTINGS).encode([good, row], processor, "here")


def test_an_image_that_went_away_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    processor = load_tokenizer(ModelConfig(source=str(bases["vit"])))
    examples = build_task(SETTINGS).encode([Row("", "left", fields={"image": str(tmp_path / "a.png")})], processor, "")
    with pytest.raises(DataError, match=r"a\.png: expected an image, found .*No such file"):
        collate(examples, 0, CPU)


def test_a_base_of_texts_sees_no_images(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(source=str(tiny_model)))
    with pytest.raises(ModelError, match=r"model\.source: expected a base that reads images, found one of texts"):
        build_task(SETTINGS).encode([Row("", "left", fields={"image": "a.png"})], tokenizer, "here")


def test_a_size_that_the_base_does_not_take_is_refused_before_the_run(bases: dict[str, Path]) -> None:
    model = load(bases["vit"]).model
    for side, refused in ((24, False), (4, True)):
        admit = build_task(ImageClassification(labels=LABELS, image_size=side)).admit
        assert admit is not None
        if refused:
            with pytest.raises(PlanError, match=r"task\.image_classification\.image_size: .* found 4: .*patch"):
                admit(model)
        else:
            admit(model)


def test_labels_are_those_of_the_settings_or_else_of_the_rows(stripes: Path) -> None:
    assert with_labels(SETTINGS, rows_in(stripes)) is SETTINGS
    assert with_labels(ImageClassification(), rows_in(stripes)) == ImageClassification(labels=LABELS)
    with pytest.raises(ConfigError, match="labels"):
        ImageClassification(labels=("a",))


def run_config(source: Path, images: Path, out: Path) -> RunConfig:
    return tiny.run_config(
        source,
        images,
        out,
        rounds=3,
        task={"kind": "image_classification", "image_classification": {"image_size": 24}},
        adapter={"family": "lora", "lora": {"rank": 3, "alpha": 6.0, "target_modules": ["q_proj", "v_proj"]}},
        data={
            "origin": {"source": "images", "images": {"path": str(images), "groups": True}},
            "partition": {"by": {"rule": "dirichlet", "dirichlet": {"alpha": 1.0}}},
            "test_fraction": 0.25,
        },
        training={"steps": 6, "batch_size": 8, "learning_rate": 0.02},
    )


@every_base
def test_a_federation_gets_better_at_it_and_does_so_twice(
    base: str, bases: dict[str, Path], stripes: Path, tmp_path: Path
) -> None:
    adapters = []
    for name in ("one", "other"):
        config = run_config(bases[base], stripes, tmp_path / name)
        assert config.task.chosen.labels == LABELS
        check_plan(config, adapted_model(config))
        before = evaluator_of(config)(adapted_model(config).initial)
        folder = folder_for(config)
        after = federate(config, folder, tiny.transport(config, folder), engine="local")[-1]["evaluation"]
        assert after["accuracy"] > max(0.6, before["accuracy"])
        assert after["loss"] < before["loss"]
        assert {name: one["rows"] for name, one in after["groups"].items()} == {"day": 9, "night": 9}
        adapters.append((folder.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert json.loads((folder.adapter / "preprocessor_config.json").read_text())["image_mean"]
