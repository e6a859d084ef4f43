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
    Bug("fit", "[:1] + kept", "[: len(mask) - over]", "test_check_13",
        "ids are cut on the left, the mask on the right"),
    Bug("encode_prompts", 'tokenizer.encode_prompt(row["messages"])',
        '[tokenizer.begin_id] + tokenizer.encode_prompt(row["messages"])', "test_check_14",
        "PPO's prompts have two begin tokens"),
    Bug("fit", "[:1] + ids[1 + over :], mask[:1] + kept",
        "[: len(ids) - over], mask[: len(ids) - over]", "test_check_33",
        "the answer's end is cut away instead of the prompt's beginning"),
    Bug("fit", " if over is None else over", "", "test_check_33",
        "each answer is cut by its own excess, so that they answer different prompts"),
]
