"""Bugs to plant into minirlhf/generate.py."""

from bugs import Bug

FILE = "minirlhf/generate.py"
BUGS = [
    Bug("generate", "torch.arange(B, device=device), prompt_lens - 1", ":, -1", "test_check_02",
        "the first token is read at the last column"),
    Bug("pick", "torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)",
        "logits.argmax(-1)", "test_check_05", "rollouts are greedy"),
    Bug("Rollout.responses", "[p:n]", "[p:n][row[p:n] > 0]", "test_check_36",
        "sampled ids that look like filler are lost"),
    Bug("generate", "torch.tensor(sorted(stop_ids), device=device)",
        "torch.tensor(sorted(stop_ids))", "test_sampling_on_a_gpu",
        "stop ids are left on the CPU"),
    Bug("generate", "pad_right(prompts, device)", "pad_right(prompts)", "test_sampling_on_a_gpu",
        "prompts are left on the CPU"),
    Bug("pick", "logits.float() / temperature", "(logits / temperature).float()",
        "test_bf16_logits", "sampling divides bf16 logits by the temperature"),
]
