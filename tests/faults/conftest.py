"""The in-process engine's fixtures, to compare with."""

from tests.engines.conftest import demo, in_process

__all__ = ["demo", "in_process"]
