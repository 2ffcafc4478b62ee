"""An adapter as a policy: losses, advantages and KL, a few lines each.

With pi the model with its adapter on, ref the same model with it off, x a
prompt and y an answer of t tokens:

    reward model  -log sigmoid(s_chosen - s_rejected)
    the goal      max E[score(y)] - beta KL(pi || ref)
    its solution  pi*(y) ~ ref(y) exp(score(y) / beta)
    PPO           -min(rho A, clip(rho, 1 - c, 1 + c) A), rho = pi / pi_old
    DPO           -log sigmoid(beta (log pi/ref chosen - log pi/ref rejected))
    GRPO          A = (score - mean of the group) / its standard deviation

Log probabilities are (b, t) per token, scores (b,) per answer. Answers have
equal length here; where they do not, ``mask`` (b, t) is 1 on their tokens.

Sources: Christiano et al. 2017, arXiv:1706.03741 (reward model); Schulman et
al. 2016, arXiv:1506.02438 (GAE), and 2017, arXiv:1707.06347 (PPO); Ziegler et
al. 2019, arXiv:1909.08593 (KL per token); Rafailov et al. 2023,
arXiv:2305.18290 (DPO); Shao et al. 2024, arXiv:2402.03300 (GRPO).
Taught in: notebooks/17_rlhf.ipynb
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_from_scratch.linear import lora_layers
from lora_from_scratch.variants.pissa import PiSSALinear


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block ``model`` is its base model, bit for bit.

    No weight is moved: every LoRA layer calls its base layer alone. Blocks
    may lie inside each other.

    Raises:
        ValueError: the model has no adapter.
        RuntimeError: the adapter is merged, or a part of it cannot be
            switched off: modules_to_save, or PiSSA, which changed W0.
    """
    layers = lora_layers(model, needed="add_lora").values()
    if any(layer.merged for layer in layers if not hasattr(layer, "is_off")):
        raise RuntimeError("the adapter is merged; call unmerge_lora first")
    if getattr(model, "lora_originals", {}):
        raise RuntimeError(
            "modules_to_save are trained copies and stay on; adapt without "
            "them, or keep a second model as the reference"
        )
    if any(isinstance(layer, PiSSALinear) for layer in layers):
        raise RuntimeError(
            "PiSSA has taken its start out of W0, so W0 is not the base "
            "model; keep a second model as the reference"
        )
    outermost = [layer for layer in layers if not layer.merged]
    for layer in outermost:
        # A merged layer adds nothing to its base layer, nor does one that
        # is off; only the weight differs, which is not touched here.
        layer.merged = layer.is_off = True
    try:
        yield model
    finally:
        for layer in outermost:
            layer.merged = False
            del layer.is_off


def token_logps(logits: Tensor, ids: Tensor, n: int) -> Tensor:
    """Return log p of the last ``n`` tokens, each given those before, (b, n).

    Args:
        logits: of the model for ``ids``, (b, t, v).
        ids: (b, t), with 1 <= n < t.

    Raises:
        ValueError: if n is out of range.
    """
    if not 1 <= n < ids.shape[1]:
        raise ValueError(f"n must be in 1..{ids.shape[1] - 1}, got {n}")
    z, tokens = logits[:, -n - 1 : -1], ids[:, -n:, None]
    return z.gather(-1, tokens)[..., 0] - z.logsumexp(-1)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the Bradley-Terry loss of scores (b,) of pairs, in nats."""
    return -F.logsigmoid(chosen - rejected).mean()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    """Return the DPO loss in nats.

    Args:
        chosen: log pi of whole answers, summed over their tokens, (b,);
            ``rejected``, ``ref_chosen`` and ``ref_rejected`` likewise.
        beta: price of a nat of KL in the goal, > 0.
    """
    return preference_loss(
        beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    )


def kl_estimates(logp: Tensor, ref_logp: Tensor) -> dict[str, Tensor]:
    """Return three estimates of KL(pi || ref) at tokens drawn from pi.

    Their means over draws: k1 and k3 are right, k2 is not; k1 may be
    negative at a token, k2 and k3 cannot.
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    log_ratio = ref_logp - logp
    return {
        "k1": -log_ratio,
        "k2": log_ratio.square() / 2,
        "k3": log_ratio.exp() - 1 - log_ratio,
    }


