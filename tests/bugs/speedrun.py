"""Bugs to plant into speedrun.py."""

from bugs import Bug

FILE = "speedrun.py"
BUGS = [
    Bug("commands", '("heldout", "heldout_samples", 4)', '("prompts", "heldout_samples", 4)',
        "test_the_commands_of_a_road",
        "the reward model is measured on pairs of its training prompts"),
    Bug("commands", 'prompts=f"{data}/heldout.jsonl"', 'prompts=f"{data}/prompts.jsonl"',
        "test_the_commands_of_a_road", "a road evaluates on its training prompts"),
    Bug("commands", "{out}/rm --preferences {out}/heldout_preferences.jsonl",
        "{out}/rm --preferences {out}/preferences.jsonl", "test_the_first_road_evaluates",
        "the first road measures its reward model on its training pairs"),
    Bug("how_to_start", 'if set(there) - set(log["replaced"]):', "if there:",
        "test_a_stage_that_is_done_again",
        "a road's stage killed before it began goes on with the old run"),
    Bug("how_to_start", 'set(there) - set(log["replaced"])', 'there != log["replaced"]',
        "test_an_older_checkpoint_beside",
        "a road's stage goes on with what is left of the old run"),
    Bug("main", "for seed in seeds if cfg.from_ else []:", "for seed in []:",
        "test_all_roads_begin_again", "--from is forgotten for the later roads"),
    Bug("open_road", "if now != then:", "if not now:", "test_a_stage_whose_files_are_gone",
        "a road's stage counts as done though its files have changed"),
    Bug("open_road", 'if walked and stage not in log["done"]:', "if False:",
        "test_a_later_stage_is_not_begun", "a road goes on from a stage that was broken off"),
    Bug("run_stage", 'log["spent"] += minutes', 'log["spent"] = minutes',
        "test_the_minutes_of_a_stage", "of a road's resumed stage only the last part is counted"),
    Bug("Stop.hand_on", "self.process.send_signal(", "int(", "test_a_signal_is_handed_on",
        "a road's stage does not hear of Ctrl-C"),
    Bug("over_seeds", "if len(shares) > 1:", "if False:", "test_a_rates_interval_takes_in",
        "the answers of a road's three seeds are pooled as if they were one model's"),
    Bug("over_seeds", "min(low, mean - half)", "mean - half", "test_a_rates_interval_takes_in",
        "a road's seeds that agree promise a share without doubt"),
]
