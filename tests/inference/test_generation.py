"""Tests of writing: what is written is what the model says, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedslm.errors import ConfigError, DataError
from fedslm.inference import generation
from fedslm.inference.evaluation import own_rows
from fedslm.inference.generation import (
    Prompt,
    Sampling,
    generation_settings,
    prompts_of,
    write,
    write_greedily,
)
from fedslm.inference.texts import continuation, prompt_tokens
from fedslm.inference.trained import Trained, load_trained, open_run
from fedslm.tasks.base import Tokens

Finished = Callable[[str], Path]
WRITING = ["causal-lm", "gpt2", "instruction", "seq2seq", "preference"]
FORWARDS = ["causal-lm", "gpt2", "instruction", "preference"]
MOST = 8


def open_(finished_run: Finished, kind: str) -> Trained:
    """A run's model."""
    return load_trained(open_run(finished_run(kind)))


@contextmanager
def settings_of(trained: Trained, **values: Any) -> Iterator[None]:
    """The base brings settings for writing along, as models from the hub do."""
    config: Any = trained.model.adapter.network.generation_config  # type: ignore[union-attr]
    before = {key: getattr(config, key) for key in values}
    config.update(**values)
    try:
        yield
    finally:
        config.update(**before)


def greedy(trained: Trained, prompt: Tokens) -> Tokens:
    """The likeliest tokens, one forward pass over everything for each; stops at the end token."""
    end = trained.model.adapter.network.generation_config.eos_token_id  # type: ignore[union-attr]
    new: list[int] = []
    for _ in range(MOST):
        if trained.run.task.name == "seq2seq":
            inputs = {"input_ids": prompt, "decoder_input_ids": (0, *new)}
        else:
            inputs = {"input_ids": (*prompt, *new)}
        with torch.inference_mode():
            tensors = {key: torch.tensor([ids]) for key, ids in inputs.items()}
            logits = trained.model.adapter.network(**tensors).logits[0, -1]
        token = int(logits.argmax())
        if token == end:
            break
        new.append(token)
    return tuple(new)


def texts_of(trained: Trained, prompts: list[Prompt], **values: Any) -> list[list[str]]:
    """What is written for prompts."""
    return list(write(trained, prompts, Sampling(**{"max_tokens": MOST, **values})))


@pytest.mark.parametrize("kind", WRITING)
def test_greedy_writing_takes_the_likeliest_token_each_time(kind: str, finished_run: Finished) -> None:
    """Without caches, batches and padding, the same tokens come out."""
    trained = open_(finished_run, kind)
    prompts = prompts_of(trained, own_rows(trained.run)[:4], MOST)
    for prompt, (text,) in zip(prompts, texts_of(trained, prompts), strict=True):
        new = greedy(trained, prompt.tokens)
        assert len(new) > 1
        if trained.run.task.name == "seq2seq":
            expected = trained.model.tokenizer.decode(list(new), skip_special_tokens=True)
        else:
            expected = continuation(trained.model.tokenizer, prompt.tokens, new)
        assert text == (expected if trained.run.task.name == "causal-lm" else expected.strip())


@pytest.mark.parametrize("kind", WRITING)
def test_prompts_written_together_are_as_alone(kind: str, finished_run: Finished) -> None:
    """Padding on the left (decoders) or the right (encoders) changes no text, and the order stays."""
    trained = open_(finished_run, kind)
    prompts = prompts_of(trained, own_rows(trained.run)[:11], MOST)
    assert len({len(prompt.tokens) for prompt in prompts}) > 3
    done: list[int] = []
    together = write_greedily(trained, prompts, MOST, done.append)
    assert [[text] for text in together] == texts_of(trained, prompts)
    assert done == [8, 3]


@pytest.mark.parametrize("kind", ["instruction", "preference"])
def test_a_prompt_is_what_training_saw(kind: str, finished_run: Finished) -> None:
    """An example's tokens begin with the prompt's: the same template, and the answer stands behind."""
    trained = open_(finished_run, kind)
    rows = own_rows(trained.run)[:5]
    examples = trained.task.prepare(rows, trained.model.tokenizer).examples
    for example, prompt in zip(examples, prompts_of(trained, rows, MOST), strict=True):
        first = next(at for at, target in enumerate(example.targets) if target != -100)
        assert example.input_ids[:first] == prompt.tokens
        assert not prompt.cut


def test_a_source_is_what_training_saw(finished_run: Finished) -> None:
    """The encoder reads the same tokens."""
    trained = open_(finished_run, "seq2seq")
    rows = own_rows(trained.run)[:5]
    examples = trained.task.prepare(rows, trained.model.tokenizer).examples
    prompts = prompts_of(trained, rows, MOST)
    assert [prompt.tokens for prompt in prompts] == [example.input_ids for example in examples]
    assert prompts[0].text == f"note: {rows[0]['text']} plan:"


