"""The other side of ``engine.py``: federated LoRA as a bare PyTorch loop in one process.

One PEFT model; each client in turn copies the global adapter in, takes its steps with a fresh AdamW,
and copies its adapter out; the round ends with the mean. Nothing of fedslm is imported. The private
loop is ``bare_opacus.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

State = dict[str, torch.Tensor]


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.model, arguments.rank)
    ready = time.monotonic()
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    if arguments.inputs:
        values = load_file(arguments.inputs)
        tokens = values.pop("tokens").long()
        peft.set_peft_model_state_dict(model, values)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = {name: p.detach().clone() for name, p in trained.items()}
        for clients in tokens:
            began, computed = time.monotonic(), time.process_time()
            state = one_round(model, trained, state, clients, arguments.learning_rate)
            seconds.append(time.monotonic() - began)
            cpu_seconds.append(time.process_time() - computed)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state[name])
        save_file(peft.get_peft_model_state_dict(model), arguments.output)
    print(json.dumps({"ready": ready, "seconds": seconds, "cpu_seconds": cpu_seconds}))


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that both loops have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="directory of the base model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--inputs", type=Path, help="tokens and initial adapter; without: only load")
    parser.add_argument("--output", type=Path, help="where the last adapter goes")
    return parser


def load(directory: Path, rank: int) -> peft.PeftModel:
    """The base model with LoRA on all linear layers but the output."""
    transformers.logging.disable_progress_bar()
    transformers.AutoTokenizer.from_pretrained(directory)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def one_round(
    model: peft.PeftModel, trained: State, state: State, clients: torch.Tensor, learning_rate: float
) -> State:
    """Trains all clients from ``state`` on tokens (clients, steps, batch, length); their mean."""
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for batches in clients:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state[name])
        optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
        for tokens in batches:
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, parameter in trained.items():
            total[name] += parameter.detach()
    return {name: tensor / len(clients) for name, tensor in total.items()}


if __name__ == "__main__":
    main()
