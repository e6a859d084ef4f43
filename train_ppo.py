r"""PPO: sample, score, KL reward, advantage, clipped loss, value loss, line by line.

Each iteration samples one response per prompt from the policy, lets the frozen reward model score
it, charges for every nat that the policy has moved away from the frozen reference (the SFT model),
spreads the result over the tokens with GAE, and takes a few epochs of clipped gradient steps.

The structure follows "The N Implementation Details of RLHF with PPO" (arXiv 2403.17031): KL in the
reward, gamma 1, lambda 0.95, clips 0.2, Adam eps 1e-5, one temperature for sampling and scoring,
whitened advantages, a fixed score for responses that never end. Every tensor is aligned to one
grid: column t of a (B, T-1) tensor speaks of emitting tokens[:, t+1], and is exactly 0 outside
response_mask.

Left out on purpose: several GPUs, an inference engine of its own, mixing in pretraining gradients.

On CPU:  python train_ppo.py --judge data/toy/judge.py:judge
             (2.8 CPU-minutes; gold score from 0.5 to 1.2 at a KL of 1.2 nats)
On GPU:  python train_ppo.py --init out/my_sft --reward_model out/my_rm --prompts my_prompts.jsonl \
             --rollout_size 256 --minibatch_size 64 --lr 3e-6 --critic_lr 3e-6 --beta 0.05 \
             --max_new_tokens 256          (not timed)
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch

from minirlhf.batches import encode_prompts, micro_batches, response_mask
from minirlhf.generate import generate, join
from minirlhf.losses import ppo_policy_loss, ppo_value_loss, surrogate_losses
from minirlhf.masked import (entropy, masked_mean, masked_sum, masked_var, masked_whiten,
                             token_logprobs)
from minirlhf.model import ActorCritic
from minirlhf.rl import adapt_beta, gae, kl_estimate, normalize_scores, token_rewards
from minirlhf.plumbing.checkpoints import frozen
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_prompts
from minirlhf.plumbing.judges import load_judge
from minirlhf.plumbing.optim import lr_at, make_optimizer, set_lr
from minirlhf.plumbing.runs import due, start_run
from minirlhf.look.ledger import Ledger
from minirlhf.look.plot import draw_curves


@dataclass
class Config:
    init: str = "out/sft"  # run folder of the SFT model: the policy's start, and the reference
    reward_model: str = "out/rm"  # run folder of the reward model
    prompts: str = "data/toy/prompts.jsonl"  # prompts to answer
    out: str = "out/ppo"  # the run's folder
    num_steps: int = 100  # iterations of sampling and updating; above 0
    rollout_size: int = 96  # prompts per iteration, one response each; above 0
    max_new_tokens: int = 40  # longest response in tokens; above 0
    temperature: float = 1.0  # of sampling, and of every log-prob
    sample_batch_size: int = 0  # responses sampled at once (0: the whole rollout)
    num_epochs: int = 2  # passes over each rollout; above 0
    minibatch_size: int = 48  # responses per optimizer step; above 0
    micro_batch_size: int = 24  # responses scored, or trained on, at once (0: the whole minibatch)
    lr: float = 1.5e-4  # learning rate of the policy
    critic_lr: float = 3e-4  # learning rate of the separate critic
    final_lr: float = 0.1  # last learning rate, as a share of the first
    beta: float = 0.1  # reward units charged per nat of KL to the reference
    kl_target: float = 0.0  # adapt beta towards this KL per response in nats (0: beta is fixed)
    kl_horizon: int = 1000  # responses in which beta may move by a fifth; above 0
    kl_kind: str = "k1"  # estimator of the KL in the reward: k1 | k2 | k3
    gamma: float = 1.0  # discount per token; up to 1
    lam: float = 0.95  # GAE's lambda: 1 trusts the rewards alone, 0 the critic alone; up to 1
    clip_range: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # how far a value moves before its loss is clipped (0: never)
    score_clip: float = 5.0  # largest |normalised score| (0: no clip)
    missing_end_score: float = -3.0  # score of a response that never ended; any sign
    whiten: bool = True  # scale advantages to mean 0, deviation 1 over the rollout
    share_critic: bool = False  # a value head on the policy's trunk instead of a separate critic
    vf_coef: float = 0.1  # weight of the value loss where the trunk is shared
    stop_kl: float = 0.1  # end an iteration's epochs past this approximate KL per token (0: never)
    grad_clip: float = 1.0  # largest norm of the policy's, and of the critic's, gradient; above 0
    judge: str = ""  # file.py:function, a gold score to log beside the reward; never trained on
    eval_every: int = 20  # iterations between printed samples; above 0
    save_every: int = 20  # iterations between checkpoints; above 0
    ledger_every: int = 5  # iterations between records of every tensor (0: none)
    seed: int = 0  # of the prompts' order and of sampling
    device: str = ""  # cuda, cpu or mps (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16, of the matrix products
    threads: int = 1  # CPU threads; one is the most efficient at this size
    tensorboard: bool = False  # write the log for TensorBoard, too (pip install tensorboard)
    resume: bool = False  # go on with the run in out, with its options
    overwrite: bool = False  # start anew where out holds a run


def in_parts(read, cfg, *tensors):
    """read(*rows of each tensor) -> a tuple of tensors, for some rows after the other, joined.

    A whole rollout's logits, (B, T, V), would be by far the largest thing in memory.
    """
    size = cfg.micro_batch_size or cfg.minibatch_size
    parts = [read(*rows) for rows in zip(*(tensor.split(size) for tensor in tensors))]
    return [torch.cat(part) for part in zip(*parts)]


@torch.no_grad()
def sample_responses(actor, prompts, cfg, run, stop_ids=None):
    """Sample: a response to each prompt, and what policy and critic say of its every token.

    prompts: B lists of ids; stop_ids: what ends a response (None: the end token). Returns the
    rollout's first tensors; each step below adds its own.
    """
    actor.eval()
    stop_ids = [run.tokenizer.end_id] if stop_ids is None else stop_ids
    # Dropout is off, and no top-k or top-p: what is sampled is what will be scored.
    with run.autocast():
        sampled = join([generate(actor.policy, part, cfg.max_new_tokens, stop_ids,
                                 cfg.temperature, generator=run.generator)
                        for part in micro_batches(prompts, cfg.sample_batch_size or len(prompts))])
    tokens, prompt_lens, lengths = sampled.tokens, sampled.prompt_lens, sampled.lengths
    mask = response_mask(prompt_lens, lengths, tokens.shape[1])  # (B, T-1)

    def read(tokens, mask):  # (b, T), (b, T-1)
        # One forward pass; logits[:, t] predicts tokens[:, t+1], hence the shift. The log-probs
        # come from this pass and not from the decoding cache, whose arithmetic differs.
        with run.autocast():
            logits, values = actor(tokens)  # (b, T, V), (b, T)
        logits = logits[:, :-1].float() / cfg.temperature  # (b, T-1, V), what was sampled from
        logprobs = token_logprobs(logits, tokens[:, 1:])  # (b, T-1)
        zero = torch.zeros_like(logprobs)  # (b, T-1)
        return (torch.where(mask, logprobs, zero),
                torch.where(mask, values[:, :-1], zero),  # before tokens[:, 1:] is emitted
                # For the log only, where the mask is True: a softmax of it all costs memory.
                zero.masked_scatter(mask, entropy(logits[mask])))

    logprobs, values, nats = in_parts(read, cfg, tokens, mask)  # each (B, T-1)
    return {"tokens": tokens, "prompt_lens": prompt_lens, "lengths": lengths,
            "ended": sampled.ended, "response_mask": mask, "logprobs": logprobs, "values": values,
            "entropy": nats}


@torch.no_grad()
def score_responses(reward_model, rollout, cfg, run):
    """Score: one number for each whole response, (B,), on the scale of the SFT model's answers."""

    def read(tokens, lengths):  # (b, T), (b,)
        with run.autocast():
            return (reward_model.score(tokens, lengths),)  # (b,), at the last token

    (raw_scores,) = in_parts(read, cfg, rollout["tokens"], rollout["lengths"])  # (B,)
    return normalize_scores(raw_scores, reward_model.score_mean, reward_model.score_std,
                            cfg.score_clip, rollout["ended"], cfg.missing_end_score)  # (B,)


