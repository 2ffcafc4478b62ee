"""Tests for lora_from_scratch/rl.py: one test per claim in notebook 17."""

import math

import pytest
import torch
from helpers import fill, gpt2, ids, llama, logits
from torch import nn
from torch.testing import assert_close

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.inject import add_lora, lora_parameters, merge_lora
from lora_from_scratch.rl import (
    adapter_off,
    better,
    clipped_loss,
    dpo_loss,
    gae,
    group_advantages,
    grpo_loss,
    grpo_step,
    kl_estimates,
    ppo_step,
    preference_loss,
    readable,
    rollout,
    sample,
    sentences,
    short_sentences,
    token_logps,
    token_rewards,
)

B, T, V = 3, 5, 7


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------- one set of weights


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapter_off_is_the_base_model_to_the_bit(make, use_dora):
    before = logits(make())
    model = add_lora(make(), LoRAConfig(r=4, use_dora=use_dora))
    fill(model)
    after = logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), before)
        with adapter_off(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    assert not torch.allclose(after, before)


def test_an_error_in_the_block_switches_the_adapter_on_again():
    model = add_lora(gpt2(), LoRAConfig(r=4))
    fill(model)
    after = logits(model)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert torch.equal(logits(model), after)


def test_what_cannot_be_switched_off_is_an_error():
    with pytest.raises(ValueError, match="add_lora"), adapter_off(gpt2()):
        pass
    model = add_lora(gpt2(), LoRAConfig(r=4))
    merge_lora(model)
    with pytest.raises(RuntimeError, match="merged"), adapter_off(model):
        pass
    model = add_lora(gpt2(), LoRAConfig(r=4, modules_to_save=["ln_f"]))
    with pytest.raises(RuntimeError, match="modules_to_save"):
        adapter_off(model).__enter__()
    model = add_lora(gpt2(), LoRAConfig(r=4, init_lora_weights="pissa"))
    with pytest.raises(RuntimeError, match="PiSSA"), adapter_off(model):
        pass


# ------------------------------------------------- losses


def test_token_logps_are_those_of_a_loop():
    z, tokens = draw(B, T, V), torch.randint(0, V, (B, T))
    found = token_logps(z, tokens, 2)
    for row in range(B):
        for place in (3, 4):
            p = z[row, place - 1].softmax(-1)[tokens[row, place]]
            assert_close(found[row, place - 3], p.log())
    for n in (0, T):
        with pytest.raises(ValueError, match="n must be in"):
            token_logps(z, tokens, n)


def test_the_preference_loss_is_a_logistic_regression_on_differences():
    a, b = draw(B), draw(B, seed=1)
    p = 1 / (1 + (b - a).exp())
    assert_close(preference_loss(a, b), -p.log().mean())
    assert_close(preference_loss(a + 5, b + 5), preference_loss(a, b))
    assert_close(
        preference_loss(a, a), torch.tensor(math.log(2), dtype=a.dtype)
    )


def test_dpo_starts_at_log_2_and_pushes_by_how_wrong_it_is():
    chosen, rejected = draw(B).requires_grad_(), draw(B, seed=1)
    ref = chosen.detach(), rejected
    start = dpo_loss(chosen, rejected, *ref, beta=0.3)
    assert_close(start.item(), math.log(2))
    ref = draw(B, seed=2), draw(B, seed=3)
    dpo_loss(chosen, rejected, *ref, beta=0.3).backward()
    margin = 0.3 * (chosen.detach() - ref[0] - rejected + ref[1])
    assert_close(chosen.grad, -0.3 / B / (1 + margin.exp()))


def test_dpo_finds_the_policy_that_maximizes_reward_minus_beta_kl():
    ref = draw(4).log_softmax(0)
    reward, beta = draw(4, seed=1), 0.7
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor(
        [(i, j) for i in range(4) for j in range(4) if i != j]
    ).T
    share = torch.sigmoid(reward[first] - reward[second])  # who prefers first
    optimizer = torch.optim.LBFGS([z], max_iter=300, tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        p = z.log_softmax(0)
        total = 0
        for i, j, s in zip(first, second, share, strict=True):
            total = total + s * dpo_loss(
                p[i, None], p[j, None], ref[i, None], ref[j, None], beta
            )
        total.backward()
        return total

    optimizer.step(loss)
    best = (ref + reward / beta).softmax(0)
    assert_close(z.detach().softmax(0), best, atol=1e-5, rtol=0)


def test_k1_and_k3_are_right_on_the_mean_and_k2_is_not():
    pi, ref = draw(V).log_softmax(0), draw(V, seed=1).log_softmax(0)
    kl = (pi.exp() * (pi - ref)).sum()
    found = kl_estimates(pi, ref)
    mean = {name: (pi.exp() * k).sum() for name, k in found.items()}
    assert_close(mean["k1"], kl)
    assert_close(mean["k3"], kl)
    assert abs(mean["k2"] - kl) > 0.02
    assert (found["k1"] < 0).any()
    assert (found["k2"] >= 0).all() and (found["k3"] >= 0).all()


def test_rewards_of_tokens_add_up_to_score_minus_beta_kl():
    score, logp, ref = draw(B), draw(B, T, seed=1), draw(B, T, seed=2)
    rewards = token_rewards(score, logp, ref, beta=0.2)
    assert_close(rewards.sum(1), score - 0.2 * (logp - ref).sum(1))
    assert_close(rewards[:, 1], -0.2 * (logp - ref)[:, 1])


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1, 1), (1, 0), (0.9, 0.8), (0, 0.5)]
)
def test_advantages_are_the_sum_of_discounted_surprises(gamma, lam):
    rewards, values = draw(B, T), draw(B, T, seed=1)
    found, returns = gae(rewards, values, gamma, lam)
    for b in range(B):
        for t in range(T):
            total = 0.0
            for k in range(T - t):
                s = t + k
                later = values[b, s + 1] if s + 1 < T else 0.0
                surprise = rewards[b, s] + gamma * later - values[b, s]
                total += (gamma * lam) ** k * surprise
            assert_close(found[b, t], total)
    assert_close(returns, found + values)


