"""Bugs to plant into train_sft.py."""

from bugs import Bug

FILE = "train_sft.py"
BUGS = [
    Bug("evaluate", "model.train()", "pass", "test_check_03",
        "after the first evaluation training goes on without dropout"),
    Bug("loss_of", "[:, :-1]", "[:, 1:]", "test_check_06",
        "SFT trains each position to repeat its own token"),
    Bug("make_batch", "tokens.shape[1], device)",
        "tokens.shape[1], device) & (tokens[:, 1:] != examples[0][0][-1])", "test_check_07",
        "pad = end in SFT: the end token is masked with the filler"),
    Bug("make_batch", "[mask for", "[[True] * len(mask) for", "test_check_13",
        "SFT trains the prompt too"),
    Bug("main", "losses.sum() / denominator",
        'losses.sum() / batch["mask"].sum() * len(part) / len(examples)', "test_check_23",
        "SFT takes the mean of the micro-batches' means"),
    Bug("evaluate", 'batch["mask"].sum().item()', 'batch["mask"].numel()', "test_check_31",
        "the held-out loss is divided by filler and prompt too"),
    Bug("main", "lengths = [len(ids)", "train = encoded\n    lengths = [len(ids)", "test_check_32",
        "held-out dialogues are trained on"),
    Bug("main", "lr_at(step - 1,", "lr_at((step - 1) * cfg.num_epochs,",
        "test_check_38_each_step", "SFT's schedule counts epochs, and climbs again"),
    Bug("main", "split_by_prompt(beginnings", "split_by_prompt(range(len(encoded))",
        "test_no_held_out_dialogue", "rows are held out, not prompts"),
]
