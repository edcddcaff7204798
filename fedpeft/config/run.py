"""The settings of a whole run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fedpeft.config.adapters import ADAPTERS
from fedpeft.config.aggregation import AggregationConfig
from fedpeft.config.data import DataConfig
from fedpeft.config.federation import FederationConfig
from fedpeft.config.fields import Choice, choice, require, require_range
from fedpeft.config.observation import ObservationConfig
from fedpeft.config.privacy import PRIVACY
from fedpeft.config.tasks import TASKS
from fedpeft.config.training import EvaluationConfig, ModelConfig, TrainingConfig


@dataclass(frozen=True)
class ComputeConfig:
    """How a simulation uses this machine.

    `threads` of torch in each process (0: all cores; 1: bit-equal on every engine). Under Ray,
    `cpus_per_client` and `gpus_per_client` bound how many clients train at once, and `ray_address`
    names a running cluster (`host:port`). In-process, the clients of a round train together in one pass over the
    base that they share (`cohort = "on"`), one by one (`"off"`), or as a moment's measuring finds faster (`"auto"`); at
    most `cohort_tokens` tokens of several clients are in the model at once. Above 1, `workers` are processes that
    divide a round's clients and the `threads` of the machine among them, and have the base between them; 0 is one for
    each thread, as far as there are clients.
    """

    threads: int = 0
    cpus_per_client: float = 1.0
    gpus_per_client: float = 0.0
    ray_address: str = ""
    cohort: str = "off"
    cohort_tokens: int = 4096
    workers: int = 1

    def __post_init__(self) -> None:
        require_range(self, "threads", 0)
        require(self.cpus_per_client > 0, "cpus_per_client", expected="above 0", found=self.cpus_per_client)
        require(self.cohort in ("auto", "on", "off"), "cohort", expected="auto, on or off", found=self.cohort)
        require_range(self, "cohort_tokens", 1)
        require_range(self, "workers", 0)
        require_range(self, "gpus_per_client", 0.0)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. `out` is the run folder (empty: `runs/NAME`)."""

    name: str = "run"
    out: str = ""
    seed: int = 0
    rounds: int = 10
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: Choice = choice(ADAPTERS, "lora")
    task: Choice = choice(TASKS, "sequence_classification")
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    privacy: Choice = choice(PRIVACY, "none")
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    observation: ObservationConfig = field(default_factory=ObservationConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[a-z0-9_-]{1,64}", self.name) is not None,
            "name",
            expected="1 to 64 of a-z, 0-9, _ and -",
            found=self.name,
            remedy="rename the run",
        )
        require_range(self, "seed", 0, 2**63 - 1)
        require_range(self, "rounds", 1)
        alone = self.compute.cohort == "off" and self.privacy.name != "example" and not self.training.cache_gigabytes
        require(
            alone or not self.training.compiled,
            "training.compiled",
            expected='compute.cohort = "off", no cache and no privacy of examples, none of which is compiled',
            found=self.training.compiled,
            remedy='set training.compiled = "", or do without these',
        )
        threads, workers = self.compute.threads, self.compute.workers
        require(
            workers == 1 or threads == 0 or workers <= threads or self.model.device.startswith("cuda"),
            "compute.workers",
            expected=f"at most {threads}, the threads that workers divide among themselves",
            found=workers,
            remedy="lower compute.workers, or raise compute.threads where the machine has more cores",
        )

    def workers_on(self, cores: int) -> int:
        """How many worker processes the settings mean on a machine of so many cores."""
        compute = self.compute
        return compute.workers or max(1, min(compute.threads or cores, cores, self.federation.cohort))