def token_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, beta: float
) -> Tensor:
    """Return -beta (log pi - log ref) per token, plus the score at the last.

    Args:
        scores: one for each answer, (b,).
        logp: of the tokens under the policy that drew them, (b, t).
        ref_logp: of the same tokens with the adapter off, (b, t).
        beta: price of a nat of KL, >= 0.
    """
    rewards = -beta * (logp - ref_logp)
    rewards[:, -1] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), each (b, t), and no gradient.

    A_t = sum over k of (gamma lam)^k delta_{t+k}, where
    delta_t = rewards_t + gamma values_{t+1} - values_t and the value after
    the last token is zero; returns = A + values.

    Args:
        rewards: (b, t).
        values: what the value head expects before each token, (b, t).
        gamma: discount, in [0, 1].
        lam: 0 believes the values, 1 only what was received; in [0, 1].
    """
    values = values.detach()
    later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = rewards.detach() + gamma * later - values
    advantages, total = torch.zeros_like(deltas), deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        total = deltas[:, t] + gamma * lam * total
        advantages[:, t] = total
    return advantages, advantages + values


def group_advantages(scores: Tensor, eps: float = 1e-4) -> Tensor:
    """Return GRPO's advantages: scores (groups, n) standardized in each row.

    A group whose answers all score the same gets zeros: nothing is learned
    from it.

    Raises:
        ValueError: if a group has fewer than two answers.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            "scores are (groups, answers to one prompt), two or more a group; "
            f"got {tuple(scores.shape)}"
        )
    centered = scores - scores.mean(1, keepdim=True)
    return centered / (scores.std(1, keepdim=True) + eps)


def clipped_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    clip: float = 0.2,
    mask: Tensor | None = None,
) -> Tensor:
    """Return PPO's loss: -min(rho A, clip(rho) A), the mean over tokens.

    Args:
        logp: under the policy that is being trained, (b, t).
        old_logp: under the policy that drew the tokens, (b, t), fixed.
        advantages: (b, t), or (b, 1) for one number per answer; fixed.
        clip: a token whose rho has left 1 +- clip on the good side of its
            advantage has no gradient; > 0.
        mask: if given, the mean is over each answer's own tokens, then over
            answers.
    """
    rho = (logp - old_logp.detach()).exp()
    A = advantages.detach()
    loss = -torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
    return _mean(loss, mask)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    beta: float,
    clip: float = 0.2,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``clipped_loss`` plus beta times k3, the mean over tokens.

    Args as in ``clipped_loss``; ``ref_logp`` (b, t) with the adapter off.
    """
    kl = _mean(kl_estimates(logp, ref_logp.detach())["k3"], mask)
    return clipped_loss(logp, old_logp, advantages, clip, mask) + beta * kl


def _mean(loss, mask):
    """Return the mean over an answer's tokens, then over answers."""
    if mask is None:
        return loss.mean()
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


