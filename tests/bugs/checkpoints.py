"""Bugs to plant into minirlhf/plumbing/checkpoints.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/checkpoints.py"
BUGS = [
    Bug("frozen", ".eval()", "", "test_check_03", "frozen models keep their dropout"),
    Bug("verify", "if damaged:", "if False:", "test_a_flipped_bit",
        "a flipped bit in the weights is loaded without a word"),
    Bug("save_checkpoint", "os.replace(newest, previous)", "newest.unlink()", "test_the_last_two",
        "only one checkpoint is kept"),
    Bug("check_model", "not value.isfinite().all()", "False", "test_a_checkpoint_of_nan",
        "DPO starts from a checkpoint of NaN"),
    Bug("check_model", "n_vocab != expected", "n_vocab > expected", "test_a_tokenizer_of_another",
        "a tokenizer smaller than the embedding is accepted"),
]
