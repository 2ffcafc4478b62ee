"""Our DPO and GRPO losses against the code of TRL's trainers.

Runs where TRL is, which is no requirement of the course:

    pip install "trl==1.16.0" && pytest tests/test_rl_trl.py

A trainer is never started: its method that computes the loss gets a stand-in
for itself, with the settings that the method reads.
"""

from unittest.mock import MagicMock

import pytest
import torch
from helpers import gpt2
from torch.testing import assert_close

from lora_from_scratch.rl import (
    dpo_loss,
    group_advantages,
    grpo_loss,
    token_logps,
)

trl = pytest.importorskip("trl", reason="install trl==1.16.0 to run this")

B, PROMPT, ANSWER = 4, 3, 5
LENGTHS = torch.tensor([2, 5, 3, 4])


def case():
    """Return ids, a mask of the answers, and log probabilities of both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 37, (B, PROMPT + ANSWER), generator=generator)
    mask = (torch.arange(ANSWER) < LENGTHS[:, None]).double()
    z = [gpt2(seed=seed)(ids).logits for seed in (0, 1, 2)]
    logp, old, ref = (token_logps(x, ids, ANSWER) for x in z)
    return ids, mask, logp, old.detach(), ref.detach()


def test_grpo_is_trls():
    from trl.trainer.grpo_trainer import GRPOTrainer

    ids, mask, logp, old, ref = case()
    scores = torch.tensor([[0.3, 0.9], [0.1, 0.4]]).double()
    A = group_advantages(scores).flatten()
    trainer = MagicMock()
    trainer.beta, trainer.loss_type = 0.07, "grpo"
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    trainer.importance_sampling_level = "token"
    trainer.top_entropy_quantile = 1.0
    trainer.off_policy_mask_threshold = None
    trainer.use_vllm = trainer.aux_loss_enabled = False
    trainer.use_adaptive_entropy, trainer.entropy_coef = False, 0.0
    trainer.args.delta = None
    trainer.args.use_bias_correction_kl = False
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.training = True
    trainer.accelerator.gather = lambda x: x
    trainer._get_per_token_logps_and_entropies.return_value = (
        logp,
        torch.zeros_like(logp),
        None,
    )
    found = GRPOTrainer._compute_loss(
        trainer,
        MagicMock(),
        {
            "prompt_ids": ids[:, :PROMPT],
            "prompt_mask": torch.ones(B, PROMPT).long(),
            "completion_ids": ids[:, PROMPT:],
            "completion_mask": mask,
            "advantages": A,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        },
    )
    ours = grpo_loss(logp, old, ref, A[:, None], beta=0.07, mask=mask)
    assert_close(found, ours)


def test_dpo_is_trls():
    from trl.trainer.dpo_trainer import DPOTrainer

    ids, mask, logp, _, ref = case()
    whole = torch.cat([torch.zeros(B, PROMPT), mask], 1)

    def output(values):
        log_probs = torch.cat(
            [torch.zeros(B, PROMPT - 1).double(), values * mask], 1
        )
        out = MagicMock()
        out.log_probs = log_probs
        out.mean_logits = out.entropy = torch.zeros_like(log_probs)
        out.is_top1 = torch.zeros_like(log_probs).bool()
        return out

    trainer = MagicMock()
    trainer.ld_alpha, trainer.beta = None, 0.3
    trainer.aux_loss_enabled = trainer.precompute_ref_logps = False
    trainer.args.gradient_checkpointing_kwargs = None
    trainer.ref_model = lambda **_: output(ref)
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    trainer.use_weighting = False
    trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.accelerator.gather = lambda x: x
    trainer.accelerator.device = torch.device("cpu")
    found = DPOTrainer._compute_loss(
        trainer,
        lambda **_: output(logp),
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": whole,
        },
        False,
    )
    chosen, rejected = (logp * mask).sum(1).chunk(2)
    ours = dpo_loss(chosen, rejected, *(ref * mask).sum(1).chunk(2), beta=0.3)
    assert_close(found, ours)