def test_lambda_1_does_not_believe_the_values():
    rewards, values = draw(B, T), draw(B, T, seed=1)
    _, returns = gae(rewards, values, lam=1.0)
    assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


def test_the_first_step_of_ppo_is_the_policy_gradient():
    logp, A = draw(B, T).requires_grad_(), draw(B, T, seed=1)
    clipped_loss(logp, logp.detach(), A).backward()
    assert_close(logp.grad, -A / (B * T))


def test_ppo_stops_at_the_clip_only_on_the_good_side():
    for A, log_rho, moves in [
        (1.0, 0.5, False),
        (1.0, -0.5, True),
        (-1.0, -0.5, False),
        (-1.0, 0.5, True),
        (1.0, 0.1, True),
    ]:
        logp = torch.tensor([[log_rho]], requires_grad=True)
        clipped_loss(logp, torch.zeros(1, 1), torch.tensor([[A]])).backward()
        assert (logp.grad.item() != 0) == moves, (A, log_rho)


def test_the_advantages_of_a_group_cancel_and_a_draw_teaches_nothing():
    scores = draw(B, 4)
    scores[1] = 2.5
    A = group_advantages(scores)
    assert_close(A.sum(1), torch.zeros(B, dtype=A.dtype))
    assert torch.equal(A[1], torch.zeros_like(A[1]))
    assert_close(A[0].std(), torch.ones((), dtype=A.dtype), rtol=1e-3, atol=0)
    assert_close(group_advantages(3 * scores + 1), A, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="two or more"):
        group_advantages(scores[:, :1])


def test_a_mask_takes_the_mean_over_each_answer_first():
    logp, old, ref = (draw(B, T, seed=s) for s in range(3))
    A, lengths = draw(B, 1, seed=3), [2, 5, 3]
    mask = torch.tensor([[float(t < n) for t in range(T)] for n in lengths])
    total = 0.0
    for b, n in enumerate(lengths):
        for t in range(n):
            rho = (logp[b, t] - old[b, t]).exp()
            clip = min(max(rho, 0.8), 1.2)
            k3 = (ref[b, t] - logp[b, t]).exp() - 1
            k3 -= ref[b, t] - logp[b, t]
            loss = -min(rho * A[b, 0], clip * A[b, 0]) + 0.1 * k3
            total += loss / n / B
    assert_close(grpo_loss(logp, old, ref, A, 0.1, mask=mask), total)


# ------------------------------------------------- drawing and training


