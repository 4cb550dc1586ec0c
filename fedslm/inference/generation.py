"""Let a model write: greedily, or by sampling that a seed repeats."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedslm.config.tasks import TASKS
from fedslm.data.columns import placeholders
from fedslm.data.turns import turns_of
from fedslm.errors import ConfigError, DataError, Problem
from fedslm.inference.inputs import Rows, text_of
from fedslm.inference.texts import continuation, prompt_tokens
from fedslm.inference.trained import Trained, TunedModel, computing
from fedslm.rng import seed_of
from fedslm.tasks.base import Tokens, tokenise
from fedslm.tasks.chat import end_token
from fedslm.tasks.prompts import Prompts, Said

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from fedslm.models.loaded import LoadedModel

DEFAULT_MAX_TOKENS = 64
_MOST_SAMPLES = 100
_BATCH_SIZE = 8
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How to write.

    Attributes:
        max_tokens: Most new tokens, >= 1.
        temperature: 0 takes the likeliest token each time; 1 draws as the model says.
        samples: Texts for each prompt; more than one needs a temperature.
        seed: Seed of the draws: the same prompt in the same place gets the same texts.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens < 1:
            problems.append(Problem("--max-tokens", f"value {self.max_tokens} must be at least 1"))
        if not 0 <= self.temperature <= 10:
            message = f"value {self.temperature} must be in [0, 10]; 0.7 is common, 0 is greedy"
            problems.append(Problem("--temperature", message))
        if not 1 <= self.samples <= _MOST_SAMPLES:
            problems.append(
                Problem("--samples", f"value {self.samples} must be in 1 … {_MOST_SAMPLES}")
            )
        if self.samples > 1 and self.temperature == 0:
            message = f"value {self.samples} would give equal texts; set --temperature too, such as 0.7"
            problems.append(Problem("--samples", message))
        if self.seed < 0:
            problems.append(Problem("--seed", f"value {self.seed} must not be negative"))
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from.

    Attributes:
        text: As people see it, before any chat template.
        tokens: As the model sees it.
        cut: True if it was too long.
    """

    text: str
    tokens: Tokens
    cut: bool = False


def check_task(run: TunedModel) -> None:
    """Refuses a run whose task writes nothing.

    Raises:
        ConfigError: ``predict`` is for that.
    """
    if not TASKS[run.task.name].generates:
        remedy = f"fedslm predict {run.directory} --text …"
        message = f"value {run.task.name!r} writes no text; use: {remedy}"
        raise ConfigError([Problem("task.name", message)])


def prompt_columns(run: TunedModel) -> list[str]:
    """Columns that a prompt is made of."""
    if run.task.prompt is None:
        return [run.data.text_column]
    return list(dict.fromkeys(placeholders(run.task.prompt)))


