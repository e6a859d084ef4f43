"""Bugs to plant into train_rm.py."""

from bugs import Bug

FILE = "train_rm.py"
BUGS = [
    Bug("sample_answers", " if ended]", "]", "test_check_10",
        "answers that never ended count in the scores' scale"),
    Bug("encode", "k, example[0]", "k, example[0][:-1]", "test_check_12",
        "the reward model reads answers without their end"),
    Bug("main", "= len(examples)", "= cfg.batch_size", "test_check_23",
        "the reward model divides the last, smaller batch by the full size"),
    Bug("encode", "tuple(example[0]) in seen", "False", "test_check_27",
        "identical answers stay among the ranked ones"),
    Bug("encode", 'number, "prompt_len"', 'len(examples), "prompt_len"', "test_check_27",
        "after a row that was left out, each example points to its neighbour's prompt"),
    Bug("evaluate", 'e["ranks"][i] < e["ranks"][j]', "i < j", "test_check_28",
        "ties count as pairs in the accuracy"),
    Bug("sample_answers", "prompt + ids",
        "prompt + run.tokenizer.encode(run.tokenizer.decode_response(ids)) + ids[-1:]",
        "test_check_36", "the scores' scale is measured on text that was encoded again"),
    Bug("make_batch", "places.to(device)", "places", "test_a_stage_on_a_gpu",
        "the answers' places in the tables are left on the CPU"),
    Bug("make_batch", "ranks.to(device)", "ranks", "test_a_stage_on_a_gpu",
        "ranks are left on the CPU"),
    Bug("main", "lr_at(step - 1,", "lr_at((step - 1) * cfg.num_epochs,",
        "test_check_38_each_step", "the reward model's schedule counts epochs, and climbs again"),
]
