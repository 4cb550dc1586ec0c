"""Pretrain the tiny base model that ships with the package.

A BERT-style encoder learns from the public demo notes only, without their labels and with nonsense
in half of the placeholders, to fill in masked spans and to tell from the whole note (the mean of
its states, and the pooler) which content words it has. The seed of the notes differs from the
seeds of the demo, and the private part is not generated at all.

Run ``python simulations/build_demo_model.py``; it takes about six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer

from fedslm.data import demo

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "fedslm" / "models" / "demo_base"
DEFAULT_SEED = 20_240_229
NUM_NOTES = 20_000
VOCABULARY_SIZE = 2_000
MAX_TOKENS = 128
BATCH_SIZE = 32
MASK_RATE = 0.25
SPAN_LENGTH = 4
LEARNING_RATE = 2e-3
NOTE_LOSS_WEIGHT = 3.0
WEIGHT_SCALE = 4.0  # the usual 0.02 suits wide models; at width 128 it stalls for many steps
CONTENT_RATE = 0.05
LETTERS = list("aaaabcddeeeeefghiiiijklllmnnnooopqrrrsstttuuvwxyz")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK = SPECIAL_TOKENS.index("[MASK]")


class MaskedNotes(nn.Module):
    """An encoder with its pretraining heads; all share the word embeddings."""

    def __init__(self, encoder: BertModel, content: Tensor) -> None:
        """Put fresh heads on the encoder.

        Args:
            encoder: The encoder to train.
            content: 1 for the pieces that a note is about and 0 for others, ``[vocabulary]``.
        """
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.summary = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(encoder.config.vocab_size))
        self.note_bias = nn.Parameter(torch.zeros(encoder.config.vocab_size))
        self.register_buffer("content", content)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the masked places and the loss of the notes, two scalars.

        Args:
            tokens: Masked token ids, padded with 0, ``[notes, tokens]``.
            targets: The true ids of all tokens, ``[notes, tokens]``.
        """
        attention = tokens != 0
        output = self.encoder(input_ids=tokens, attention_mask=attention.long())
        words = self.encoder.embeddings.word_embeddings.weight
        masked = tokens == MASK
        hidden = self.transform(output.last_hidden_state[masked])
        place_loss = functional.cross_entropy(hidden @ words.T + self.bias, targets[masked])
        kept = attention.unsqueeze(-1)
        mean = (output.last_hidden_state * kept).sum(1) / kept.sum(1)
        note_losses = [
            self._note_loss(summary @ words.T, targets)
            for summary in (self.summary(mean), output.pooler_output)
        ]
        return place_loss, torch.stack(note_losses).mean()

    def _note_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the content of the notes, masked or not."""
        scores = functional.log_softmax(logits + self.note_bias, dim=-1).gather(1, targets)
        weights = self.content[targets]  # type: ignore[index]
        return -(scores * weights).sum() / weights.sum().clamp(min=1)


def disguise(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Put random letters and digits in half of the placeholders, so that names do not confuse.

    Args:
        texts: Texts with ``[NAME]`` and ``[ID]``.
        rng: Source of the randomness.

    Returns:
        The texts with nonsense such as ``Qavem Trilo`` and ``MRN-90311``.
    """

    def name(match: re.Match[str]) -> str:
        words = ["".join(rng.choice(LETTERS, size=rng.integers(5, 11))) for _ in range(2)]
        clinician = match[1] or ""
        return clinician + " ".join(word.capitalize() for word in words[bool(clinician) :])

    def number(_: re.Match[str]) -> str:
        return f"MRN-{rng.integers(10_000, 100_000)}"

    def rewrite(text: str) -> str:
        return re.sub(r"\[ID\]", number, re.sub(r"(Dr )?\[NAME\]", name, text))

    return [rewrite(text) if rng.random() < 0.5 else text for text in texts]


def find_content(tokenizer: BertTokenizer, encoded: Sequence[Sequence[int]], size: int) -> Tensor:
    """Mark the pieces that tell notes apart: whole words that few notes have.

    Args:
        tokenizer: The tokenizer.
        encoded: The token ids of each note.
        size: Size of the vocabulary, padding included.

    Returns:
        1 for content and 0 for other pieces, ``[size]``.
    """
    notes = np.bincount(np.concatenate([np.unique(ids) for ids in encoded]), minlength=size)
    content = torch.zeros(size)
    for piece, index in tokenizer.get_vocab().items():
        is_word = len(piece) > 2 and piece.isalpha()
        content[index] = float(is_word and 0 < notes[index] < CONTENT_RATE * len(encoded))
    return content


