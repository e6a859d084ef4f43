"""Bugs to plant into minirlhf/losses.py."""

from bugs import Bug

FILE = "minirlhf/losses.py"
BUGS = [
    Bug("sft_loss", "mask, denominator)", "mask, dim=1).mean()", "test_check_11",
        "SFT takes the mean of the rows' means"),
    Bug("ppo_policy_loss", "maximum", "minimum", "test_check_24",
        "the smaller of the two losses, which rewards leaving the trust region"),
    Bug("surrogate_losses", "1 - clip_range, ", "max=", "test_check_24",
        "a clip on the upper side only"),
    Bug("ppo_policy_loss", "clipped > unclipped", "(ratio - 1).abs() > clip_range", "test_check_24",
        "every token outside the range counts as clipped"),
    Bug("dpo_loss", "chosen_rewards.detach(), rejected_rewards.detach()",
        "chosen_rewards.detach() / beta, rejected_rewards.detach() / beta", "test_check_25",
        "the logged rewards lack beta"),
    Bug("reward_model_loss", "F.logsigmoid(difference)", "torch.log(torch.sigmoid(difference))",
        "test_check_26", "log of sigmoid in the reward model's loss"),
    Bug("dpo_loss", "F.logsigmoid(margin)", "torch.log(torch.sigmoid(margin))", "test_check_26",
        "log of sigmoid in DPO's loss"),
    Bug("reward_model_loss", "ranks[:, :, None] < ranks", "ranks[:, :, None] <= ranks",
        "test_check_28", "a tie makes a pair"),
    Bug("reward_model_loss", "/ pairs.sum((1, 2))", "* len(nats) / pairs.sum()", "test_check_28",
        "one mean over all pairs of the batch"),
    Bug("ppo_policy_loss", "masked_mean((clipped > unclipped).float(), mask)",
        "(clipped > unclipped).float().mean()", "test_check_31",
        "the clip fraction over all columns"),
    Bug("sft_loss", "mask, denominator)", "mask, denominator) * 0", "test_check_37",
        "zeros in the place of sft_loss"),
    Bug("reward_model_loss", "return nats", "return -nats", "test_check_37",
        "the negative of reward_model_loss"),
    Bug("ppo_policy_loss", "mask, denominator)", "mask, denominator).detach()", "test_check_37",
        "a detached version of ppo_policy_loss"),
    Bug("ppo_value_loss", "0.5 * masked_mean", "-0.5 * masked_mean", "test_check_37",
        "the negative of ppo_value_loss"),
    Bug("dpo_loss", "return losses", "return 2 * losses.detach() - losses", "test_check_37",
        "the right value, with a gradient of the wrong sign, of dpo_loss"),
]