# -- drawing answers ----------------------------------------------------------


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Tensor,
    n: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return prompts (b, t) followed by ``n`` drawn tokens, (b, t + n).

    Drawn from the model as it is: no temperature, no cut of rare tokens,
    since the log probabilities that training uses know of neither.

    Args:
        model: a causal language model of transformers.
        prompts: token ids of equal length, (b, t).
        n: number of tokens, >= 1; end-of-text is a token like any other.
        generator: draws them; on the device of the model.
    """
    ids = x = prompts
    cache = None
    for _ in range(n):
        out = model(x, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        p = out.logits[:, -1].float().softmax(-1)
        x = torch.multinomial(p, 1, generator=generator)
        ids = torch.cat([ids, x], dim=1)
    return ids


@dataclass
class Rollout:
    """Answers of the policy, and what both sides say about them.

    Args:
        ids: prompt and answer, (b, t_prompt + t).
        logp: of the answer's tokens under the policy that drew them, (b, t).
        ref_logp: the same with the adapter off, (b, t).
        scores: what the answers are worth, (b,).
    """

    ids: Tensor
    logp: Tensor
    ref_logp: Tensor
    scores: Tensor

    @property
    def kl(self) -> float:
        """Nats per answer, the mean of k1 summed over tokens."""
        return float((self.logp - self.ref_logp).sum(1).mean())


@torch.no_grad()
def rollout(
    model: nn.Module,
    prompts: Tensor,
    n: int,
    score: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator | None = None,
    reference: nn.Module | None = None,
) -> Rollout:
    """Draw one answer of ``n`` tokens to each prompt and judge it.

    Two passes over the answers, one with the adapter and one without. The
    second serves as the reference and feeds the reward model, so there is
    one set of base weights in memory.

    Args:
        model: the policy; with an adapter, unless there is a reference.
        prompts: (b, t_prompt).
        n: tokens of an answer.
        score: maps ids and the *base* model's last hidden states
            (b, t, d_model) to scores (b,).
        generator: draws the tokens.
        reference: the base model in memory of its own, which training
            without an adapter needs.
    """
    ids = sample(model, prompts, n, generator)
    logp = token_logps(model(ids).logits, ids, n)
    with adapter_off(model) if reference is None else nullcontext(reference):
        base = model if reference is None else reference
        out = base(ids, output_hidden_states=True)
    ref_logp = token_logps(out.logits, ids, n)
    return Rollout(ids, logp, ref_logp, score(ids, out.hidden_states[-1]))


def ppo_step(
    model: nn.Module,
    value_head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    drawn: Rollout,
    beta: float,
    minibatches: int = 2,
    value_weight: float = 0.1,
    clip: float = 0.2,
) -> None:
    """Take one optimizer step on each of some minibatches of a rollout.

    The advantages come from ``token_rewards`` and ``gae`` and are
    standardized over the batch. The value head reads the policy's last
    hidden states, so the adapter serves both.

    Args:
        model: the policy, adapter on.
        value_head: (d_model -> 1).
        optimizer: over the adapter and the value head.
        drawn: from ``rollout`` with this policy.
        beta: price of a nat of KL, >= 0.
        minibatches: parts into which the rollout is cut.
        value_weight: of the squared error of the values in the loss.
        clip: as in ``clipped_loss``.
    """
    ids, n = drawn.ids, drawn.logp.shape[1]
    rewards = token_rewards(drawn.scores, drawn.logp, drawn.ref_logp, beta)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        values = value_head(hidden[:, -n - 1 : -1])[..., 0]  # (b, n)
    advantages, returns = gae(rewards, values)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for part in torch.arange(len(ids)).chunk(minibatches):
        out = model(ids[part], output_hidden_states=True)
        logp = token_logps(out.logits, ids[part], n)
        values = value_head(out.hidden_states[-1][:, -n - 1 : -1])[..., 0]
        loss = clipped_loss(logp, drawn.logp[part], advantages[part], clip)
        error = (values - returns[part]).square().mean()
        optimizer.zero_grad()
        (loss + value_weight * error).backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()


def grpo_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    drawn: Rollout,
    group: int,
    beta: float,
    minibatches: int = 2,
    clip: float = 0.2,
) -> None:
    """Take one optimizer step on each of some minibatches of a rollout.

    Args:
        model: the policy, adapter on.
        optimizer: over the adapter. There is no value head.
        drawn: from ``rollout``; ``group`` answers to a prompt in a row.
        group: answers to one prompt, >= 2.
        beta: price of a nat of KL, >= 0.
        minibatches: parts into which the rollout is cut.
        clip: as in ``clipped_loss``.
    """
    ids, n = drawn.ids, drawn.logp.shape[1]
    advantages = group_advantages(drawn.scores.view(-1, group)).view(-1, 1)
    order = torch.arange(len(ids)).view(-1, group).T.flatten()
    for part in order.chunk(minibatches):  # of every group some
        logp = token_logps(model(ids[part]).logits, ids[part], n)
        loss = grpo_loss(
            logp,
            drawn.logp[part],
            drawn.ref_logp[part],
            advantages[part],
            beta,
            clip,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()


# -- a wish, as a rule --------------------------------------------------------

WORD = re.compile(r"[A-Za-z']+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """Return what ends in a full stop, a question or an exclamation mark."""
    return [part.strip() for part in re.split(r"[.!?]", text)[:-1]]


def short_sentences(text: str, low: int = 3, high: int = 12) -> float:
    """Return the share of words in whole sentences of low to high words.

    0 for a text without words. What follows the last full stop is no whole
    sentence; "Mrs." ends one, because the rule knows no better.
    """
    n = [len(words(sentence)) for sentence in sentences(text)]
    return sum(k for k in n if low <= k <= high) / max(1, len(words(text)))


def readable(text: str, known: set[str]) -> bool:
    """Return whether a text has 8 words or more, mostly known, not one only.

    Four of five words are in ``known``, and no word is a quarter of them.
    """
    found = words(text)
    if len(found) < 8:
        return False
    most = Counter(found).most_common(1)[0][1]
    return (
        sum(word in known for word in found) >= 0.8 * len(found)
        and most <= len(found) / 4
    )


def better(a: str, b: str, known: set[str]) -> int:
    """Return 1 if ``a`` is the better answer, -1 if ``b`` is, 0 if neither.

    A readable answer beats one that is not; of two readable ones the one
    with the larger share of short sentences wins.
    """
    x, y = (
        (ok, ok * short_sentences(text))
        for text in (a, b)
        for ok in [readable(text, known)]
    )
    return (x > y) - (x < y)
