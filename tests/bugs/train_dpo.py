"""Bugs to plant into train_dpo.py."""

from bugs import Bug

FILE = "train_dpo.py"
BUGS = [
    Bug("pair_logps", 'sequence_logprobs(logprobs, batch["mask"])', "logprobs.sum(1)",
        "test_check_01",
        "the log-probs of prompt and filler are added up with those of the answer"),
    Bug("pair_logps", '"mask"]).', '"mask"], average=True).', "test_check_06",
        "DPO's log-probs are means per token"),
    Bug("encode", ": answers[j]", ": (answers[j][0], [True] * len(answers[j][0]))", "test_check_13",
        "the prompt counts in the rejected answer alone"),
    Bug("main", 'frozen(run.model("init"))', "model", "test_check_19",
        "DPO's reference is the model that learns"),
    Bug("main", "run.scaler.unscale_(optimizer)", "pass", "test_check_21",
        "DPO clips a gradient that is never unscaled"),
    Bug("main", "sum() / denominator", "mean()", "test_check_23",
        "DPO sums the micro-batches' means"),
    Bug("loss_of", 'batch["ref_chosen_logps"], batch["ref_rejected_logps"]',
        'batch["ref_rejected_logps"], batch["ref_chosen_logps"]', "test_check_25",
        "the reference's two log-probs are swapped in the call"),
    Bug("make_batch", '["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs',
        '[side] for pair in pairs for side in ("chosen", "rejected")', "test_check_25",
        "chosen and rejected alternate, and are split into halves all the same"),
    Bug("main", 'frozen(run.model("init"))', 'run.model("init")', "test_check_25",
        "the reference keeps its dropout"),
    Bug("encode", "answers[i][0] == answers[j][0]", "False", "test_check_27",
        "identical pairs stay in the data"),
    Bug("loss_of", 'batch["ref_chosen_logps"]', "chosen_logps.detach()", "test_check_33",
        "the stored reference of the chosen answer is not read"),
    Bug("make_batch", ",\n                                                 device=device)", ")",
        "test_a_stage_on_a_gpu", "the stored reference log-probs are left on the CPU"),
    Bug("main", "lr_at(step - 1,", "lr_at((step - 1) * cfg.num_epochs,",
        "test_check_38_each_step", "DPO's schedule counts epochs, and climbs again"),
    Bug("encode", 'if cfg.pairs == "best_worst"', "if cfg.pairs", "test_two_steps_with_each_choice",
        "an option that does nothing: DPO always takes best and worst"),
]
