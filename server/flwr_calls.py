"""Flower's command `flwr`, called as a program, and what it answers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Flwr:
    """The command as it is called with the environment `env`, from `folder` (None: this one).

    An answer is waited for `seconds`.
    """

    env: Mapping[str, str]
    seconds: float
    folder: Path | None = None

    def printed(self, *arguments: str) -> str:
        """What it prints; where it fails, is not there or does not answer in time, words that say so are among it."""
        output, words = self._called(arguments)
        return output + words

    def answer(self, *arguments: str) -> dict[str, Any]:
        """What it answers with `--format json`; where that is no object, `error-message` alone, with its words."""
        output, words = self._called((*arguments, "--format", "json"))
        try:
            found = json.loads(output[output.index("{") :])
        except ValueError:
            return {"error-message": words or output}
        return found if isinstance(found, dict) else {"error-message": output}

    def _called(self, arguments: tuple[str, ...]) -> tuple[str, str]:
        """What it prints, and the words of its failure."""
        try:
            done = subprocess.run(
                ("flwr", *arguments),
                env=dict(self.env),
                cwd=self.folder,
                timeout=self.seconds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "", f"no answer within {self.seconds:g} seconds"
        except OSError as error:
            return "", f"flwr cannot be called: {error.strerror or error}"
        return done.stdout, done.stderr if done.returncode else ""