def build_tokenizer(texts: Sequence[str]) -> BertTokenizer:
    """Train lower-cased word pieces that can spell any ASCII word.

    Args:
        texts: The texts to learn the pieces from.

    Returns:
        A tokenizer of at most about `VOCABULARY_SIZE` pieces.
    """
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    spelling = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL_TOKENS, *spelling, *string.punctuation, *(f"##{c}" for c in spelling)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY_SIZE - len(pieces), min_frequency=5, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    known = dict.fromkeys([*pieces, *(piece for piece, _ in learned)])
    vocabulary = {piece: index for index, piece in enumerate(known)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=MAX_TOKENS)


def build_encoder(vocabulary_size: int) -> BertModel:
    """Make an untrained encoder of about a million parameters.

    Args:
        vocabulary_size: Number of word pieces, padded up to a multiple of eight.

    Returns:
        The encoder, with a pooler and without dropout.
    """
    config = BertConfig(
        vocab_size=-(-vocabulary_size // 8) * 8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    encoder = BertModel(config)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.dim() == 2 and "position" not in name and "token_type" not in name:
                weight.mul_(WEIGHT_SCALE)
    return encoder


def mask_spans(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Hide spans of tokens; special tokens stay, and each note loses at least one token.

    Args:
        tokens: Token ids, ``[notes, tokens]``.
        generator: Source of the randomness.

    Returns:
        The masked ids, ``[notes, tokens]``.
    """
    starts = torch.rand(tokens.shape, generator=generator) < MASK_RATE / SPAN_LENGTH
    starts[:, 1] = True
    spans = functional.pad(starts.float(), (SPAN_LENGTH - 1, 0)).unsqueeze(1)
    hidden = functional.max_pool1d(spans, SPAN_LENGTH, stride=1).squeeze(1).bool()
    return tokens.masked_fill(hidden & (tokens >= len(SPECIAL_TOKENS)), MASK)


def make_batches(encoded: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Tensor]:
    """Padded batches of notes of similar length, in random order.

    Args:
        encoded: The token ids of each note.
        rng: Source of the randomness.

    Returns:
        One pass over the notes, each batch ``[BATCH_SIZE, tokens]``; the last few may be left out.
    """
    lengths = np.array([len(ids) for ids in encoded]) + rng.random(len(encoded)) * 4
    order = np.argsort(lengths)[: len(encoded) // BATCH_SIZE * BATCH_SIZE]
    groups = rng.permutation(order.reshape(-1, BATCH_SIZE))
    return [
        nn.utils.rnn.pad_sequence([torch.tensor(encoded[i]) for i in group], batch_first=True)
        for group in groups
    ]


def pretrain(model: MaskedNotes, encoded: Sequence[Sequence[int]], *, steps: int, seed: int) -> None:
    """Train the model in place and print the losses now and then.

    Args:
        model: The model to train.
        encoded: The token ids of each note.
        steps: Number of optimiser steps, at least 1.
        seed: Seed of the order of the notes and of the masks.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    batches: list[Tensor] = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        batches = batches or make_batches(encoded, rng)
        tokens = batches.pop()
        place_loss, note_loss = model(mask_spans(tokens, generator), tokens)
        optimizer.zero_grad()
        (place_loss + NOTE_LOSS_WEIGHT * note_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(
                f"step {step}/{steps}: masked places {place_loss.item():.3f},"
                f" notes {note_loss.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )


def save(encoder: BertModel, tokenizer: BertTokenizer, out: Path) -> None:
    """Write the encoder in half precision and the tokenizer.

    Args:
        encoder: The trained encoder; it is turned to half precision.
        tokenizer: Its tokenizer.
        out: The directory to write to.
    """
    nn.Module.half(encoder)
    encoder.save_pretrained(out)
    tokenizer.save_pretrained(out)
    num_bytes = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    print(f"wrote {encoder.num_parameters():,} parameters, {num_bytes / 1e6:.2f} MB to {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the demo model from the command line.

    Args:
        arguments: The command line, or None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory to write to")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of notes and weights")
    parser.add_argument("--steps", type=int, default=1_400, help="number of optimiser steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    notes = demo.generate(
        np.random.default_rng(options.seed),
        records_per_hospital=0,
        num_public=NUM_NOTES,
        num_evaluation=0,
    )
    texts = [row["text"] for row in notes.public]
    tokenizer = build_tokenizer(texts)
    texts = disguise(texts, np.random.default_rng(options.seed + 1))
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    encoder = build_encoder(len(tokenizer))
    content = find_content(tokenizer, encoded, encoder.config.vocab_size)
    model = MaskedNotes(encoder, content)
    print(json.dumps({"notes": len(texts), "pieces": len(tokenizer), "content": int(content.sum())}))
    pretrain(model, encoded, steps=options.steps, seed=options.seed)
    save(model.encoder, tokenizer, options.out)


if __name__ == "__main__":
    main()
