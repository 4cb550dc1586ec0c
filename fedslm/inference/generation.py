"""Generate text: greedily, or by sampling that a seed makes reproducible."""

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
    """Settings of text generation.

    Attributes:
        max_tokens: Maximum number of new tokens, >= 1.
        temperature: 0 always takes the most likely token; 1 samples from the model's distribution.
        samples: Number of texts for each prompt; more than one needs a temperature.
        seed: Seed of the sampling: the same prompt in the same position gets the same texts.

    Raises:
        ConfigError: A value is out of range.
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
    """A prompt that a model continues.

    Attributes:
        text: The prompt as text, before any chat template.
        tokens: The token ids that the model receives.
        cut: True if the prompt was too long and was truncated.
    """

    text: str
    tokens: Tokens
    cut: bool = False


def check_task(run: TunedModel) -> None:
    """Refuses a run whose task does not generate text.

    Raises:
        ConfigError: The task does not generate; the message names ``predict`` instead.
    """
    if not TASKS[run.task.name].generates:
        remedy = f"fedslm predict {run.directory} --text …"
        message = f"value {run.task.name!r} writes no text; use: {remedy}"
        raise ConfigError([Problem("task.name", message)])


def prompt_columns(run: TunedModel) -> list[str]:
    """Returns the columns that a prompt is built from."""
    if run.task.prompt is None:
        return [run.data.text_column]
    return list(dict.fromkeys(placeholders(run.task.prompt)))


def default_max_tokens(trained: Trained) -> int:
    """Target length of training, or 64 new tokens; fewer if the model supports only short sequences."""
    wanted = trained.run.task.max_target_length or DEFAULT_MAX_TOKENS
    positions = _positions(trained)
    return wanted if positions is None else max(1, min(wanted, positions // 2))


def prompts_of(trained: Trained, rows: Rows, max_tokens: int) -> list[Prompt]:
    """Builds prompts from rows as in training: with the same template, chat format and truncation.

    Args:
        trained: Model of a run.
        rows: Rows with the columns that a prompt is built from.
        max_tokens: Number of new tokens for which the model must have room.

    Raises:
        ConfigError: The run's task does not generate text, or the model has no room for so many tokens.
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
    """Returns a row's content before any chat template, without an answer that ends a conversation."""
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
    """Truncates a prompt that is too long: keeps its first token and its end, as in training."""
    if len(ids) <= room:
        return Prompt(text, ids)
    return Prompt(text, (*ids[:1], *ids[len(ids) - room + 1 :])[:room], cut=True)


def _positions(trained: Trained) -> int | None:
    """Returns the longest sequence that the model supports; None if there is no limit."""
    config: Any = trained.model.adapter.network.config
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _room(trained: Trained, max_tokens: int) -> int:
    """Returns the maximum prompt length: limited by training (but for plain texts) and by the model."""
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
    """Generates texts for one prompt after another.

    Args:
        trained: Model of a run.
        prompts: From :func:`prompts_of`.
        sampling: Settings of the generation.
        on_text: Receives pieces of the text as they are generated; needs one sample.

    Yields:
        The texts for each prompt, ``sampling.samples`` of them, without the prompt.
    """
    for number, prompt in enumerate(prompts):
        listener = None if on_text is None else _Listener(trained, prompt, on_text)
        yield _write([prompt], trained, sampling, number, listener)[0]


def write_greedily(
    trained: Trained, prompts: Sequence[Prompt], max_tokens: int, advance: Callable[[int], None]
) -> list[str]:
    """Generates one text for each prompt, in batches of prompts.

    Args:
        trained: Model of a run; uses the adapter that is currently loaded.
        prompts: From :func:`prompts_of`.
        max_tokens: Maximum number of new tokens for each prompt.
        advance: Receives the number of newly finished prompts.

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
    """Returns the texts for each prompt of a batch."""
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
    """Generates the continuations of a batch of prompts.

    Args:
        model: Generates with the adapter that is currently loaded.
        prompts: Token ids, each of any length >= 1.
        settings: From :func:`generation_settings`.
        seed: Seed of the sampling; the process's own random state stays unchanged.
        listener: A transformers streamer, for one prompt.

    Returns:
        The new tokens up to the first end token, for each prompt and each of its samples.
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
    """Returns transformers' settings; the base model's own defaults (such as top-p) are disabled."""
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
    """Returns the new tokens up to the first end token."""
    for at, token in enumerate(ids):
        if token in (ends or ()):
            return tuple(ids[:at])
    return tuple(ids)


def _text_of(trained: Trained, prompt: Prompt, new: Tokens) -> str:
    """Decodes new tokens: after a prompt with the space between them, for an answer without it."""
    tokenizer, kind = trained.model.tokenizer, TASKS[trained.run.task.name]
    if not kind.has_prompt:
        return continuation(tokenizer, prompt.tokens, new)
    if kind.network == "encoder-decoder":
        return str(tokenizer.decode(list(new), skip_special_tokens=True)).strip()
    return continuation(tokenizer, prompt.tokens, new).strip()


class _Listener:
    """Passes text on while it is generated; transformers calls ``put`` with tokens, then ``end``."""

    def __init__(self, trained: Trained, prompt: Prompt, on_text: OnText) -> None:
        self._trained, self._prompt, self._on_text = trained, prompt, on_text
        self._ends = generation_settings(trained.model, Sampling(1)).eos_token_id
        self._tokens: list[int] = []
        self._shown = ""
        self._began = False

    def put(self, tokens: torch.Tensor) -> None:
        """Receives new tokens; the first call contains the prompt."""
        if self._began:
            self._tokens += tokens.flatten().tolist()
            self._show(whole=False)
        self._began = True

    def end(self) -> None:
        """Receives the end of the text."""
        self._show(whole=True)

    def _show(self, *, whole: bool) -> None:
        """Passes on the new text; an incomplete character waits for its remaining bytes."""
        text = _text_of(self._trained, self._prompt, _until_end(self._tokens, self._ends))
        if not whole:
            text = text.rstrip("\ufffd \n")
        if text.startswith(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
