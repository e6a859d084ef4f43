"""Bugs to plant into sample.py."""

from bugs import Bug

FILE = "sample.py"
BUGS = [
    Bug("chat", "decode_response", "decode", "test_check_14",
        "a chat's answers carry their end token's name into the next prompt"),
    Bug("respond", "pick_dtype(cfg.dtype,", 'pick_dtype("float32",', "test_sample_computes",
        "sample.py checks --dtype and forgets it"),
    Bug("tensors_of", "pick_dtype(cfg.dtype,", 'pick_dtype("float32",',
        "test_the_ledger_is_computed", "the ledger of samples ignores --dtype"),
    Bug("tensors_of", "cfg.top_k, cfg.top_p", "0, cfg.top_p", "test_the_ledger_shows",
        "the ledger of samples ignores --top_k"),
    Bug("tensors_of", "cfg.top_k, cfg.top_p", "cfg.top_k, 1.0", "test_the_ledger_shows",
        "the ledger of samples ignores --top_p"),
    Bug("main", "if len(samples) == cfg.num_samples]", "if samples]", "test_what_was_sampled_is_kept",
        "a stopped sampling keeps prompts that lack samples"),
    Bug("main", 'getattr(stopped, "number", signal.SIGINT)', "signal.SIGINT",
        "test_what_was_sampled_is_kept", "SIGTERM's exit code is that of Ctrl-C"),
    Bug("chat", "asked = [*turns,", 'turns.append({"role": "user", "content": text})\n'
        "            asked = [*turns[:-1],", "test_a_turn_that_cannot_be_answered",
        "a turn that got no answer stays in the conversation"),
    Bug("tensors_of", "for prompt, _ in pairs], device=device)", "for prompt, _ in pairs])",
        "test_sampling_on_a_gpu", "the ledger's prompt lengths are left on the CPU"),
]
