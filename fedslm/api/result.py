"""The result of a run, and what can be done with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from fedslm import layout
from fedslm.errors import ConfigError, DataError, Problem
from fedslm.records import epsilon_of_json
from fedslm.rendering import spent

if TYPE_CHECKING:
    from fedslm.api.students import Proof
    from fedslm.inference.trained import FinishedRun, Trained


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        directory: The run directory, with ``report.md`` and ``report.png``.
        adapter: The PEFT adapter's directory, for ``PeftModel.from_pretrained``.
        rounds: Number of completed rounds.
        metrics_before: Metrics of the base model on the public evaluation split.
        metrics_after: Metrics of the tuned model on the same split.
        epsilon: Epsilon at ``delta``: the largest over the clients, or that of all clients composed if
            units overlap; infinite without privacy.
        delta: Delta of the guarantee; None without privacy.
        stopped: Why the run stopped before its last round, or why it changed nothing; otherwise empty.
        report: The content of ``report.json``.
    """

    directory: Path
    adapter: Path
    rounds: int
    metrics_before: Mapping[str, float]
    metrics_after: Mapping[str, float]
    epsilon: float
    delta: float | None
    stopped: str
    report: Mapping[str, Any] = field(repr=False)

    def rounds_table(self) -> list[dict[str, Any]]:
        """Returns one dict for each round: its metrics, epsilon, bytes, seconds and counts.

        A metric is a key ``metrics.NAME``; it is missing in a round that was not evaluated.

        Raises:
            RunError: The run directory is gone or damaged.
        """
        from fedslm.federation.checkpoint import RunDirectory

        rows = [asdict(each) for each in RunDirectory.open(self.directory)[0].records()]
        for row in rows:
            row |= {f"metrics.{name}": value for name, value in row.pop("metrics").items()}
        return rows

    @property
    def history(self) -> Any:
        """The rounds as a pandas frame, by round; :meth:`rounds_table` if pandas is not installed."""
        rows = self.rounds_table()
        try:
            import pandas as pd
        except ImportError:
            return rows
        return pd.DataFrame(rows).set_index("round") if rows else pd.DataFrame()

    def load_adapter(self) -> Any:
        """Returns the base model with the trained adapter, a ``peft.PeftModel`` of its own.

        Raises:
            ModelError: The base model is missing or a different one, or the adapter was modified.
        """
        from fedslm.inference.trained import load_separately, open_run

        return load_separately(open_run(self.directory)).model.adapter.network

    def predict(self, texts: str | Sequence[Any]) -> list[dict[str, Any]]:
        """Predicts classes, entities or next words, as ``fedslm predict`` does.

        Args:
            texts: Texts, or lists of words for tagging; a single text counts as a list of one.

        Returns:
            One dict for each text, in order: the text, the prediction and the largest probabilities.

        Raises:
            ConfigError: The task generates text, or the argument is no list.
            DataError: An item is not a text.
            ModelError: As :meth:`load_adapter`.
        """
        from fedslm.inference.prediction import check_task, predict

        listed, trained = _listed(texts, "texts"), self._opened()
        check_task(trained)
        rows = [{trained.data.text_column: each} for each in listed]
        return list(predict(_loaded(trained), rows))

    def generate(
        self,
        prompts: str | Sequence[Any],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
    ) -> list[list[str]]:
        """Generates texts, as ``fedslm generate`` does.

        Args:
            prompts: Texts, or dicts with the columns of ``task.prompt``; a single one counts as a list.
            max_tokens: Most new tokens; None: the targets' limit in training, or 64.
            temperature: 0: greedy decoding; 1: sample from the model's distribution.
            samples: Number of texts for each prompt; more than 1 needs a temperature.
            seed: The same seed samples the same texts.

        Returns:
            The texts for each prompt, in order.

        Raises:
            ConfigError: The task does not generate text, or a value is out of range.
            DataError: A prompt is empty.
            ModelError: As :meth:`load_adapter`.
        """
        from fedslm.inference import generation

        given, run = _listed(prompts, "prompts"), self._opened()
        generation.check_task(run)
        rows = [_prompt_row(each, generation.prompt_columns(run)) for each in given]
        trained = _loaded(run)
        most = generation.default_max_tokens(trained) if max_tokens is None else max_tokens
        sampling = generation.Sampling(most, temperature, samples, seed)
        return list(generation.write(trained, generation.prompts_of(trained, rows, most), sampling))

    def evaluate(
        self, data: Any = None, *, resamples: int = 2000, max_generated: int = 0
    ) -> dict[str, Any]:
        """Compares the trained model with its base, with 95 % intervals, as ``fedslm evaluate`` does.

        Figures on private data have no epsilon guarantee: keep them where the data is.

        Args:
            data: A data set, a list of dicts or a pandas frame; None: the run's public split.
            resamples: Bootstrap resamples, at least 1000.
            max_generated: Records to generate and score texts for; 0: none.

        Returns:
            ``metrics`` (name to base, tuned and difference, each with value, low and high), ``records``
            and how many were skipped or cut.

        Raises:
            ConfigError: A value is out of range, or the data is of another type.
            DataError: The data lacks a column, or the run's own split was deleted.
            ModelError: As :meth:`load_adapter`.
        """
        from fedslm.inference import evaluation, tables

        run = self._opened()
        rows = evaluation.own_rows(run) if data is None else _rows_for(run, data)
        options = evaluation.EvaluationOptions(resamples, max_generated)
        found = evaluation.evaluate(_loaded(run), rows, lambda done, total: None, options)
        return tables.json_of(found)

    def audit(self, *, others: Sequence[Path | str] = (), empirical: bool = True) -> dict[str, Any]:
        """Audits the run; writes ``audit.md``, ``audit.html`` and ``audit.json`` into its directory.

        Args:
            others: Directories of other runs on the same data, such as tuning: their charges count.
            empirical: Also attack the mechanism with canaries, for a measured lower bound of epsilon.

        Returns:
            The content of ``audit.json``; ``findings`` is empty if there are no problems.

        Raises:
            PrivacyError: The run had no privacy.
            RunError: Its files are damaged.
        """
        from fedslm.audit.runs import audit_run

        return audit_run(self.directory, others=tuple(map(Path, others)), empirical=empirical)

    def export(self, directory: Path | str, *, merge: bool = False, dtype: Any = None) -> Path:
        """Exports the PEFT adapter, or a plain transformers model, as ``fedslm export`` does.

        Args:
            directory: A directory that does not exist or is empty.
            merge: Merge the adapter into the base's weights.
            dtype: Precision of merged weights: "float32" (None), "float16" or "bfloat16".

        Returns:
            The directory.

        Raises:
            ConfigError: ``dtype`` is unknown, or is given without ``merge``.
            ModelError: As :meth:`load_adapter`.
            RunError: The directory is not empty, or cannot be written.
        """
        from fedslm.inference import export

        if dtype is not None and (not merge or dtype not in get_args(export.Precision)):
            known = ", ".join(get_args(export.Precision))
            message = f"value {dtype!r} should be one of {known}, with merge=True"
            raise ConfigError([Problem("dtype", message)])
        if merge:
            export.export_merged(self._opened(), Path(directory), dtype or "float32")
        else:
            export.export_adapter(self._opened(), Path(directory))
        return Path(directory)

    def distill(
        self,
        student: Path | str,
        data: Path | str,
        *,
        directory: Path | str | None = None,
        overrides: Mapping[str, Any] = MappingProxyType({}),
        drop_overlap: bool = False,
        prove: bool | Proof = False,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Distills the model into a larger one on public records, as ``fedslm distill`` does.

        Formal guarantee: the student has the epsilon of the adapter and spends nothing.

        Args:
            student: The larger model: a hub name or a directory.
            data: Public records: a path, a hub name or "demo".
            directory: Output directory; None: ``distilled`` in the run directory. An interrupted
                distillation continues there.
            overrides: Keys of ``[distill]``, such as ``{"distill.steps": 50}``.
            drop_overlap: Leave out public records that contain test records, instead of refusing.
            prove: Train controls too, to test whether the clients' knowledge was transferred; or a
                :class:`fedslm.Proof`, with test and probe records, seeds and resamples.
            dry_run: Check everything, and only estimate memory and time: nothing is written.

        Returns:
            The content of ``distill.json``; for a dry run, the estimate.

        Raises:
            FedslmError: An argument, the student, the records or the directory cannot be used.
        """
        from fedslm.api import students

        target = self.directory / layout.DISTILLED if directory is None else Path(directory)
        settings = {**overrides, "distill.student": str(student), "distill.source": str(data)}
        prepared = students.prepared(self._opened(), settings, drop_overlap=drop_overlap)
        proof = students.Proof() if prove is True else prove or None
        question = None if proof is None else students.question(prepared, proof)
        if dry_run:
            return students.estimated(prepared)
        return students.taught(prepared, target, question, students.Silent())

    def _repr_html_(self) -> str:
        """A table for a notebook: the metrics before and after, the guarantee and the directory."""
        rows = [
            (name, f"{value:.4f}", f"{self.metrics_after.get(name, math.nan):.4f}")
            for name, value in self.metrics_before.items()
        ]
        privacy = "none"
        if self.delta is not None:
            privacy = f"ε = {spent(self.epsilon)} at δ = {self.delta:g}"
        facts = {"privacy": privacy, "rounds": str(self.rounds), "directory": str(self.directory)}
        if self.stopped:
            facts["stopped"] = self.stopped
        head = "".join(f"<th>{each}</th>" for each in ("metric", "before", "after"))
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        foot = "".join(
            f'<tr><th>{name}</th><td colspan="2">{escape(value)}</td></tr>'
            for name, value in facts.items()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}{foot}</tbody></table>"

    def _opened(self) -> FinishedRun:
        """The run's files, checked."""
        from fedslm.inference.trained import open_run

        return open_run(self.directory)


def result_of(report: Mapping[str, Any]) -> RunResult:
    """Builds a typed result from the most important values of a report."""
    directory = Path(report["directory"])
    return RunResult(
        directory,
        directory / layout.ADAPTER,
        rounds=report["rounds"],
        metrics_before=report["metrics_before"],
        metrics_after=report["metrics_after"],
        epsilon=epsilon_of_json(report["epsilon"]),
        delta=report["delta"],
        stopped=report["stopped"],
        report=report,
    )


def _loaded(run: FinishedRun) -> Trained:
    """The run's model, in the memory that all runs of a process share; valid until the next call."""
    from fedslm.inference.trained import load_trained

    return load_trained(run)


def _listed(values: Any, key: str) -> list[Any]:
    """Returns one value or several as a list.

    Raises:
        ConfigError: It is neither a text, a dict, nor a list of them.
    """
    if isinstance(values, str | Mapping):
        return [values]
    if isinstance(values, Sequence) or hasattr(values, "to_list"):
        return list(values)
    message = f"value of type {type(values).__name__}: should be a text or a list of texts"
    raise ConfigError([Problem(key, message)])


def _prompt_row(prompt: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Returns the columns that a prompt is built from.

    Raises:
        DataError: Several columns are needed, or one is missing.
    """
    if not isinstance(prompt, Mapping) and len(columns) == 1:
        return {columns[0]: prompt}
    lacking = [name for name in columns if not isinstance(prompt, Mapping) or name not in prompt]
    if lacking:
        raise DataError(f"a prompt of this run is a dict with {', '.join(columns)}; add {lacking[0]}")
    return dict(prompt)


def _rows_for(run: FinishedRun, data: Any) -> list[dict[str, Any]]:
    """Returns records in memory as rows with the run's columns.

    Raises:
        ConfigError: They are of another type, or lack a column.
        DataError: A column cannot be read.
    """
    from fedslm.data import given
    from fedslm.data.columns import Wanted, needed
    from fedslm.data.tables import rows_in

    parts = given.parts_of(data, "data")
    wanted = needed(run.data, run.task)
    problems = given.missing(parts, wanted)
    if problems:
        raise ConfigError(problems)
    with TemporaryDirectory() as scratch:
        return rows_in(given.read(parts, Path(scratch), Wanted(wanted)))
