"""Numbers, names and paths on the command lines of the training scripts."""

from malformed import Case, command, write

HUGE = 10**12


def option(stage, name, value, words, **changes):
    """A case of one option of a training script; the others are those of a quick run."""
    text = f"{value:.0e}" if isinstance(value, int) and value >= 10**9 else str(value)
    return Case(f"{stage} --{name} {text or 'nothing'}",
                lambda road, folder: command(road, stage, folder / "run", **{**changes, name: value}),
                words)


def typed(name, stage, extra, words):
    """A case of words typed after a quick run's options."""
    return Case(name, lambda road, folder: [*command(road, stage, folder / "run"), *extra], words)


def numbers():
    """Every number that can't be: too large for any machine, not finite, no number, out of range."""
    steps = {"pretrain": "num_steps", "sft": "num_epochs", "rm": "num_epochs",
             "dpo": "num_epochs", "ppo": "num_steps"}
    for stage, length in steps.items():
        yield option(stage, length, HUGE, f"--{length}: expected a whole number up to a billion")
        yield option(stage, length, 0, f"--{length} 0: expected a number above 0")
        yield option(stage, length, -3, f"--{length} -3: expected a number above 0")
        yield option(stage, length, "1.5", f"argument --{length}: invalid int value: '1.5'")
        yield option(stage, length, "1e3", f"argument --{length}: invalid int value: '1e3'")
        yield option(stage, "lr", "nan", "--lr nan: expected a number from 0")
        yield option(stage, "lr", "inf", "--lr inf: expected a number from 0")
        yield option(stage, "lr", "-1e-3", "--lr -0.001: expected a number from 0")
        yield option(stage, "lr", "fast", "argument --lr: invalid float value: 'fast'")
        yield option(stage, "grad_clip", 0, "--grad_clip 0.0: expected a number above 0")
        yield option(stage, "eval_every", 0, "--eval_every 0: expected a number above 0")
        yield option(stage, "save_every", -1, "--save_every -1: expected a number above 0")
        yield option(stage, "seed", -1, "--seed -1: expected a number from 0")
        yield option(stage, "seed", 2**64, "--seed: expected a whole number below 2^63")
        yield option(stage, "threads", 100_000, "--threads 100000: expected at most")
        yield option(stage, "threads", -1, "--threads -1: expected a number from 0")
        yield option(stage, "dtype", "float8", "argument --dtype: invalid choice: 'float8'")
        yield option(stage, "device", "banana", "--device banana: no such device")
        yield option(stage, "device", "meta", "--device meta: no such device")
    for stage in ("pretrain", "sft", "rm", "dpo"):
        yield option(stage, "batch_size", HUGE, "--batch_size: expected a whole number up to")
        yield option(stage, "batch_size", 0, "--batch_size 0: expected a number above 0")
        yield option(stage, "warmup", -1, "--warmup -1: expected a number from 0")
    for stage in ("sft", "rm", "dpo"):
        yield option(stage, "num_epochs", 10**8, "more than any run trains on")
        yield option(stage, "micro_batch_size", -1, "--micro_batch_size -1: expected a number from")
        yield option(stage, "held_out", 1.5, "--held_out 1.5: expected a number from 0 up to 1")
        yield option(stage, "held_out", 1.0, "too few")
        yield option(stage, "too_long", "banana", "argument --too_long: invalid choice: 'banana'")
        yield option(stage, "ledger_every", -1, "--ledger_every -1: expected a number from 0")


