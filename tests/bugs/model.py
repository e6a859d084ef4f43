"""Bugs to plant into minirlhf/model.py."""

from bugs import Bug

FILE = "minirlhf/model.py"
BUGS = [
    Bug("fused_attention", "mask is None", "False", "test_check_01",
        "the fused kernel is not causal, so real tokens read the filler"),
    Bug("Attention.forward", "mask[:, None, None, :]", "None", "test_check_02",
        "is_causal with one query against the cache"),
    Bug("Trunk.forward", "positions[:, None]", "0 * positions[:, None] + positions.max()",
        "test_check_02", "all rows of a ragged batch decode at one position"),
    Bug("ScalarModel.score", ".gather(1, (lengths - 1)[:, None]).squeeze(1)", "[:, -1]",
        "test_check_12", "the score is read in the last column"),
    Bug("ScalarModel.__init__", "zeros_(self.head.weight)", "normal_(self.head.weight, std=0.02)",
        "test_check_34", "the reward model's head starts with random opinions"),
    Bug("Trunk.forward", "torch.arange(T, device=idx.device)", "torch.arange(T)",
        "test_pretraining_on_a_gpu", "positions are left on the CPU"),
    Bug("rope_angles", "device=positions.device, ", "", "test_pretraining_on_a_gpu",
        "rotary frequencies are left on the CPU"),
    Bug("Attention.forward", "dtype=torch.bool, device=x.device", "dtype=torch.bool",
        "test_pretraining_on_a_gpu", "the written-out causal mask is left on the CPU"),
    Bug("Attention.forward", "torch.arange(length, device=x.device)", "torch.arange(length)",
        "test_sampling_on_a_gpu", "the mask of decoding is left on the CPU"),
    Bug("", "rope_theta: float = 10000.0", "rope_theta: float = 500000.0",
        "test_what_is_not_asked_for", "a default moves: another base of the rotary angles"),
    Bug("", "norm_eps: float = 1e-5", "norm_eps: float = 1e-3", "test_what_is_not_asked_for",
        "a default moves: another eps of the norms"),
    Bug("GPT.__init__", "nn.init.normal_(self.lm_head.weight, std=0.02)", "pass",
        "test_an_untied_head", "an untied head is left as nn.Linear draws it"),
    Bug("GPT.__init__", "std=0.02", "std=0.03", "test_an_untied_head",
        "an untied head starts half as wide again"),
    Bug("make_norm", 'cfg.norm == "rmsnorm"', "cfg.norm == ''", "test_two_steps_with_each_choice",
        "an option that does nothing: every norm is a LayerNorm"),
    Bug("Trunk.__init__", 'if cfg.positions == "learned" else None', "",
        "test_two_steps_with_each_choice", "an option that does nothing: positions are learned"),
]
