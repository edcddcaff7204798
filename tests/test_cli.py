"""The command line, as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from fedpeft.adapters import AdapterSpec, ModuleSpec
from fedpeft.cli import main
from fedpeft.commands.check import costs, traffic
from fedpeft.experiment import adapted_model
from fedpeft.federate import federate
from fedpeft.report.units import human_bytes
from fedpeft.runs import folder_for
from fedpeft.sinks import KINDS
from fedpeft.wire import Failure, Packet, Transport
from tests import tiny


class Result(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Result]


@pytest.fixture
def fedpeft(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Command:
    """The command, run in this process as if started in `folder`."""

    def run(*arguments: str, folder: Path) -> Result:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["fedpeft", *arguments])
        capfd.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Result(int(str(code)), *capfd.readouterr())

    return run


def in_a_process(*arguments: str, folder: Path, **environment: str) -> Result:
    """The command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fedpeft", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Counted:
    """A transport that notes the bytes of every payload, by partition, one entry an exchange."""

    inner: Transport
    down: list[dict[int, int]] = field(default_factory=list)
    up: list[dict[int, int]] = field(default_factory=list)

    def partitions(self) -> tuple[int, ...]:
        return self.inner.partitions()

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        self.down.append({partition: len(packet.body) for partition, packet in requests.items()})
        self.up.append({})
        for partition, reply in self.inner.exchange(requests, timeout_seconds):
            if isinstance(reply, Packet):
                self.up[-1][partition] = len(reply.body)
            yield partition, reply


