"""The other side of ``engine.py`` under privacy: DP-SGD with Opacus as a bare loop in one process.

As ``bare_loop.py``, with Opacus' hooks on the same PEFT model, its Poisson sampler and its optimizer:
each sample is computed in passes of at most ``--micro-batch`` records. A is frozen, as in FFA-LoRA.
Nothing of fedslm is imported.
"""

from __future__ import annotations

import argparse
import json
import time

import peft
import torch
from bare_loop import State, load, options
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from safetensors.torch import load_file, save_file
from torch.nn import functional


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="expected records of a sample")
    parser.add_argument("--micro-batch", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.model, arguments.rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    ready = time.monotonic()
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    if arguments.inputs:
        values = load_file(arguments.inputs)
        clients = values.pop("tokens").long()
        peft.set_peft_model_state_dict(model, values)
        hooked = GradSampleModule(model, loss_reduction="mean", strict=False)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = {name: p.detach().clone() for name, p in trained.items()}
        for _ in range(arguments.rounds):
            began, computed = time.monotonic(), time.process_time()
            state = one_round(hooked, trained, state, clients, arguments)
            seconds.append(time.monotonic() - began)
            cpu_seconds.append(time.process_time() - computed)
        save_file(state, arguments.output)
    print(json.dumps({"ready": ready, "seconds": seconds, "cpu_seconds": cpu_seconds}))


def one_round(
    model: GradSampleModule,
    trained: State,
    state: State,
    clients: torch.Tensor,
    arguments: argparse.Namespace,
) -> State:
    """Trains all clients from ``state`` on tokens (clients, records, length); their mean."""
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for records in clients:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state[name])
        inner = torch.optim.AdamW(trained.values(), lr=arguments.learning_rate, weight_decay=0.0)
        optimizer = DPOptimizer(
            inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=arguments.batch
        )
        sampler = UniformWithReplacementSampler(
            num_samples=len(records),
            sample_rate=arguments.batch / len(records),
            steps=arguments.steps,
        )
        for sample in sampler:
            one_step(model, optimizer, records[sample], arguments.micro_batch)
        for name, parameter in trained.items():
            total[name] += parameter.detach()
    return {name: tensor / len(clients) for name, tensor in total.items()}


def one_step(
    model: GradSampleModule, optimizer: DPOptimizer, records: torch.Tensor, micro_batch: int
) -> None:
    """Takes one step on a sample, in passes of at most ``micro_batch`` records."""
    parts = records.split(micro_batch) if len(records) else ()
    for number, tokens in enumerate(parts, start=1):
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        optimizer.zero_grad()
        losses.view(len(tokens), -1).mean(dim=1).mean().backward()
        optimizer.signal_skip_step(do_skip=number < len(parts))
        optimizer.step()


if __name__ == "__main__":
    main()
