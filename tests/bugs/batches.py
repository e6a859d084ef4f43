"""Bugs to plant into minirlhf/batches.py."""

from bugs import Bug

FILE = "minirlhf/batches.py"
BUGS = [
    Bug("shifted_mask", "out[:, 1:]", "out[:, :-1]", "test_check_06",
        "the loss mask is not shifted with its targets"),
    Bug("pad_right", ": len(row)", "-len(row) :", "test_check_07",
        "rows are padded on the left, masks on the right"),
    Bug("response_mask", "lengths[:, None]", "lengths[:, None] - 1", "test_check_08",
        "PPO's mask stops before the end token"),
    Bug("encode_answer", "len(tokenizer.encode_prompt(messages))",
        "len(tokenizer.encode_prompt(messages)) - 1", "test_check_13",
        "the mark that an answer follows is trained as if it were its first token"),
    Bug("encode_prompts", 'tokenizer.encode_prompt(row["messages"])',
        '[tokenizer.begin_id] + tokenizer.encode_prompt(row["messages"])', "test_check_14",
        "PPO's prompts have two begin tokens"),
    Bug("random_blocks", "len(stream) - T + 1", "(len(stream) - T + 1) // 2", "test_check_32",
        "pretraining draws its blocks from half of the text"),
    Bug("token_streams", "files[i in held_out].write(ids.tobytes())",
        "[file.write(ids.tobytes()) for file in files[: 1 + (i in held_out)]]", "test_check_32",
        "held-out documents are trained on, too"),
    Bug("shorten", 'return system + turns[start:], "turns"', 'return turns[start:], "turns"',
        "test_check_33", "the standing instruction goes with the first turns that a cut takes"),
    Bug("shorten", "ids[-num_left:]", "ids[:num_left]", "test_check_33",
        "a question that is too long loses its end"),
    Bug("fit", "max(size for", "min(size for", "test_check_33",
        "the shortest answer decides how much of the prompt they all keep"),
    Bug("response_mask", "torch.arange(1, T, device=lengths.device)", "torch.arange(1, T)",
        "test_ppo_on_a_gpu", "the response mask's column index is left on the CPU"),
    Bug("pad_right", "lengths.to(device)", "lengths", "test_a_stage_on_a_gpu",
        "lengths are left on the CPU"),
    Bug("shifted_mask", "out[:, 1:].to(device)", "out[:, 1:]", "test_a_stage_on_a_gpu",
        "the loss mask is left on the CPU"),
]
