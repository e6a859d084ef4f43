"""Bugs to plant into minirlhf/masked.py."""

from bugs import Bug

FILE = "minirlhf/masked.py"
BUGS = [
    Bug("masked_sum", "torch.where(mask, x, torch.zeros_like(x))", "x * mask", "test_check_11",
        "NaN times 0 in the masked sum"),
    Bug("masked_mean", "mask.sum()", "torch.tensor(mask.numel())", "test_check_11",
        "the mean divides by the filler too"),
    Bug("masked_whiten", "- mean", "- x.mean()", "test_check_16",
        "filler enters the mean of the whitening"),
    Bug("token_logprobs", "reshape(-1, V)", "softmax(-1).reshape(-1, V)", "test_check_26",
        "softmax before cross-entropy"),
    Bug("masked_sum", "torch.where(mask, x, torch.zeros_like(x))",
        "torch.where(mask, x, torch.zeros(x.shape, dtype=x.dtype))", "test_a_stage_on_a_gpu",
        "the zeros of a masked sum are made on the CPU"),
    Bug("masked_whiten", "torch.where(mask, x - mean, torch.zeros_like(x))",
        "torch.where(mask, x - mean, torch.zeros(x.shape, dtype=x.dtype))", "test_ppo_on_a_gpu",
        "the zeros of whitening are made on the CPU"),
]
