from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",
    RAY_USAGE_STATS_ENABLED="0",
)

# A law that holds is not broken by a slow machine; writing to disk makes some examples slow.
hypothesis.settings.register_profile("house", deadline=None, max_examples=60)
hypothesis.settings.load_profile("house")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a hostile test has logged may be no text that one process can send to another."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its tokenizer."""
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of labelled rows that the tiny model can learn."""
    from tests import tiny

    return tiny.write_rows(tmp_path_factory.mktemp("tiny-rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random decoder; its tokenizer has neither a pad token nor a chat template."""
    from tests import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder, whose tokenizer has a chat template."""
    from tests import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("tiny-chat"), chat=True)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random encoder and decoder."""
    from tests import tiny

    return tiny.build_t5(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def tiny_answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of texts with answers."""
    from tests import tiny

    return tiny.write_answers(tmp_path_factory.mktemp("tiny-answers") / "rows.jsonl")


@pytest.fixture(scope="session")
def tiny_targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of texts with targets."""
    from tests import tiny

    return tiny.write_answers(tmp_path_factory.mktemp("tiny-targets") / "rows.jsonl", role="target")


@pytest.fixture(scope="session")
def tiny_tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of words with tags."""
    from tests import tiny

    return tiny.write_tags(tmp_path_factory.mktemp("tiny-tags") / "rows.jsonl")


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, tiny_rows: Path) -> str:
    """The settings of a run of a second, as TOML."""
    return f"""
name = "tiny"
seed = 5
rounds = 3
model = {{ source = "{tiny_model}", device = "cpu" }}
adapter = {{ family = "lora", lora = {{ rank = 3, alpha = 5.0 }} }}
federation = {{ clients = 3, cohort = 2 }}
training = {{ steps = 2, batch_size = 4, learning_rate = 0.01 }}
compute = {{ threads = 1 }}
[data]
origin = {{ source = "jsonl", jsonl = {{ path = "{tiny_rows}", columns = {{ group = "kind" }} }} }}
test_fraction = 0.2
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch uses one thread: sums come out the same to the bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