CASES = [
    *numbers(),
    option("pretrain", "num_steps", 10**8, "more than any run trains on"),
    option("pretrain", "n_layer", 10**6, "parameters takes"),
    option("pretrain", "n_layer", 0, "--n_layer 0: expected a number above 0"),
    option("pretrain", "n_embd", 10**6, "parameters takes"),
    option("pretrain", "n_embd", 31, "n_embd 31 must be a multiple of n_head 2"),
    option("pretrain", "n_head", 32, "a head has 32 / 32, an odd number"),
    option("pretrain", "n_head", 3, "n_embd 32 must be a multiple of n_head 3"),
    option("pretrain", "n_kv_head", 3, "and n_head of n_kv_head 3"),
    option("pretrain", "n_hidden", 10**8, "parameters takes"),
    option("pretrain", "block_size", 1, "--block_size 1: expected a number above 1"),
    option("pretrain", "block_size", 10**8, "fewer than one block of 100000000"),
    option("pretrain", "dropout", 1.5, "--dropout 1.5: expected a number from 0 up to 1"),
    option("pretrain", "size", "gpt5", "no model size called 'gpt5'"),
    Case("a published size that fits no machine", lambda road, folder: [
        "train_pretrain.py", "--size", "gpt3-175b", "--block_size", "64", f"--text={road.text}",
        f"--tokenizer={road.folder / 'tokenizer.json'}", f"--out={folder / 'run'}"],
        "parameters takes"),
    option("pretrain", "norm", "batchnorm", "argument --norm: invalid choice: 'batchnorm'"),
    option("pretrain", "positions", "alibi", "argument --positions: invalid choice: 'alibi'"),
    typed("a published size with a layer count of one's own", "pretrain",
          ["--size", "gpt2", "--n_layer", "3"], "--size gpt2 has 12 for --n_layer; leave"),
    Case("a published size with a width of one's own", lambda road, folder: [
        "train_pretrain.py", "--size", "llama2-7b", "--n_embd", "64", f"--text={road.text}",
        f"--tokenizer={road.folder / 'tokenizer.json'}", f"--out={folder / 'run'}"],
        "--size llama2-7b has 4096 for --n_embd"),
    option("ppo", "rollout_size", HUGE, "--rollout_size: expected a whole number up to a billion"),
    option("ppo", "rollout_size", 10**8, "are more than any run samples"),
    option("ppo", "rollout_size", 0, "--rollout_size 0: expected a number above 0"),
    option("ppo", "minibatch_size", 0, "--minibatch_size 0: expected a number above 0"),
    option("ppo", "max_new_tokens", 0, "--max_new_tokens 0: expected a number above 0"),
    option("ppo", "temperature", 0, "greedy answers have no log-probs to learn from"),
    option("ppo", "gamma", 1.01, "--gamma 1.01: expected a number from 0 up to 1"),
    option("ppo", "lam", -0.1, "--lam -0.1: expected a number from 0 up to 1"),
    option("ppo", "kl_kind", "k4", "argument --kl_kind: invalid choice: 'k4'"),
    option("ppo", "beta", "nan", "--beta nan: expected a number from 0"),
    option("ppo", "missing_end_score", "-inf", "--missing_end_score -inf: expected a number of any"),
    option("ppo", "critic_lr", -1, "--critic_lr -1.0: expected a number from 0"),
    option("dpo", "pairs", "some", "argument --pairs: invalid choice: 'some'"),
    option("dpo", "label_smoothing", 2, "--label_smoothing 2.0: expected a number from 0 up to 1"),
    option("rm", "num_normalize", 0, "at least 2 prompts are needed"),
    option("rm", "num_normalize", 1, "at least 2 prompts are needed"),
    option("rm", "max_new_tokens", 1, "sampled answers ended within --max_new_tokens 1"),
    *(Case(f"an out without a name, of {stage}", lambda road, folder, stage=stage: command(
        road, stage, ""), "--out is empty; give the name of a folder")
      for stage in ("pretrain", "sft", "rm", "ppo", "dpo")),
    option("sft", "init", "", "does not exist"),
    option("sft", "data", "", "--data is empty"),
    option("pretrain", "text", "", "--text is empty"),
    option("pretrain", "tokenizer", "", "--tokenizer is empty"),
    option("ppo", "judge", "judge", "is no function"),
    Case("an out below a file", lambda road, folder: command(
        road, "sft", write(folder, "file", "mine") + "/run"), "since {folder}/file is a file"),
    Case("an out that is a file", lambda road, folder: command(
        road, "rm", write(folder, "file", "mine")), "file is a file; give the name of a folder"),
    Case("an out below /proc, where nobody can write", lambda road, folder: command(
        road, "dpo", "/proc/run"), "/proc/run"),
    Case("an init that is the out", lambda road, folder: command(
        road, "sft", road.folder / "pretrain", overwrite=True),
        "the run would replace what it starts from"),
    Case("an init whose checkpoint lies in the out", lambda road, folder: command(
        road, "sft", road.folder / "pretrain", overwrite=True,
        init=road.folder / "pretrain" / "ckpt.pt"), "the run would replace what it starts from"),
    typed("both ways to go on", "sft", ["--resume", "--overwrite"], "give one of them"),
    typed("a misspelt option", "sft", ["--sede", "1"], "did you mean --seed"),
    typed("a misspelt option with an equals sign", "ppo", ["--bta=1"], "did you mean --beta"),
    typed("an option without its value", "dpo", ["--beta"], "argument --beta: expected one argument"),
    typed("a word that is no option", "rm", ["fast"], "unknown option fast"),
    typed("a value for a switch", "ppo", ["--whiten=yes"], "--whiten: ignored explicit argument"),
    typed("a switch both ways", "ppo", ["--whiten", "--no_whiten"], "not allowed with argument"),
    typed("an abbreviated option", "sft", ["--num_ep", "3"], "did you mean --num_epochs"),
    typed("to resume what was never begun", "sft", ["--resume"], "holds no run to go on with"),
]