def test_a_chat_template_is_used_as_in_training(finished_run: Finished) -> None:
    """Where the tokenizer has a template, the prompt is a user's turn."""
    trained = open_(finished_run, "instruction")
    tokenizer = trained.model.tokenizer
    try:
        tokenizer.chat_template = "{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}"
        (prompt,) = prompts_of(trained, [{"text": "chest pain"}], MOST)
    finally:
        tokenizer.chat_template = None
    text = "[CLS] note: chest pain plan: [SEP][CLS] "  # an answer's turn begins, as the template has it
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(prompt.tokens) == expected
    assert prompt.text == "note: chest pain plan:"


def test_writing_stops_where_the_chat_template_ends_a_turn(finished_run: Finished) -> None:
    """The token that training put behind an answer is among those that end a text."""
    trained = open_(finished_run, "instruction")
    tokenizer = trained.model.tokenizer
    before = generation_settings(trained.model, Sampling(MOST)).eos_token_id or []
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }} {{ m.content }}[MASK]{% endfor %}"
        )
        after = generation_settings(trained.model, Sampling(MOST)).eos_token_id
    finally:
        tokenizer.chat_template = None
    assert set(after) - set(before) == {tokenizer.mask_token_id}


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq"])
def test_a_seed_repeats_and_another_does_not(kind: str, finished_run: Finished) -> None:
    """The same seed writes the same texts, each sample and each prompt its own; PyTorch's stays."""
    trained = open_(finished_run, kind)
    prompts = prompts_of(trained, [{"text": "chest pain"}] * 2, MOST)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(1)
    drawn = texts_of(trained, prompts, temperature=1.0, samples=3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert drawn == texts_of(trained, prompts, temperature=1.0, samples=3)
    assert drawn != texts_of(trained, prompts, temperature=1.0, samples=3, seed=1)
    assert [len(texts) for texts in drawn] == [3, 3]
    assert len({text for texts in drawn for text in texts}) == 6


def test_a_low_temperature_is_greedy(finished_run: Finished) -> None:
    """Near zero, drawing takes the likeliest token."""
    trained = open_(finished_run, "causal-lm")
    prompts = prompts_of(trained, own_rows(trained.run)[:3], MOST)
    assert texts_of(trained, prompts, temperature=1e-4) == texts_of(trained, prompts)


def test_draws_follow_the_model(finished_run: Finished) -> None:
    """At temperature 1, first tokens come as often as the model says (chi-square, 0.1 % level)."""
    import scipy.stats

    trained = open_(finished_run, "causal-lm")
    adapter: Any = trained.model.adapter
    prompt = Prompt("", (2, 5, 6))
    with torch.inference_mode():
        shares = adapter.network(input_ids=torch.tensor([prompt.tokens])).logits[0, -1].softmax(-1)
    settings = generation.generation_settings(trained.model, Sampling(1, 1.0, 100))
    torch.manual_seed(0)
    with torch.inference_mode():
        ids = torch.tensor([prompt.tokens] * 20)
        mask = torch.ones_like(ids)
        drawn = adapter.network.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    found = torch.bincount(drawn[:, 3], minlength=len(shares)).float()
    order = shares.argsort()
    groups = torch.chunk(order, 10)
    observed = [float(found[group].sum()) for group in groups]
    expected = [2000 * float(shares[group].sum()) for group in groups]
    scale = sum(observed) / sum(expected)
    assert scipy.stats.chisquare(observed, [scale * each for each in expected]).pvalue > 1e-3
    assert sum(observed) == 2000
    assert float((found > 0).sum()) > 600  # no top-k is left on


def test_what_the_base_brings_along_is_turned_off(finished_run: Finished) -> None:
    """A base whose files say top_k=1, sampling and a repetition penalty writes as it is asked to."""
    trained = open_(finished_run, "causal-lm")
    prompts = prompts_of(trained, own_rows(trained.run)[:3], MOST)
    plain, drawn = texts_of(trained, prompts), texts_of(trained, prompts, temperature=1.0)
    brought = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 5.0}
    with settings_of(trained, **brought, repetition_penalty=1.9, max_new_tokens=2):
        assert texts_of(trained, prompts) == plain
        assert texts_of(trained, prompts, temperature=1.0) == drawn
    assert plain != drawn