def default_max_tokens(trained: Trained) -> int:
    """As many new tokens as targets had in training, or 64; fewer if the model has few positions."""
    wanted = trained.run.task.max_target_length or DEFAULT_MAX_TOKENS
    positions = _positions(trained)
    return wanted if positions is None else max(1, min(wanted, positions // 2))


def prompts_of(trained: Trained, rows: Rows, max_tokens: int) -> list[Prompt]:
    """Makes prompts of rows as training did: the same template, chat format and cut.

    Args:
        trained: A run's model.
        rows: With the columns that a prompt is made of.
        max_tokens: New tokens, for which the model must have room.

    Raises:
        ConfigError: The run's task writes nothing, or the model has no room for so many tokens.
        DataError: A prompt is empty.
    """
    check_task(trained.run)
    task, tokenizer = trained.run.task, trained.model.tokenizer
    said = [_said(trained, row, number) for number, row in enumerate(rows, 1)]
    texts = ["\n\n".join(turn["content"] for turn in each.turns) for each in said]
    kind = TASKS[task.name]
    if kind.network == "encoder-decoder":
        encoded = tokenise(texts, tokenizer, task.max_length)
        made = [Prompt(text, e.input_ids, e.cut) for text, e in zip(texts, encoded, strict=True)]
    else:
        room = _room(trained, max_tokens)
        if not kind.has_prompt:
            tokens = [prompt_tokens(text, tokenizer) for text in texts]
        else:
            asked = Prompts.of(task, trained.run.data).asked(said, tokenizer)
            tokens = [each.ids for each in asked]
        made = [_fitted(text, ids, room) for text, ids in zip(texts, tokens, strict=True)]
    for number, prompt in enumerate(made, 1):
        if not prompt.tokens:
            raise DataError(
                f"prompt {number} is empty, or the chat template refuses its turns; write something"
            )
    return made


def _said(trained: Trained, row: dict[str, Any], number: int) -> Said:
    """What a row says, before any chat template; an answer at a conversation's end is left out."""
    columns, task = prompt_columns(trained.run), trained.run.task
    chats = TASKS[task.name].reads_turns and task.prompt is None
    if chats and (turns := turns_of(row[columns[0]])):
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return Said(turns)
    values = {column: text_of(row, column, number) for column in columns}
    prompts = Prompts.of(task, trained.run.data)
    text = prompts.text(values) if TASKS[task.name].has_prompt else values[columns[0]]
    return Said(({"role": "user", "content": text},))


def _fitted(text: str, ids: Tokens, room: int) -> Prompt:
    """A prompt that is too long keeps its first token and its end, as in training."""
    if len(ids) <= room:
        return Prompt(text, ids)
    return Prompt(text, (*ids[:1], *ids[len(ids) - room + 1 :])[:room], cut=True)


def _positions(trained: Trained) -> int | None:
    """Longest sequence that the model can look at; None if there is no limit."""
    config: Any = trained.model.adapter.network.config
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _room(trained: Trained, max_tokens: int) -> int:
    """Most tokens of a prompt: what training showed (but for plain texts), and what the model has."""
    positions, task = _positions(trained), trained.run.task
    rooms = [task.max_length - 1] if TASKS[task.name].has_prompt else []
    if positions is not None:
        rooms.append(positions - max_tokens)
    room = min(rooms, default=sys.maxsize)
    if room < 1:
        message = f"value {max_tokens} must be below the model's {positions} positions"
        raise ConfigError([Problem("--max-tokens", message)])
    return room


def write(
    trained: Trained, prompts: Sequence[Prompt], sampling: Sampling, on_text: OnText | None = None
) -> Iterator[list[str]]:
    """Writes for one prompt after another.

    Args:
        trained: A run's model.
        prompts: From :func:`prompts_of`.
        sampling: How.
        on_text: Is given the text bit by bit as it comes; needs one sample.

    Yields:
        The texts for each prompt, ``sampling.samples`` of them, without the prompt.
    """
    for number, prompt in enumerate(prompts):
        listener = None if on_text is None else _Listener(trained, prompt, on_text)
        yield _write([prompt], trained, sampling, number, listener)[0]


def write_greedily(
    trained: Trained, prompts: Sequence[Prompt], max_tokens: int, advance: Callable[[int], None]
) -> list[str]:
    """Writes one text for each prompt, several prompts at a time.

    Args:
        trained: A run's model; writes with the adapter that is in it.
        prompts: From :func:`prompts_of`.
        max_tokens: Most new tokens of each.
        advance: Is told how many more are done.

    Returns:
        Texts, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].tokens))
    found = [""] * len(prompts)
    for start in range(0, len(order), _BATCH_SIZE):
        chosen = order[start : start + _BATCH_SIZE]
        texts = _write([prompts[at] for at in chosen], trained, Sampling(max_tokens), 0, None)
        for at, (text,) in zip(chosen, texts, strict=True):
            found[at] = text
        advance(len(chosen))
    return found


def _write(
    prompts: list[Prompt], trained: Trained, sampling: Sampling, number: int, listener: _Listener | None
) -> list[list[str]]:
    """Texts for each prompt of a batch."""
    settings = generation_settings(trained.model, sampling)
    seed = seed_of(sampling.seed, "generation", number)
    asked = [prompt.tokens for prompt in prompts]
    new = new_tokens(trained.model, asked, settings, seed, listener)
    count = sampling.samples
    return [
        [_text_of(trained, prompt, row) for row in new[at * count : (at + 1) * count]]
        for at, prompt in enumerate(prompts)
    ]


def new_tokens(
    model: LoadedModel,
    prompts: Sequence[Tokens],
    settings: GenerationConfig,
    seed: int,
    listener: Any = None,
) -> list[Tokens]:
    """Lets a model go on from a batch of prompts.

    Args:
        model: Writes with the adapter that is in it.
        prompts: Token ids, each of any length >= 1.
        settings: As :func:`generation_settings` makes them.
        seed: Of the draws; the process' own random state stays as it was.
        listener: A streamer of transformers, for one prompt.

    Returns:
        The new tokens up to the first that ends a text, for each prompt and each of its samples.
    """
    network: Any = model.adapter.network
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    padding = int(model.tokenizer.pad_token_id)
    ids = [(*(padding,) * pad, *prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [(*(0,) * pad, *(1,) * (longest - pad)) for pad in pads]
    is_cuda = model.device.type == "cuda"
    with (
        computing(model),
        torch.random.fork_rng(devices=[model.device] if is_cuda else []),
    ):
        torch.manual_seed(seed)
        written = network.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            streamer=listener,
        ).tolist()
    begins = 1 if network.config.is_encoder_decoder else longest
    return [_until_end(row[begins:], settings.eos_token_id) for row in written]


def generation_settings(model: LoadedModel, sampling: Sampling) -> GenerationConfig:
    """Transformers' settings; what the base brings along on its own (such as top-p) is turned off."""
    from transformers import GenerationConfig

    tokenizer = model.tokenizer
    network: Any = model.adapter.network
    own = getattr(network.generation_config, "eos_token_id", None)
    ends = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id, end_token(tokenizer)}
    draws = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=draws,
        temperature=sampling.temperature if draws else 1.0,
        top_k=0 if draws else 50,
        top_p=1.0,
        num_beams=1,
        num_return_sequences=sampling.samples,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end for end in ends if end is not None) or None,
    )