def test_a_sample_has_the_probabilities_of_the_model():
    model = gpt2(torch.float32)
    prompts = ids()[:1, :4].repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    found = sample(model, prompts, 1, generator)[:, -1]
    share = torch.bincount(found, minlength=37) / 4000
    p = logits(model, prompts[:1])[0, -1].softmax(-1)
    assert (share - p).abs().max() < 0.02
    answers = sample(model, ids()[:, :4], 3, torch.Generator().manual_seed(1))
    assert torch.equal(answers[:, :4], ids()[:, :4])
    again = sample(model, ids()[:, :4], 3, torch.Generator().manual_seed(1))
    assert torch.equal(answers, again)


def talkative():
    """Return a GPT-2 whose logits are far enough apart to say something."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(6)
    return model


def low(ids, hidden):
    """Score an answer of three tokens by how many are below 12 of 37."""
    return (ids[:, 4:] < 12).double().sum(1)


def test_a_new_policy_is_the_reference_exactly():
    model = add_lora(gpt2(), LoRAConfig(r=4))
    drawn = rollout(model, ids()[:, :4], 3, low)
    assert torch.equal(drawn.logp, drawn.ref_logp) and drawn.kl == 0
    fill(model)
    base = gpt2()
    drawn = rollout(model, ids()[:, :4], 3, low)
    ref = token_logps(logits(base, drawn.ids), drawn.ids, 3)
    assert_close(drawn.ref_logp, ref)
    assert_close(drawn.kl, float((drawn.logp - ref).sum(1).mean()))
    other = rollout(model, ids()[:, :4], 3, low, None, base)
    ref = token_logps(logits(base, other.ids), other.ids, 3)
    assert torch.equal(other.ref_logp, ref)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_training_raises_what_is_rewarded_and_leaves_the_base(method):
    model = add_lora(talkative(), LoRAConfig(r=4, lora_alpha=8))
    before = logits(talkative())
    head = nn.Linear(24, 1).double()
    nn.init.zeros_(head.weight)
    trained = [*lora_parameters(model)]
    trained += head.parameters() if method == "ppo" else []
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    prompts = ids()[:, :4].repeat_interleave(16, 0)
    scores = []
    for _ in range(10):
        drawn = rollout(model, prompts, 3, low, generator)
        scores.append(float(drawn.scores.mean()))
        if method == "ppo":
            ppo_step(model, head, optimizer, drawn, beta=0.0)
        else:
            grpo_step(model, optimizer, drawn, group=16, beta=0.0)
    assert scores[0] < 1.1 and sum(scores[-3:]) / 3 > 1.4
    with adapter_off(model):
        assert torch.equal(logits(model), before)


def test_a_high_price_of_kl_keeps_the_policy_at_home():
    kl = {}
    for beta in (0.0, 3.0):
        model = add_lora(talkative(), LoRAConfig(r=4, lora_alpha=8))
        optimizer = torch.optim.Adam(lora_parameters(model), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        prompts = ids()[:, :4].repeat_interleave(8, 0)
        for _ in range(10):
            drawn = rollout(model, prompts, 3, low, generator)
            grpo_step(model, optimizer, drawn, group=8, beta=beta)
        kl[beta] = drawn.kl
    assert kl[3.0] < kl[0.0] / 4


# ------------------------------------------------- the wish


def test_short_sentences_counts_words_in_whole_short_sentences():
    text = "He came home at last. No. She did not know it! And then"
    assert sentences(text) == [
        "He came home at last",
        "No",
        "She did not know it",
    ]
    assert short_sentences(text) == 10 / 13
    assert short_sentences(text, low=1) == 11 / 13
    assert short_sentences(". . . .") == short_sentences("") == 0
    assert short_sentences("It was " + "very " * 20 + "late.") == 0
    assert short_sentences("no full stop at the end of it") == 0


def test_a_readable_answer_beats_one_that_is_not():
    known = set("the day was fine and we went out to sea it rained".split())
    good = "The day was fine. We went out to sea."
    long = "The day was fine and we went out to sea and it rained"
    dots, again = "qq zz. " * 6, "The day. " * 6
    assert readable(good, known) and readable(long, known)
    assert not any(readable(t, known) for t in (dots, again, "The day.", ""))
    assert better(good, long, known) == 1 == -better(long, good, known)
    assert better(long, dots, known) == 1
    assert better(dots, again, known) == 0 == better(good, good, known)
