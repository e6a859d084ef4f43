"""Bugs to plant into minirlhf/plumbing/runs.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/runs.py"
BUGS = [
    Bug("start_run", "torch.manual_seed(cfg.seed)", "pass", "test_check_34",
        "new weights are drawn outside the seed's reach"),
    Bug("Run.__init__", "torch.Generator(self.device)", "torch.Generator()", "test_ppo_on_a_gpu",
        "the generator of sampling is left on the CPU"),
    Bug("Run.save_due", "due(self.step, self.cfg.save_every, self.num_steps)",
        "self.step % self.cfg.save_every == 0", "test_the_last_steps_weights",
        "a run's last step is not saved"),
    Bug("Run.restore", "self._trim_ledger(0)", "pass", "test_overwrite_starts_anew",
        "the ledger of the run before stays"),
    Bug("Run._go_on_from", "file.truncate(size)", "pass", "test_what_was_written_after",
        "samples and metrics after the checkpoint stay, and come twice"),
    Bug("Run._go_on_from", "set_random_states(ckpt[\"random_states\"])", "pass",
        "test_a_resumed_run_equals", "dropout's random numbers begin anew"),
    Bug("Run.save_due", "self._failure or ", "", "test_a_judge_that_fails",
        "a judge's failure loses the steps since the last checkpoint"),
    Bug("Run.save_due", " or signals.received", "", "test_a_signal_ends_a_run",
        "Ctrl-C loses the steps since the last checkpoint"),
    Bug("Run.steps", " and self._saved == self.step", "", "test_a_signal_that_comes_too_late",
        "a step that was not saved is said to be"),
    Bug("Run.check_finite", "not any(", "all(", "test_a_run_whose_numbers_become_nan",
        "NaN losses train on to the end"),
    Bug("Run.preflight", "set_random_states(states[1])", "pass", "test_preflight_leaves",
        "preflight changes every number of the run"),
]
