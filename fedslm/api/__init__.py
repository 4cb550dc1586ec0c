"""The Python API: every run, and its result, by one call."""

from fedslm.api.result import RunResult
from fedslm.api.runs import resume, simulate
from fedslm.api.single import train

__all__ = ["RunResult", "resume", "simulate", "train"]