@torch.no_grad()
def reward_tokens(reference, rollout, beta, cfg, run):
    """KL reward: each token pays for its distance to the reference, the last one gets the score."""
    tokens, mask = rollout["tokens"], rollout["response_mask"]  # (B, T), (B, T-1)

    def read(tokens):  # (b, T)
        with run.autocast():
            ref_logits = reference(tokens)  # (b, T, V)
        ref_logits = ref_logits[:, :-1].float() / cfg.temperature  # (b, T-1, V)
        return (token_logprobs(ref_logits, tokens[:, 1:]),)  # (b, T-1)

    (ref_logprobs,) = in_parts(read, cfg, tokens)  # (B, T-1)
    ref_logprobs = torch.where(mask, ref_logprobs, torch.zeros_like(ref_logprobs))
    kl = kl_estimate(rollout["logprobs"], ref_logprobs, cfg.kl_kind)  # (B, T-1)
    rewards = token_rewards(rollout["scores"], kl, mask, beta)  # (B, T-1)
    return {"ref_logprobs": ref_logprobs, "kl": kl, "rewards": rewards}


def estimate_advantages(rollout, cfg):
    """Advantage: how much better than the critic expected. Whitened once, over all of it."""
    rewards, values, mask = (rollout[name] for name in ("rewards", "values", "response_mask"))
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)  # (B, T-1), (B, T-1)
    whitened_advantages = masked_whiten(advantages, mask) if cfg.whiten else advantages
    return {"advantages": advantages, "returns": returns,
            "whitened_advantages": whitened_advantages}


