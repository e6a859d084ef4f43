"""Bugs to plant into minirlhf/plumbing/runs.py."""

from bugs import Bug

FILE = "minirlhf/plumbing/runs.py"
BUGS = [
    Bug("frozen", ".eval()", "", "test_check_03", "frozen models keep their dropout"),
    Bug("start_run", "torch.manual_seed(cfg.seed)", "pass", "test_check_34",
        "new weights are drawn outside the seed's reach"),
    Bug("Run.__init__", "torch.Generator(self.device)", "torch.Generator()", "test_ppo_on_a_gpu",
        "the generator of sampling is left on the CPU"),
]