def settings(tiny_run: str, folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(tiny_run, encoding="utf-8")
    return path


def one_sentence(result: Result, *parts: str) -> None:
    """A user's mistake: exit code 2, one line that names what it should, and no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for part in ("expected", "found", *parts):
        assert part in lines[0]


def test_help_names_every_command_and_needs_no_torch(tmp_path: Path) -> None:
    result = in_a_process("--help", folder=tmp_path)
    assert result.returncode == 0
    for command in ("simulate", "check", "data", "report", "export", "new", "assets"):
        assert command in result.stdout
    code = "import sys, fedpeft.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_completion_can_be_shown(tmp_path: Path) -> None:
    disabled = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = in_a_process("--show-completion", "bash", folder=tmp_path, **disabled)
    assert result.returncode == 0
    assert "complete" in result.stdout


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.step=3", ("training.step", "training.steps")),
        ("rounds=0", ("rounds", "at least 1")),
        ("federation.cohort=99", ("federation", "cohort")),
        ("adapter.family=lorra", ("adapter.family", "lora")),
        ("model.source=no/such-model", ("model.source",)),
        ("data.origin.jsonl.columns.text=sentence", ("sentence",)),
        ("data.partition.least_rows=1000", ("partition",)),
        ("data.origin.jsonl.path=absent.jsonl", ("absent.jsonl",)),
        ("adapter.lora.target_modules=nowhere", ("adapter.lora",)),
        ("aggregation.stages.frozen=nothing*", ("nothing*",)),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(
    fedpeft: Command, tiny_run: str, tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    path = settings(tiny_run, tmp_path)
    result = fedpeft("simulate", str(path), "--set", "out=run", "--set", override, folder=tmp_path)
    one_sentence(result, *parts)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_the_way_is_left_alone(fedpeft: Command, tiny_run: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine", encoding="utf-8")
    result = fedpeft("simulate", str(settings(tiny_run, tmp_path)), "--set", "out=run", folder=tmp_path)
    one_sentence(result, "run", "--resume")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_neither_settings_nor_a_run_is_a_mistake(fedpeft: Command, tmp_path: Path) -> None:
    one_sentence(fedpeft("simulate", folder=tmp_path), "--resume")


def test_resuming_what_is_not_a_run_is_a_mistake_in_a_process_too(tmp_path: Path) -> None:
    one_sentence(in_a_process("simulate", "--resume", "absent", folder=tmp_path), "absent")


def test_a_run_from_settings_to_export(fedpeft: Command, tiny_run: str, tmp_path: Path) -> None:
    path = settings(tiny_run, tmp_path)
    checked = fedpeft("check", str(path), folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "a client sends" in checked.stdout

    shown = fedpeft("data", str(path), "--picture", "who.png", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "who.png").stat().st_size > 1000

    ran = fedpeft("simulate", str(path), "--set", "out=run", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "federation" in ran.stdout
    assert "pooled data" in ran.stdout
    names = {item.name for item in (tmp_path / "run").iterdir()}
    assert {"adapter", "checkpoint", "config.toml", "journal.jsonl", "report.html"} <= names

    assert fedpeft("report", "run", "--pictures", "plots", folder=tmp_path).returncode == 0
    assert (tmp_path / "plots" / "merge-error.svg").exists()
    assert "| federation (fedavg) |" in fedpeft("report", "run", "--markdown", folder=tmp_path).stdout
    assert "| run |" in fedpeft("report", "run", "run", "--markdown", folder=tmp_path).stdout
    assert fedpeft("export", "run", "--out", "merged", "--merged", folder=tmp_path).returncode == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    one_sentence(fedpeft("export", "run", "--out", "merged", folder=tmp_path), "merged")
    one_sentence(fedpeft("simulate", "--resume", "run", "--set", "rounds=9", folder=tmp_path), "rounds=9")


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        # 4 LoRA modules of 16 × 16: 512 B a rank; a head of 3 × 16 + 3 numbers: 204 B. 4 rounds, 2 of 3 clients each.
        (
            ("aggregation.merge.rule=fedavg",),
            {
                "merge rule": "fedavg",
                "ranks": "equal: 3",
                "a client receives": "1.74 kB a round",
                "a client sends": "1.74 kB a round",
                "a round moves": "6.96 kB over 2 clients",
                "the run moves": "27.8 kB over 4 rounds",
            },
        ),
        (
            ("aggregation.merge.rule=flora", "federation.ranks.rule=listed", "federation.ranks.listed.ranks=[1, 3]"),
            {
                "merge rule": "flora",
                "ranks": "listed: 1, 3",
                "rank 1 receives": "716 B a round",
                "rank 1 sends": "716 B a round",
                "rank 3 receives": "1.74 kB a round",
                "rank 3 sends": "1.74 kB a round",
                # Of three sites two have rank 1: 2 clients × 2 ways × (716 + 1740 + 716) / 3.
                "a round moves": "about 4.23 kB over 2 clients",
                "the base takes up": "a residual of rank up to 16; an export has that on top of rank 3",
                "the residual adds": "at most 8.19 kB to what a client receives in a round",
            },
        ),
        (
            ("aggregation.merge.rule=flora", "aggregation.merge.flora.budget=5", "federation.ranks.rule=declared"),
            {
                "ranks": "declared: as each node says, 1 to 3",
                "rank 2 sends": "1.23 kB a round",
                "a round moves": "2.86 kB to 6.96 kB over 2 clients",
                "the base takes up": "a residual of rank up to 5; an export has that on top of rank 3",
                "the residual adds": "at most 2.56 kB to what a client receives in a round",
            },
        ),
        # A, 768 B, is sent once; B and the head after that.
        (
            ("aggregation.merge.rule=ffa_lora",),
            {
                "a client receives": "972 B a round, 1.74 kB the first time",
                "a client sends": "972 B a round",
                "the run moves": "17.9 kB over 4 rounds",
            },
        ),
        # 25 bits each, whatever the rank: 4 sketches of 16 × 14 and a head of 51; then 4 projections of 14 × 16.
        (
            (
                "aggregation.merge.rule=flexlora",
                "aggregation.merge.flexlora.weights=uniform",
                "federation.channel.kind=secure",
                "federation.ranks.rule=listed",
                "federation.ranks.listed.ranks=[1, 3]",
            ),
            {
                "rank 1 sends": "5.76 kB a round",
                "rank 3 sends": "5.76 kB a round",
                "rank 1 receives": "4.30 kB a round",
                "rank 3 receives": "5.32 kB a round",
                "not counted": "keys and shares of secure sums",
            },
        ),
        (("adapter.family=ia3",), {"merge rule": "fedavg", "a client receives": "780 B a round"}),
    ],
)
def test_a_check_tells_what_each_rank_sends_and_what_the_rule_adds(
    fedpeft: Command, tiny_run: str, tmp_path: Path, changes: tuple[str, ...], rows: dict[str, str]
) -> None:
    asked = [
        part for change in ("rounds=4", "federation.ranks.declared.default=2", *changes) for part in ("--set", change)
    ]
    checked = fedpeft("check", str(settings(tiny_run, tmp_path)), *asked, folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    told = dict(line.split("  ", 1) for line in checked.stdout.splitlines() if "  " in line)
    assert {what: told[what].strip() for what in rows} == rows
    assert ("the base takes up" in told) == ("the base takes up" in rows)


def test_a_check_tells_of_a_sink_whose_library_is_missing(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {name: KINDS[name]._replace(library=f"no_{name}") for name in ("wandb", "prometheus")}
    for name, kind in lacking.items():
        monkeypatch.setitem(KINDS, name, kind)  # type: ignore[arg-type]
    asked = {"sinks": ["wandb", "tensorboard", "prometheus"]}
    told = dict(costs(tiny.run_config(tiny_model, tiny_rows, tmp_path / "run", observation=asked)).rows)
    assert {what: how for what, how in told.items() if what.startswith("no sink")} == {
        "no sink wandb": "no_wandb is not installed: pip install 'fedpeft[trackers]'",
        "no sink prometheus": "no_prometheus is not installed: pip install 'fedpeft[monitoring]'",
    }


def test_a_check_of_layers_that_take_turns_tells_least_most_and_mean(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path, aggregation={"stages": {"turns": 3}}, seed=11)
    layers = (ModuleSpec(f"layer.{n}", "lora", 3, 1.0, (("A", (3, 10)), ("B", (n, 3)))) for n in (2, 4, 6))
    told = dict(traffic(config, AdapterSpec("base", "lora", tuple(layers))))
    # The layers are 30 numbers and 6, 12 or 18 more: 144, 168 and 192 B up, 504 B down at most.
    assert told["a client receives"] == "at most 504 B a round"
    assert told["a client sends"] == "144 B to 192 B a round, 168 B in the mean"


def test_a_check_of_a_rule_that_alternates_tells_both_rounds(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path, aggregation={"merge": {"rule": "rolora"}}, seed=11)
    module = ModuleSpec("q", "lora", 3, 1.0, (("A", (3, 10)), ("B", (6, 3))))
    told = dict(traffic(config, AdapterSpec("base", "lora", (module,))))
    # A is 30 numbers, B 18: down go both, 192 B; up B, 72 B, or A, 120 B; 2 clients, 4 rounds.
    assert told["a client receives"] == "192 B a round"
    assert told["a client sends"] == "72 B in odd rounds, 120 B in even ones"
    assert told["a round moves"] == "576 B over 2 clients"
    assert told["the run moves"] == "2.30 kB over 4 rounds"


@pytest.mark.parametrize(
    ("rule", "scaffold"),
    [
        ("fedavg", False),
        ("fedavg", True),
        ("ffa_lora", False),
        ("rolora", False),
        ("fedsa_lora", False),
        ("flora", False),
    ],
)
def test_a_check_agrees_with_what_a_run_sends(
    rule: str, scaffold: bool, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    ranks = {"rule": "equal" if scaffold else "listed", "listed": {"ranks": [1, 2, 3]}}
    config = tiny.run_config(
        tiny_model,
        tiny_rows,
        tmp_path / "run",
        seed=11,
        federation={"clients": 3, "cohort": 3, "ranks": ranks},
        aggregation={"merge": {"rule": rule}},
        evaluation={"every": 0},
        training={"scaffold": scaffold},
    )
    told = dict(traffic(config, adapted_model(config).spec))
    folder = folder_for(config)
    counted = Counted(tiny.transport(config, folder))
    federate(config, folder, counted, engine="local")
    residual = max(down[site] - counted.down[0][site] for down in counted.down for site in down)
    if "the residual adds" in told:
        # Fresh ranks 6, 12, 18 meet weights of 16 × 16: after round 3 all 16 columns of 4 modules go down anew.
        assert residual == 4 * 16 * (16 + 16) * 4
        assert told["the residual adds"].startswith(f"at most {human_bytes(residual)} ")
    else:
        assert residual == 0
        total = sum(sum(sizes.values()) for sizes in (*counted.down, *counted.up))
        about = "" if scaffold else "about "
        assert told["the run moves"] == f"{about}{human_bytes(total)} over 4 rounds"


def test_a_new_project_is_a_flower_app_that_checks(fedpeft: Command, tmp_path: Path) -> None:
    made = fedpeft("new", "my-hospital", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    project = tmp_path / "my-hospital"
    checked = fedpeft("check", "simulations/first.toml", folder=project)
    assert checked.returncode == 0, checked.stderr
    built = subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), "build"],
        cwd=project,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    imported = [sys.executable, "-c", "import clients.app, server.app; clients.app.app, server.app.app"]
    assert subprocess.run(imported, cwd=project, timeout=120, check=False).returncode == 0
    one_sentence(fedpeft("new", "my-hospital", folder=tmp_path), "my-hospital")
    one_sentence(fedpeft("new", "not a name", folder=tmp_path), "not a name")