def collect_rollout(actor, reference, reward_model, prompts, beta, cfg, run, stop_ids=None):
    """Sample a response to each prompt and work out what its every token earned.

    prompts: B lists of ids. Returns a dict of tensors on the grid (see the module's docstring). A
    rule that checks answers could stand in for the second step, a baseline for the fourth.
    """
    rollout = sample_responses(actor, prompts, cfg, run, stop_ids)
    rollout["scores"] = score_responses(reward_model, rollout, cfg, run)  # (B,)
    rollout |= reward_tokens(reference, rollout, beta, cfg, run)
    rollout |= estimate_advantages(rollout, cfg)
    return rollout


def make_batch(rollout, rows):
    """Some rows of a rollout; columns past the longest of them are filler and left out."""
    T = int(rollout["lengths"][rows].max())
    return {"tokens": rollout["tokens"][rows, :T], **{
        name: rollout[name][rows, : T - 1] for name in (  # each (b, T-1)
            "response_mask", "logprobs", "values", "returns", "whitened_advantages")}}


def loss_of(actor, batch, cfg):
    """The policy's and the critic's loss, each summed over the response tokens: (2,); and
    statistics, means over those tokens."""
    mb_tokens, mb_mask = batch["tokens"], batch["response_mask"]  # (b, T), (b, T-1)
    logits, new_values = actor(mb_tokens)  # (b, T, V), (b, T)
    logits = logits[:, :-1].float() / cfg.temperature  # (b, T-1, V)
    new_logprobs = token_logprobs(logits, mb_tokens[:, 1:])  # (b, T-1)
    policy_loss, stats = ppo_policy_loss(
        new_logprobs, batch["logprobs"], batch["whitened_advantages"], mb_mask, cfg.clip_range,
        denominator=1)
    value_loss, value_stats = ppo_value_loss(
        new_values[:, :-1], batch["values"], batch["returns"], mb_mask, cfg.value_clip,
        denominator=1)
    # With its own trunk and optimizer, the critic's loss needs no weight.
    vf_coef = cfg.vf_coef if cfg.share_critic else 1.0
    count = mb_mask.sum()
    means = {"policy_loss": policy_loss.detach() / count, "value_loss": value_loss.detach() / count}
    return torch.stack([policy_loss, vf_coef * value_loss]), {**means, **stats, **value_stats}


def ppo_update(actor, optimizers, rollout, cfg, run, order):
    """A few epochs of minibatch steps on one rollout; returns each statistic's minibatch mean.

    optimizers: one for each set of parameters that is clipped apart: [policy, critic], or [both].
    order: a torch.Generator for the shuffling. Every response is used exactly once an epoch.
    """
    actor.eval()  # dropout off: the ratio compares two policies, not two dropout masks
    lengths = rollout["lengths"].tolist()
    minibatches = [rows.tolist() for _ in range(cfg.num_epochs) for rows in
                   torch.randperm(len(lengths), generator=order).split(cfg.minibatch_size)]
    totals, norms, num_done = {}, {}, 0
    for minibatch in minibatches:
        denominator = rollout["response_mask"][minibatch].sum()
        minibatch.sort(key=lambda row: lengths[row])  # like lengths together: less filler
        stats = {}
        for rows in micro_batches(minibatch, cfg.micro_batch_size or cfg.minibatch_size):
            batch = make_batch(rollout, rows)
            with run.autocast():
                losses, part = loss_of(actor, batch, cfg)
            micro_loss = losses.sum() / denominator
            run.check_finite(actor, batch, loss=micro_loss)
            run.scaler.scale(micro_loss).backward()
            share = batch["response_mask"].sum() / denominator  # of the minibatch's tokens
            stats = {name: stats.get(name, 0) + value * share for name, value in part.items()}
        num_done += 1
        totals = {name: totals.get(name, 0) + value for name, value in stats.items()}
        if 0 < cfg.stop_kl < stats["approx_kl"]:
            actor.zero_grad(set_to_none=True)
            break  # the policy has moved as far as this rollout's advantages can be trusted
        for optimizer, name in zip(optimizers, ("grad_norm", "critic_grad_norm")):
            run.scaler.unscale_(optimizer)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
            run.check_finite(actor, batch, grad_norm=norm)
            norms.setdefault(name, []).append(norm)  # of each step that is made
            run.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        run.scaler.update()
    return {**{name: float(value) / num_done for name, value in totals.items()},
            **{name: float(sum(values)) / len(values) for name, values in norms.items()}}


