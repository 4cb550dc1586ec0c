"""Each loss against a formula of its own in NumPy, and each gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch.utils._python_dispatch import TorchDispatchMode

from fedslm.distillation import losses

Numbers = np.ndarray
GENERATOR = np.random.default_rng(7)
LOGITS, TEACHER = GENERATOR.normal(size=(2, 5, 9)) * 2


def loss_of(name: str, logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """A loss by name."""
    target = losses.soft_target(teacher, temperature)
    if name == "forward":
        return losses.forward_kl(logits, target, temperature)
    if name == "reverse":
        return losses.reverse_kl(logits, target, temperature)
    return losses.jsd(logits, target, 0.3, temperature)


def formula(name: str, logits: Numbers, teacher: Numbers, temperature: float) -> Numbers:
    """The same by SciPy's relative entropy."""
    own, wanted = softmax(logits / temperature, axis=-1), softmax(teacher / temperature, axis=-1)
    if name == "forward":
        found = rel_entr(wanted, own)
    elif name == "reverse":
        found = rel_entr(own, wanted)
    else:
        mixed = 0.3 * wanted + 0.7 * own
        found = 0.3 * rel_entr(wanted, mixed) + 0.7 * rel_entr(own, mixed)
    return temperature**2 * found.sum(axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_values_and_gradients(name: str, temperature: float) -> None:
    """Value by an independent formula; gradient by central differences of that formula."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    found = loss_of(name, logits, torch.tensor(TEACHER), temperature)
    assert found.dtype == torch.float64
    assert found.detach().numpy() == pytest.approx(formula(name, LOGITS, TEACHER, temperature))
    found.sum().backward()
    step = 1e-6
    for position, token in [(0, 0), (2, 5), (4, 8)]:
        moved = [LOGITS.copy(), LOGITS.copy()]
        moved[0][position, token] += step
        moved[1][position, token] -= step
        up, down = (formula(name, each, TEACHER, temperature).sum() for each in moved)
        assert float(logits.grad[position, token]) == pytest.approx((up - down) / (2 * step), abs=1e-7)
    assert torch.autograd.gradcheck(
        lambda x: loss_of(name, x, torch.tensor(TEACHER), temperature), (logits,)
    )


def test_jsd_goes_over_into_both_divergences() -> None:
    """β = 0 and 1 are the special cases; JSD_β / β and JSD_β / (1 − β) go to them."""
    logits, target = torch.tensor(LOGITS), losses.soft_target(torch.tensor(TEACHER))
    forward, reverse = losses.forward_kl(logits, target), losses.reverse_kl(logits, target)
    assert torch.equal(losses.jsd(logits, target, 0.0), forward)
    assert torch.equal(losses.jsd(logits, target, 1.0), reverse)
    assert torch.allclose(losses.jsd(logits, target, 1e-7) / 1e-7, forward, rtol=1e-4)
    assert torch.allclose(losses.jsd(logits, target, 1 - 1e-7) / 1e-7, reverse, rtol=1e-4)


def test_jsd_is_that_of_a_known_case() -> None:
    """β = 1/2, p = (1, 0), q = (0, 1): each half is ln 2, so is their mean."""
    logits, target = torch.tensor([[-40.0, 40.0]]), torch.tensor([[0.0, -80.0]])
    assert float(losses.jsd(logits, target, 0.5)) == pytest.approx(np.log(2), abs=1e-6)


def test_jsd_is_that_of_the_library_that_named_it() -> None:
    """As TRL's GKD trainer computes it, with torch's own KL divergence."""
    own, wanted = (torch.log_softmax(torch.tensor(each), -1) for each in (LOGITS, TEACHER))
    beta = torch.tensor(0.3, dtype=torch.float64)
    both = torch.stack([own + torch.log1p(-beta), wanted + torch.log(beta)])
    mixed = torch.logsumexp(both, dim=0)
    halves = [
        torch.nn.functional.kl_div(mixed, each, reduction="none", log_target=True).sum(-1)
        for each in (wanted, own)
    ]
    expected = beta * halves[0] + (1 - beta) * halves[1]
    assert torch.allclose(losses.jsd(torch.tensor(LOGITS), wanted, 0.3), expected)


def test_what_is_already_so_has_no_gradient() -> None:
    """A student that says what it should is left alone, whatever the divergence."""
    for loss in (losses.forward_kl, losses.reverse_kl, lambda x, t: losses.jsd(x, t, 0.4)):
        logits = torch.tensor(LOGITS, requires_grad=True)
        loss(logits, losses.soft_target(logits)).sum().backward()
        assert float(logits.grad.abs().max()) < 1e-12
    for loss in (losses.forward_kl, losses.reverse_kl):  # exactly, in float32 too
        logits = torch.tensor(LOGITS).float().requires_grad_()
        loss(logits, losses.soft_target(logits)).sum().backward()
        assert float(logits.grad.abs().max()) == 0.0


def test_impossible_tokens_are_no_trouble() -> None:
    """A target of 0 adds nothing to forward KL; a softened one keeps reverse KL finite."""
    logits = torch.zeros(1, 3, requires_grad=True)
    target = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    forward = losses.forward_kl(logits, target)
    assert float(forward.detach()) == pytest.approx(np.log(3))
    reverse = losses.reverse_kl(logits, losses.softened(target))
    assert torch.isfinite(reverse).all()
    (forward + reverse).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert float(losses.softened(target).exp().sum()) == pytest.approx(1.0)


def test_the_gate_hears_the_sure_alone() -> None:
    """1 where the likeliest class reaches the threshold."""
    target = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.59, 0.41]]).log()
    assert losses.confidence_gate(target, 0.6).tolist() == [1.0, 1.0, 0.0]


def test_hardened_guesses_have_the_teachers_shares() -> None:
    """Each class as often as it should be; with two classes that is one threshold."""
    chances = softmax(GENERATOR.normal(size=(60, 4)), axis=-1)
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1])
    found = losses.hardened(torch.tensor(chances).log(), shares)
    assert np.bincount(found.numpy(), minlength=4).tolist() == [30, 15, 9, 6]
    worth = np.log(chances)[np.arange(60), found.numpy()].sum()
    for _ in range(2000):  # no exchange of two labels is better
        first, second = GENERATOR.integers(60, size=2)
        swapped = found.numpy().copy()
        swapped[[first, second]] = swapped[[second, first]]
        assert np.log(chances)[np.arange(60), swapped].sum() <= worth + 1e-9
    first = GENERATOR.random(40)
    pair = torch.tensor(np.stack([first, 1 - first], axis=1)).log()
    guessed = losses.hardened(pair, torch.tensor([0.25, 0.75])).numpy()
    assert set(np.argsort(-first)[:10]) == set(np.flatnonzero(guessed == 0))


def test_log_confidence_mixes_two_cross_entropies() -> None:
    """(1 − c)·CE with the teacher + c·CE with its own guess, and the gradient of just that."""
    logits, shares = torch.tensor(LOGITS[:, :3], requires_grad=True), torch.tensor([0.4, 0.4, 0.2])
    target = losses.soft_target(torch.tensor(TEACHER[:, :3]))
    guessed = losses.hardened(losses.soft_target(logits), shares).numpy()
    own = log_softmax(LOGITS[:, :3], axis=-1)
    taught = -(target.exp().numpy() * own).sum(axis=-1)
    expected = 0.6 * taught - 0.4 * own[np.arange(5), guessed]
    found = losses.log_confidence(logits, target, 0.4, shares)
    assert found.detach().numpy() == pytest.approx(expected)
    found.sum().backward()
    wanted = 0.6 * target.exp().numpy() + 0.4 * np.eye(3)[guessed]
    assert logits.grad.numpy() == pytest.approx(np.exp(own) - wanted)


class Widest(TorchDispatchMode):
    """Remembers the largest float32 tensor that is made."""

    numbers = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.numbers = max(self.numbers, made.numel())
        return made


def losses_in(
    logits: torch.Tensor, target: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Value, gradient and the largest float32 tensor of forward KL on bfloat16 logits."""
    logits = logits.clone().requires_grad_()
    with Widest() as widest:
        found = losses.in_pieces(losses.forward_kl, logits, target, most=most)
        found.sum().backward()
    return found.detach(), logits.grad, widest.numbers


def test_pieces_are_the_whole_in_less_memory() -> None:
    """Same values and gradients; nothing float32 is wider than a piece, in the backward pass either."""
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = losses.soft_target(torch.randn(64, 500, generator=torch.Generator().manual_seed(1)))
    whole, in_pieces = losses_in(logits, target, 10**9), losses_in(logits, target, 2000)
    assert torch.equal(whole[0], in_pieces[0])
    assert torch.equal(whole[1], in_pieces[1])
    assert (whole[2], in_pieces[2]) == (64 * 500, 2000)


def mean_gradient(loss: Callable[[torch.Tensor], torch.Tensor], logits: Numbers) -> Numbers:
    """Gradient of a summed loss."""
    free = torch.tensor(logits, requires_grad=True)
    loss(free).sum().backward()
    return free.grad.numpy()


def test_sampled_targets_have_the_right_gradient_and_the_likeliest_do_not() -> None:
    """The mean gradient over draws is forward KL's; keeping the first three tokens is not."""
    target, generator = losses.soft_target(torch.tensor(TEACHER)), torch.Generator().manual_seed(3)
    exact = mean_gradient(lambda x: losses.forward_kl(x, target), LOGITS)
    ids, weights = losses.sampled(target, 40_000, generator)
    found = mean_gradient(lambda x: losses.sparse_forward_kl(x, ids, weights), LOGITS)
    spread = np.sqrt(target.exp().numpy() * (1 - target.exp().numpy()) / 40_000)
    assert (np.abs(found - exact) <= 4.5 * spread + 1e-9).all()
    top = target.topk(3)
    shares = top.values.softmax(-1)
    likeliest = mean_gradient(lambda x: losses.sparse_forward_kl(x, top.indices, shares), LOGITS)
    assert (np.abs(likeliest - exact) > 20 * spread).any()
