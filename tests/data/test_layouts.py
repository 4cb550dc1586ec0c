"""Tests of data sets whose columns say what they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedslm.config import Config, DataConfig, TaskConfig
from fedslm.data.federated import share_out
from fedslm.data.layouts import laid_out
from fedslm.errors import DataError
from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks import build
from fedslm.validation import check

USER, ASSISTANT = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}
TURNS = [USER, ASSISTANT]
SHARED = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}]
WORSE = {"role": "assistant", "content": "never"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL messages": ("instruction", {"messages": TURNS}),
    "ShareGPT": ("instruction", {"conversations": SHARED, "id": "a"}),
    "TRL turns": ("instruction", {"prompt": [USER], "completion": [ASSISTANT]}),
    "TRL texts": ("instruction", {"prompt": "why", "completion": "because"}),
    "Alpaca": ("instruction", {"instruction": "why", "input": "", "output": "because"}),
    "no input": ("instruction", {"instruction": "why", "output": "because"}),
    "explicit": ("preference", {"prompt": "why", "chosen": "because", "rejected": "never"}),
    "turns": ("preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]}),
    "implicit": ("preference", {"chosen": TURNS, "rejected": [USER, WORSE]}),
    "columns": ("instruction", {"text": "why", "label": "because"}),
}
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}[MASK]{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("name", ROWS)
def test_a_data_set_is_read_as_it_is(
    name: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """No column is named: the data is shared out, and its example is that of the turns in it."""
    kind, row = ROWS[name]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for _ in range(4))
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    config = make_config(data={"source": str(tmp_path), "partition": "iid"}, task={"name": kind})
    check(config.model_copy(update={"task": TaskConfig(name=kind)}))  # type: ignore[arg-type]
    data, task = laid_out(config.data, TaskConfig(name=kind, max_length=64), 0)  # type: ignore[arg-type]
    shared = share_out(data, task, config.privacy, num_clients=2, seed=0)
    assert shared.duplicates == 4
    tokenizer = load_tokenizer(DEMO_DIRECTORY)
    tokenizer.chat_template = CHAT
    prepared = build(task, data, ()).prepare(shared.train.to_list(), tokenizer)
    text = "[user] why[MASK][assistant] because[MASK]"
    assert len(prepared.examples) == 4
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(prepared.examples[0].input_ids) == ids
    assert (prepared.examples[0].rejected is not None) == (kind == "preference")


def test_an_input_is_put_behind_its_instruction(tmp_path: Path) -> None:
    """Alpaca's input is a part of what the user says."""
    row = {"instruction": "translate", "input": "fièvre", "output": "fever"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    _, task = laid_out(DataConfig(source=str(tmp_path)), TaskConfig(name="instruction"), 0)
    assert task.prompt is not None
    assert task.prompt.format_map(row).strip() == "translate\n\nfièvre"


def test_what_a_config_names_is_left_as_it_is(tmp_path: Path) -> None:
    """A named column, a prompt, format = "columns", and tasks that do not write, look at nothing."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": TURNS, "text": "a", "label": "b"}))
    there = DataConfig(source=str(tmp_path))
    nowhere = DataConfig(source=str(tmp_path / "nothing"))
    writes = TaskConfig(name="instruction")
    cases = [
        (there, writes),  # it has text and label
        (nowhere.model_copy(update={"text_column": "question"}), writes),
        (nowhere, TaskConfig(name="instruction", prompt="{question}")),
        (nowhere, TaskConfig(name="instruction", format="columns")),
        (nowhere, TaskConfig(name="classification")),
    ]
    for data, task in cases:
        assert laid_out(data, task, 0) == (data, task)


def test_columns_that_say_nothing_are_listed(tmp_path: Path) -> None:
    """A preference without known columns says which there are and which are wanted."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "a", "better": "b"}))
    with pytest.raises(DataError, match=r"data\.rejected_column .* question, better, not prompt"):
        laid_out(DataConfig(source=str(tmp_path)), TaskConfig(name="preference"), 0)