@torch.no_grad()
def tensors_of(actor, rollout, cfg, run):
    """For the ledger: the rollout, and what the updated policy and critic say of its tokens."""
    tokens, mask = rollout["tokens"], rollout["response_mask"]  # (B, T), (B, T-1)

    def read(tokens):  # (b, T)
        with run.autocast():
            logits, new_values = actor(tokens)  # (b, T, V), (b, T)
        logits = logits[:, :-1].float() / cfg.temperature  # (b, T-1, V)
        return token_logprobs(logits, tokens[:, 1:]), new_values[:, :-1]  # (b, T-1), (b, T-1)

    new_logprobs, new_values = in_parts(read, cfg, tokens)  # (B, T-1), (B, T-1)
    new_logprobs = torch.where(mask, new_logprobs, torch.zeros_like(new_logprobs))
    ratio = torch.exp(new_logprobs - rollout["logprobs"])  # (B, T-1), 1 outside the mask
    unclipped, clipped = surrogate_losses(ratio, rollout["whitened_advantages"], cfg.clip_range)
    return {**rollout, "new_logprobs": new_logprobs, "ratio": ratio, "clipped": clipped > unclipped,
            "new_values": torch.where(mask, new_values, torch.zeros_like(ratio))}


def summarise(rollout, beta):
    """What is logged of a rollout: means over responses, or over response tokens."""
    mask, returns = rollout["response_mask"], rollout["returns"]  # (B, T-1), (B, T-1)
    # 1: the critic foresaw every return; 0: it did no better than their mean, or all were equal.
    spread = masked_var(returns, mask)
    explained = 1 - masked_var(returns - rollout["values"], mask) / spread if spread > 1e-8 else 0.0
    return {
        "score": rollout["scores"].mean(), "kl": masked_sum(rollout["kl"], mask, dim=1).mean(),
        "reward": masked_sum(rollout["rewards"], mask, dim=1).mean(), "beta": beta,
        "length": mask.sum(1).float().mean(), "ended": rollout["ended"].float().mean(),
        "entropy": masked_mean(rollout["entropy"], mask), "explained_variance": explained,
    }