def _until_end(ids: list[int], ends: list[int] | None) -> Tokens:
    """New tokens up to the first that ends a text."""
    for at, token in enumerate(ids):
        if token in (ends or ()):
            return tuple(ids[:at])
    return tuple(ids)


def _text_of(trained: Trained, prompt: Prompt, new: Tokens) -> str:
    """New tokens as text: behind a prompt with its space, an answer without."""
    tokenizer, kind = trained.model.tokenizer, TASKS[trained.run.task.name]
    if not kind.has_prompt:
        return continuation(tokenizer, prompt.tokens, new)
    if kind.network == "encoder-decoder":
        return str(tokenizer.decode(list(new), skip_special_tokens=True)).strip()
    return continuation(tokenizer, prompt.tokens, new).strip()


class _Listener:
    """Hands text on while it is written; transformers calls ``put`` with tokens and ``end``."""

    def __init__(self, trained: Trained, prompt: Prompt, on_text: OnText) -> None:
        self._trained, self._prompt, self._on_text = trained, prompt, on_text
        self._ends = generation_settings(trained.model, Sampling(1)).eos_token_id
        self._tokens: list[int] = []
        self._shown = ""
        self._began = False

    def put(self, tokens: torch.Tensor) -> None:
        """New tokens; the first call brings the prompt."""
        if self._began:
            self._tokens += tokens.flatten().tolist()
            self._show(whole=False)
        self._began = True

    def end(self) -> None:
        """No more tokens."""
        self._show(whole=True)

    def _show(self, *, whole: bool) -> None:
        """Hands on what is new; half a character waits for its other half."""
        text = _text_of(self._trained, self._prompt, _until_end(self._tokens, self._ends))
        if not whole:
            text = text.rstrip("\ufffd \n")
        if text.startswith(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