def test_an_end_token_ends_a_text(finished_run: Finished) -> None:
    """Nothing is written behind it, alone or beside longer texts."""
    trained = open_(finished_run, "causal-lm")
    (prompt,) = prompts_of(trained, [{"text": "chest pain"}], MOST)
    new = greedy(trained, prompt.tokens)
    at = next(at for at, token in enumerate(new) if at and token not in new[:at])
    whole = texts_of(trained, [prompt])[0][0]
    with settings_of(trained, eos_token_id=new[at]):
        (short,) = texts_of(trained, [prompt])[0]
    assert short == continuation(trained.model.tokenizer, prompt.tokens, new[:at])
    assert short != whole
    assert whole.startswith(short)


@pytest.mark.parametrize("kind", WRITING)
def test_text_that_is_handed_on_is_the_text(kind: str, finished_run: Finished) -> None:
    """The pieces that come while writing, put together, are what is given at the end."""
    trained = open_(finished_run, kind)
    prompts = prompts_of(trained, own_rows(trained.run)[:3], MOST)
    pieces: list[str] = []
    written = []
    for (text,) in write(trained, prompts, Sampling(MOST), pieces.append):
        written.append(text)
        assert "".join(pieces) == text
        assert len(pieces) > 2
        pieces.clear()
    assert [[text] for text in written] == texts_of(trained, prompts)


@pytest.mark.parametrize("kind", FORWARDS)
def test_a_long_prompt_keeps_its_beginning_and_end(kind: str, finished_run: Finished) -> None:
    """As in training; and a model with few positions has room for what is to be written."""
    trained = open_(finished_run, kind)
    row = {"text": "wrist " * 500 + "plaster"}
    (prompt,) = prompts_of(trained, [row], 100)
    assert prompt.cut
    assert len(prompt.tokens) == 28  # 128 positions
    (whole,) = prompts_of(trained, [{"text": "wrist plaster"}], 100)
    assert prompt.tokens[0] == whole.tokens[0]
    assert prompt.tokens[-2:] == whole.tokens[-2:]
    assert texts_of(trained, [prompt], max_tokens=3)[0][0] != ""
    with pytest.raises(ConfigError, match="--max-tokens: value 128 must be below"):
        prompts_of(trained, [row], 128)


@pytest.mark.parametrize("kind", WRITING)
def test_the_usual_length_fits_the_model(kind: str, finished_run: Finished) -> None:
    """Left out, as many tokens as targets had in training; half of the positions at most."""
    trained = open_(finished_run, kind)
    assert generation.default_max_tokens(trained) == 64
    run = replace(trained.run, task=trained.run.task.model_copy(update={"max_target_length": 500}))
    most = generation.default_max_tokens(replace(trained, run=run))
    assert most == (500 if kind == "seq2seq" else 64)


def test_all_that_is_wrong_with_the_sampling_is_said_at_once() -> None:
    """Values out of range, each by its option."""
    with pytest.raises(ConfigError) as caught:
        Sampling(0, -1.0, 0, -1)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["--max-tokens", "--temperature", "--samples", "--seed"]
    with pytest.raises(ConfigError, match="equal texts"):
        Sampling(5, 0.0, 2)
    with pytest.raises(ConfigError, match="--temperature: value nan"):
        Sampling(5, float("nan"))


@pytest.mark.parametrize("kind", ["classification", "multi-label", "token-classification"])
def test_classifiers_point_to_predict(kind: str, finished_run: Finished) -> None:
    """A model that writes nothing says what it is for."""
    with pytest.raises(ConfigError, match="fedslm predict"):
        prompts_of(open_(finished_run, kind), [{"text": "a"}], MOST)


def test_a_prompt_without_tokens_is_refused(finished_run: Finished) -> None:
    """Nothing to go on from, and no token that begins a text."""
    trained = open_(finished_run, "instruction")
    tokenizer = trained.model.tokenizer
    try:
        tokenizer.chat_template = (
            "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}{% endif %}"
        )
        with pytest.raises(DataError, match="prompt 1 is empty"):
            prompts_of(trained, [{"text": "chest pain"}], MOST)
    finally:
        tokenizer.chat_template = None


def test_new_words_keep_their_space(tmp_path: Path) -> None:
    """A SentencePiece-like tokenizer drops the space before a text's first word; a continuation has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "▁the", "▁heart", "s", "▁", "▁is"]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    raw.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    assert tokenizer.decode([4]) == "heart"
    assert continuation(tokenizer, (1, 3), (4,)) == " heart"
    assert continuation(tokenizer, (1, 3, 4), (5, 7)) == "s is"
    assert continuation(tokenizer, (1,), (3, 4)) == "the heart"
    assert prompt_tokens("the heart", tokenizer) == (3, 4)
    assert prompt_tokens("", tokenizer) == (1,)