def main(cfg):
    # 1. Set-up: the folder, both checkpoints and the tokenizer that they share.
    run = start_run(cfg, needs={"init": "sft", "reward_model": "rm"}, reads=["prompts", "judge"])
    if cfg.kl_target > 0 and cfg.kl_horizon < cfg.rollout_size:
        raise UserError(f"--kl_horizon {cfg.kl_horizon}: expected at least --rollout_size "
                        f"{cfg.rollout_size}, since one rollout moves beta at most by a fifth")
    if cfg.temperature == 0:
        raise UserError("--temperature 0: greedy answers have no log-probs to learn from; PPO "
                        "needs a number above 0")

    # 2. Data: encode the prompts, plan which are answered in which iteration.
    rows = read_prompts(cfg.prompts)
    judge = load_judge(cfg.judge, rows[0]) if cfg.judge else None
    policy, reward_model = run.model("init"), frozen(run.model("reward_model"))
    prompts = encode_prompts(run.tokenizer, rows, policy.cfg.block_size, cfg.prompts)
    # plan[step - 1] lists the prompts of an iteration; each comes once before any comes again.
    num_needed = cfg.num_steps * cfg.rollout_size
    if num_needed > 10**8:
        raise UserError(f"--num_steps {cfg.num_steps} of --rollout_size {cfg.rollout_size}: "
                        f"{num_needed:,} responses are more than any run samples; lower one")
    passes = [torch.randperm(len(prompts), generator=run.data_order)
              for _ in range(math.ceil(num_needed / len(prompts)))]
    plan = torch.cat(passes)[:num_needed].view(cfg.num_steps, cfg.rollout_size).tolist()
    print(f"data   | {len(prompts):,} prompts of {cfg.prompts}, each answered "
          f"{num_needed / len(prompts):.1f} times; "
          f"{sum(len(p) + cfg.max_new_tokens > policy.cfg.block_size for p in prompts)} leave less "
          f"than --max_new_tokens room")

    # 3. Models and optimizers. The reference is a distinct copy: it must not move with the policy.
    reference = frozen(copy.deepcopy(policy))
    critic = None if cfg.share_critic else copy.deepcopy(reward_model).requires_grad_(True)
    actor = ActorCritic(policy, critic).to(run.device)
    # The critic has its own optimizer and its own gradient clip. Clipping both gradients by one
    # joint norm would let a large value loss shrink the policy's step.
    parts = [actor] if cfg.share_critic else [policy, critic]
    rates = [cfg.lr, cfg.critic_lr][: len(parts)]
    # Adam's eps is 1e-5, as in lm-human-preferences (arXiv 1909.08593): it shortens the steps of
    # parameters whose gradients are tiny, which 1e-8 would take as long as any other.
    optimizers = [make_optimizer(part, lr, eps=1e-5) for part, lr in zip(parts, rates)]
    print(f"model  | {sum(p.numel() for p in actor.parameters()):,} trained parameters")

    @functools.cache
    def largest_rollout():
        """The longest prompt, answered by every row as far as there is room."""
        return collect_rollout(actor, reference, reward_model, [max(prompts, key=len)]
                               * cfg.rollout_size, cfg.beta, cfg, run, stop_ids=[-1])

    some = list(range(min(cfg.rollout_size, cfg.minibatch_size,
                          cfg.micro_batch_size or cfg.minibatch_size)))
    run.preflight(actor, lambda: loss_of(actor, make_batch(largest_rollout(), some), cfg)[0],
                  [lambda: tensors_of(actor, largest_rollout(), cfg, run)],
                  options="--sample_batch_size, --micro_batch_size or --max_new_tokens")
    # A checkpoint holds the policy as `model`, which later stages load, and the critic in `actor`.
    saved = {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
    run.restore(cfg.num_steps, model=policy, actor=actor, **saved)
    beta = cfg.beta
    if cfg.kl_target > 0 and run.history:  # resumed: take the step that follows the last logged one
        beta = adapt_beta(run.history[-1]["beta"], run.history[-1]["kl"], cfg.kl_target,
                          cfg.rollout_size, cfg.kl_horizon)

    # 4. The loop.
    ledger = Ledger(run.folder, run.tokenizer, cfg.ledger_every)
    for step in run.steps():
        for optimizer, lr in zip(optimizers, rates):
            set_lr(optimizer, lr_at(step - 1, cfg.num_steps, lr, 0, cfg.final_lr, "linear"))
        chosen = plan[step - 1]
        rollout = collect_rollout(actor, reference, reward_model, [prompts[i] for i in chosen],
                                  beta, cfg, run)
        # A generator of its own for each step: resuming needs no state of it.
        order = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        stats = ppo_update(actor, optimizers, rollout, cfg, run, order)
        ledger.record(step, lambda: tensors_of(actor, rollout, cfg, run))
        summary = summarise(rollout, beta)
        if cfg.kl_target > 0:
            beta = adapt_beta(beta, summary["kl"].item(), cfg.kl_target, cfg.rollout_size,
                              cfg.kl_horizon)

        responses = [run.tokenizer.decode_response(row[start:end]) for row, start, end in zip(
            rollout["tokens"].tolist(), rollout["prompt_lens"].tolist(),
            rollout["lengths"].tolist())]
        if judge:
            with run.postponing():  # its errors, until the step is saved
                golds = [judge(rows[i], response, ended)["score"] for i, response, ended in zip(
                    chosen, responses, rollout["ended"].tolist())]
                summary["gold"] = sum(golds) / len(golds)
        run.log(rollout["lengths"].sum().item(), **summary, **stats)
        if due(step, cfg.eval_every, cfg.num_steps):
            for i, response, score in list(zip(chosen, responses, rollout["scores"].tolist()))[:3]:
                run.show(f"  user: {rows[i]['messages'][-1]['content']}\n"
                         f"  model: {response}   (score {score:.2f})")
        if run.save_due():
            run.save(model=policy, actor=actor, **saved)
    draw_curves(run.folder)
    return run.history


if __name__ == "__main__":
    command_line(main, Config, __doc__)
