"""Makes what the local scenarios need beyond the assets: derived data sets and a tiny T5.

python simulations/derive.py ASSETS OUT

- OUT/data/bc5cdr_kinds: sentences of bc5cdr with the kinds of entities that they name (multi-label);
- OUT/data/medquad_preference: questions with their own answer and another question's (preference);
- OUT/data/banking77_halves: its test messages in two halves, one to evaluate on and one that is
  public and may be looked at;
- OUT/data/e2e and OUT/models/tiny-t5: a T5 of 0.9 M parameters, pretrained for some minutes on
  restaurants that take no part in the federation (there are no pretrained T5 weights in the assets).
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PUBLIC = ("The Vaults", "The Waterman", "Green Man", "Blue Spice", "Giraffe", "The Plough")
STEPS, BATCH, RATE, WIDTH, VOCABULARY, LONGEST = 900, 24, 3e-3, 128, 1200, 64


def rows_of(assets: Path, name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split."""
    path = assets / "data" / name / f"{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def kinds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sentences with the kinds of entities that they name."""
    return [
        {
            "text": " ".join(row["tokens"]),
            "kinds": sorted({tag[2:].lower() for tag in row["tags"] if tag != "O"}),
        }
        for row in rows
    ]


def preferences(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Questions with their own answer, and with the answer to another question of the same site."""
    generator = random.Random(seed)
    by_site: dict[str, list[str]] = {}
    for row in rows:
        by_site.setdefault(row["client"], []).append(row["output"])
    return [
        {
            "question": row["instruction"],
            "chosen": row["output"],
            "rejected": generator.choice(by_site[row["client"]]),
            "client": row["client"],
        }
        for row in rows
    ]


def tokenizer_for(texts: list[str]) -> Any:
    """A BPE tokenizer with T5's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    end = ("</s>", made.token_to_id("</s>"))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def batches(rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[Any]:
    """Endless batches of source and target."""
    generator = random.Random(0)
    while True:
        chosen = generator.sample(rows, BATCH)
        yield tokenizer(
            [row["input"] for row in chosen],
            text_target=[row["output"] for row in chosen],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )


def build_t5(rows: list[dict[str, Any]], out: Path) -> None:
    """Pretrains the tiny T5 on public restaurants."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = tokenizer_for([text for row in rows for text in (row["input"], row["output"])])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    for step, batch in zip(range(1, STEPS + 1), batches(rows, tokenizer), strict=False):
        labels = batch["labels"].masked_fill(batch["labels"] == 0, -100)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"tiny T5: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(assets: Path, out: Path) -> None:
    """Makes everything."""
    for split in ("train", "test"):
        write(out / f"data/bc5cdr_kinds/{split}.jsonl", kinds(rows_of(assets, "bc5cdr", split)))
        pairs = preferences(rows_of(assets, "medquad", split), 0)
        write(out / f"data/medquad_preference/{split}.jsonl", pairs)
    messages = rows_of(assets, "banking77", "test")
    halves = {"train": rows_of(assets, "banking77", "train"), "test": messages[::2]}
    for split, rows in {**halves, "public": messages[1::2]}.items():
        write(out / f"data/banking77_halves/{split}.jsonl", rows)
    test = rows_of(assets, "e2e_nlg", "test")
    public = [row for row in test if row["client"] in PUBLIC]
    write(out / "data/e2e/train.jsonl", rows_of(assets, "e2e_nlg", "train"))
    write(out / "data/e2e/test.jsonl", [row for row in test if row["client"] not in PUBLIC])
    build_t5(public, out / "models/tiny-t5")
    print(f"made {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
