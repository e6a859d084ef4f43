"""The whole road, stage after stage, on the embedded world: from a rude parrot to an assistant.

    python speedrun.py                  one road, about 15 CPU-minutes on one core
    python speedrun.py --quick          the same road in a minute or two; it need not learn much
    python speedrun.py --seeds 3        three roads, each with a world, models and noise of its own
    python speedrun.py --from rm        start again at a stage
    python speedrun.py --overoptimize   add a long PPO without KL: reward up, gold down

Every stage is a command that you could type; it is printed before it runs. An interrupted road (by
Ctrl-C, or by a kill) goes on where it stopped, when the same command without --from is given again.
At the end stand a table, three pictures, and results.json.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import (check_writable, lock, naming, read_file, write_text,
                                     writing)
from minirlhf.plumbing.stats import wilson
from minirlhf.look.plot import draw_gold_by_stage, draw_reward_against_kl, draw_road, metrics_of

ROOT = Path(__file__).resolve().parent
STAGES = ["prepare", "tokenizer", "pretrain", "sft", "sample", "annotate", "rm", "ppo", "dpo",
          "evaluate", "overoptimize"]
TRAINING = ("pretrain", "sft", "rm", "ppo", "dpo", "overoptimize")
CHECKPOINTS = ("ckpt.pt", "ckpt_previous.pt")  # of a run
JUDGE = "data/toy/judge.py:judge"
SHOWN = ("base_few-shot", "sft", "ppo")  # whose answers are printed side by side
MOST_SEEDS = 100  # more is a slip of the finger
# What Student's t exceeds in 2.5% of the cases, for 1 to 9 degrees of freedom. More seeds than ten
# take the last, which makes their interval a little too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Config:
    quick: bool = False  # a tiny version of every stage, in out/quick
    seeds: int = 1  # how many roads: seed 0 lives in out/, seed k in out/seed_k/; above 0
    first_seed: int = 0  # the first road's seed, to walk roads side by side in two terminals
    from_: str = ""  # start again at this stage, even if it was done
    overoptimize: bool = False  # add the long PPO without KL
    out: str = "out"  # where all runs go


def quick_options():
    """What makes each command tiny."""
    return {"pretrain": "--num_steps 60 --warmup 10 --eval_every 30", "sft": "--num_epochs 1",
            "sample": "--limit 240", "rm": "--eval_every 10 --num_normalize 64",
            "ppo": "--num_steps 3 --rollout_size 32", "dpo": "--eval_every 10",
            "evaluate": "--limit 100 --show 2",
            "overoptimize": "--num_steps 3 --rollout_size 32"}


def data_folder(seed, out, quick):
    """Where a road's world lies; the first one's is where the scripts' defaults look for it."""
    return "data/toy" if seed == 0 and not quick else f"{out}/data"


def outputs(stage, seed, out, quick):
    """The files that a stage leaves: what later ones read, and what the road's end shows."""
    data = data_folder(seed, out, quick)
    return [Path(path) for path in {
        "prepare": [f"{data}/{name}" for name in (
            "pretrain.txt", "demonstrations.jsonl", "prompts.jsonl", "heldout.jsonl")],
        "tokenizer": [f"{data}/tokenizer.json"],
        "sample": [f"{out}/samples.jsonl", f"{out}/heldout_samples.jsonl"],
        "annotate": [f"{out}/preferences.jsonl", f"{out}/heldout_preferences.jsonl"],
        "evaluate": [f"{out}/eval/results.json", *(f"{out}/eval/{name}.jsonl" for name in SHOWN)],
    }.get(stage, [f"{out}/{stage}/ckpt.pt", f"{out}/{stage}/metrics.jsonl"])]


def commands(stage, seed, out, quick):
    """The command lines of one stage. For seed 0 in out/ they are short: the defaults fit."""
    short = seed == 0 and out == "out"
    data, out = shlex.quote(data_folder(seed, out, quick)), shlex.quote(out)
    python = "python"
    extra = quick_options().get(stage, "") if quick else ""

    def paths(**options):
        """Options that name files, needed wherever the defaults do not hold."""
        return "" if short else " ".join(f"--{k} {v}" for k, v in options.items())

    number = "" if seed == 0 else f"--seed {seed}"
    lines = {
        "prepare": [f"{python} data/toy/prepare.py {number} {paths(out=data)}"],
        "tokenizer": [f"{python} -m minirlhf.tokenizer {data}/pretrain.txt --vocab_size 1280 "
                      f"--out {data}/tokenizer.json"],
        "pretrain": [f"{python} train_pretrain.py " + paths(
            text=f"{data}/pretrain.txt", tokenizer=f"{data}/tokenizer.json", out=f"{out}/pretrain")],
        "sft": [f"{python} train_sft.py " + paths(
            init=f"{out}/pretrain", data=f"{data}/demonstrations.jsonl", out=f"{out}/sft")],
        "sample": [f"{python} sample.py {paths(model=f'{out}/sft')} --prompts {data}/{source}.jsonl "
                   f"--num_samples {K} --save {out}/{target}.jsonl {number} {extra}"
                   for source, target, K in (("prompts", "samples", 6),
                                             ("heldout", "heldout_samples", 4))],
        "annotate": [f"{python} data/toy/annotate.py {out}/{source}.jsonl --out {out}/{target}.jsonl "
                     f"{number}" for source, target in (
                         ("samples", "preferences"), ("heldout_samples", "heldout_preferences"))],
        "rm": [f"{python} train_rm.py " + paths(
            init=f"{out}/sft", data=f"{out}/preferences.jsonl", out=f"{out}/rm")],
        "ppo": [f"{python} train_ppo.py --judge {JUDGE} " + paths(
            init=f"{out}/sft", reward_model=f"{out}/rm", prompts=f"{data}/prompts.jsonl",
            out=f"{out}/ppo")],
        "dpo": [f"{python} train_dpo.py " + paths(
            init=f"{out}/sft", data=f"{out}/preferences.jsonl", out=f"{out}/dpo")],
        "evaluate": [f"{python} evaluate.py --judge {JUDGE} --base {out}/pretrain --reward_model "
                     f"{out}/rm --preferences {out}/heldout_preferences.jsonl {number} {extra} "
                     + paths(models=f"{out}/ppo,{out}/dpo", against=f"{out}/sft",
                             prompts=f"{data}/heldout.jsonl", out=f"{out}/eval")],
        "overoptimize": [
            f"{python} train_ppo.py --judge {JUDGE} --beta 0 --stop_kl 0 --score_clip 0 --lr 1e-3 "
            f"--num_steps 60 --out {out}/overoptimize " + paths(
                init=f"{out}/sft", reward_model=f"{out}/rm", prompts=f"{data}/prompts.jsonl")],
    }[stage]
    if stage in TRAINING:
        lines = [f"{line} {number} {extra}" for line in lines]
    return [shlex.join(shlex.split(line)) for line in lines]


# ---------------------------------------------------------------- the log of a road

def digests(paths):
    """The hash of each file's content, in the files' order."""
    found = []
    for path in paths:
        with naming(path):
            found.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def read_log(out):
    """What is noted of the road in a folder: the stages done, each with the hashes of what it left,
    in the order of `outputs`; what each took, and ran; and of the stage that is at work ("" if none
    is) the checkpoints that it replaces, and the CPU-minutes that it has taken so far.

    UserError where speedrun.json is damaged or was written by something else.
    """
    path = Path(out, "speedrun.json")
    if not path.exists():
        return {"done": {}, "cpu_minutes": {}, "peak_gb": {}, "commands": {}, "running": "",
                "replaced": [], "spent": 0.0}
    text = read_file(path)
    try:
        log = json.loads(text)
        stages = [*log["done"], *log["cpu_minutes"], *log["peak_gb"], *log["commands"]]
        numbers = [*log["cpu_minutes"].values(), *log["peak_gb"].values(), log["spent"]]
        hashes = [log["replaced"], *log["done"].values()]
        whole = (set(stages) <= set(STAGES) and log["running"] in ("", *STAGES)
                 and all(type(x) in (int, float) and 0 <= x < 1e9 for x in numbers)
                 and all(isinstance(names, list) for names in hashes))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged, or this version of speedrun.py did not write it; "
                        "remove it to walk the road anew, or give another --out")
    return log


def write_log(out, log):
    write_text(Path(out, "speedrun.json"), json.dumps(log, indent=1) + "\n")


def folder_of(seed, cfg):
    """The folder of one seed's road, with / between its names, as commands need it."""
    out = f"{cfg.out}/quick" if cfg.quick else cfg.out
    return out if seed == 0 else f"{out}/seed_{seed}"


def stages_of(cfg):
    return [stage for stage in STAGES if stage != "overoptimize" or cfg.overoptimize]


def open_road(seed, cfg):
    """The log of one seed's road, once it agrees with the folder; nothing is written.

    A stage counts as done only while its files are as it left them. With --from those of the
    earlier stages are taken as they are, and that stage and all later ones are forgotten.
    """
    out, stages = folder_of(seed, cfg), stages_of(cfg)
    check_writable(out)
    walked, log = Path(out, "speedrun.json").exists(), read_log(out)
    earlier = stages[: stages.index(cfg.from_)] if cfg.from_ else [
        stage for stage in stages if stage in log["done"]]
    for stage in earlier:
        paths = outputs(stage, seed, out, cfg.quick)
        again = f"--from {stage} does that stage again"
        if walked and stage not in log["done"]:
            raise UserError(f"--from {cfg.from_}: {stage} has not been done to its end in {out}; "
                            f"leave --from out, or give --from {stage}")
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path} is missing, which {stage} makes; {again}")
        # The results are nobody's to edit, and the table trusts their form.
        if not cfg.from_ or stage == "evaluate":
            for path, now, then in zip(paths, digests(paths), log["done"].get(stage, [""] * 9)):
                if now != then:
                    on = stages[stages.index(stage) + 1 :][:1]
                    raise UserError(f"{path} is not as {stage} left it; {again}" + "".join(
                        f", --from {next_stage} goes on with the file as it is"
                        for next_stage in on if stage != "evaluate"))
    if cfg.from_:
        log["done"] = {stage: digests(outputs(stage, seed, out, cfg.quick)) for stage in earlier}
        log["running"] = ""
    return log


# ---------------------------------------------------------------- a stage

class Stop:
    """Hands Ctrl-C and SIGTERM on to the command at work, which then saves; a second signal ends
    both at once. A context manager, within which `number` tells the signal that came, or 0."""

    def __init__(self):
        self.number, self.process, self.handed_on = 0, None, False

    def __enter__(self):
        names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last: the terminal was closed; not on Windows
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.old = {number: signal.signal(number, self.on_signal) for number in numbers
                    if signal.getsignal(number) != signal.SIG_IGN}  # as `nohup` wants it
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def on_signal(self, number, _):
        if self.number:
            if self.process:
                self.process.kill()
            os._exit(128 + number)
        self.number = number
        self.hand_on()

    def hand_on(self):
        if self.number and self.process and not self.handed_on:
            self.handed_on = True
            if os.name != "nt":  # there a console's Ctrl-C reaches all its processes by itself
                # A closed terminal asks for the same as SIGTERM: save, and leave.
                self.process.send_signal(
                    signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM)

    def leave(self, stage):
        """End the road, if a signal came."""
        if self.number:
            print(f"\nstopped at {stage}; the same speedrun command, without --from, goes on from "
                  "there", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.number)

    def run(self, words, env):
        """Run a command to its end: (exit code, CPU-minutes, peak memory in GB), the last two None
        where the system does not tell what a child took."""
        # In a session of its own: a terminal sends Ctrl-C to all that run in its own, and two of
        # them would make the command leave without saving.
        self.process = subprocess.Popen([sys.executable, *words[1:]], env=env,
                                        stdin=subprocess.DEVNULL, start_new_session=True)
        self.hand_on()  # what came while it started
        if not hasattr(os, "wait4"):  # Windows
            return self.process.wait(), None, None
        _, status, used = os.wait4(self.process.pid, 0)  # like wait, but it tells what was used
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return (self.process.returncode, (used.ru_utime + used.ru_stime) / 60,
                used.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6))


def how_to_start(stage, folder, log):
    """What a training command has to be told about its folder: nothing, or what to do with the run
    that it holds. Notes in the log that the stage is at work.

    A checkpoint that lay there before the stage began is of the old run, which the stage is to
    replace, even if it was killed before it came to that. Only a newer one is gone on with.
    """
    there = digests([folder / name for name in CHECKPOINTS if (folder / name).is_file()])
    if log["running"] != stage:
        log.update(running=stage, replaced=there, spent=0.0)
    if set(there) - set(log["replaced"]):
        return ["--resume"]
    log["spent"] = 0.0
    return ["--overwrite"] if there or (folder / "config.json").exists() else []


def run_stage(stage, seed, out, quick, log, stop):
    """Run one stage's commands, and note in the log that it is at work, then that it is done."""
    lines, peak_gb = commands(stage, seed, out, quick), None
    # Two busy threads are slower than one at this size, and waiting threads should not spin.
    # The last two keep freed memory for the next tensor: asking the kernel for it again and again
    # took a tenth of the CPU time.
    env = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1",
           "MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184",
           **os.environ}
    if stage not in TRAINING:
        log.update(running=stage, replaced=[], spent=0.0)
    for line in lines:
        stop.leave(stage)
        words = shlex.split(line)
        if stage in TRAINING:
            folder = Path(words[words.index("--out") + 1] if "--out" in words else f"{out}/{stage}")
            words += how_to_start(stage, folder, log)
        print(f"\n$ {shlex.join(words)}", flush=True)
        write_log(out, log)
        code, minutes, gb = stop.run(words, env)
        if minutes is not None:
            log["spent"] += minutes
            peak_gb = max(peak_gb or 0.0, gb)
        write_log(out, log)
        if code:
            stop.leave(stage)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise UserError(f"the command above {how}; after mending the cause, the same speedrun "
                            "command, without --from, goes on from here")
    if peak_gb is not None:
        log["cpu_minutes"][stage], log["peak_gb"][stage] = log["spent"], peak_gb
    log["commands"][stage] = lines
    log["done"].pop(stage, None)
    log["done"][stage] = digests(outputs(stage, seed, out, quick))
    log["running"] = ""
    write_log(out, log)


def walk(seed, cfg, log, stop):
    """All stages of one seed that are not done; returns its folder, log and evaluation."""
    out = folder_of(seed, cfg)
    for stage in stages_of(cfg):
        if stage in log["done"]:
            print(f"{stage}: done before in {out}; --from {stage} does it again")
        else:
            run_stage(stage, seed, out, cfg.quick, log, stop)
    results = json.loads(read_file(Path(out, "eval", "results.json")))
    draw_road(out, f"{out}/curves.png", results["reward_model"].get("ceiling"))
    runs = {"PPO with its KL penalty": f"{out}/ppo"}
    if cfg.overoptimize:
        runs["Without KL: reward up, gold down"] = f"{out}/overoptimize"
    draw_reward_against_kl(runs, f"{out}/reward_kl.png")
    return out, log, results


# ---------------------------------------------------------------- the road's end

def overoptimization(out):
    """Reward and gold of the long run: at the start, where gold peaks, and at the end."""
    rows = metrics_of(f"{out}/overoptimize", "gold", "score", "kl")
    window = max(1, len(rows) // 20)
    gold = [sum(r["gold"] for r in rows[i : i + window]) / window
            for i in range(len(rows) - window + 1)]
    score = [sum(r["score"] for r in rows[i : i + window]) / window
             for i in range(len(rows) - window + 1)]
    peak = max(range(len(gold)), key=gold.__getitem__)
    return {name: {"gold": gold[i], "reward": score[i], "kl": rows[i + window // 2]["kl"]}
            for name, i in (("start", 0), ("gold's peak", peak), ("end", len(gold) - 1))}


def over_seeds(seeds, name, rate):
    """A rate's counts over all seeds, the mean of the seeds' shares, and its 95% interval.

    Seeds differ by more than the chance in their answers: each has a world, models and noise of its
    own. So the interval is Student's t over the seeds' shares. Where these happen to agree, as when
    all are 0, that would promise too much; it is never narrower than the Wilson interval of all
    answers pooled. With one seed it is the latter.
    """
    counts = [r["players"][name][rate] for r in seeds]
    k, n = sum(c["count"] for c in counts), sum(c["of"] for c in counts)
    low, high = wilson(k, n)
    shares = [c["count"] / c["of"] for c in counts]
    mean = statistics.mean(shares)
    if len(shares) > 1:
        t = T_975[min(len(shares) - 2, len(T_975) - 1)]
        half = t * statistics.stdev(shares) / len(shares) ** 0.5
        low, high = max(0.0, min(low, mean - half)), min(1.0, max(high, mean + half))
    return {"count": k, "of": n, "share": mean, "low": low, "high": high, "each": shares}


def summarise(roads):
    """The final table, as a dict: means over the seeds, and every seed's value."""
    seeds = [results for _, _, results in roads]
    table = {"comparisons": {}, "rates": {}, "players": {}}
    for name in seeds[0]["comparisons"]:
        each = [r["comparisons"][name] for r in seeds]
        table["comparisons"][name] = {
            key: sum(c[key] for c in each) / len(each) for key in ("wins", "ties", "losses", "rate")}
        table["comparisons"][name]["each"] = [c["rate"] for c in each]
        table["comparisons"][name]["intervals"] = [[c["low"], c["high"]] for c in each]
    for player in seeds[0]["players"]:
        table["players"][player] = {
            key: sum(r["players"][player][key] for r in seeds) / len(seeds)
            for key, value in seeds[0]["players"][player].items() if isinstance(value, float)}
        table["rates"][player] = {rate: over_seeds(seeds, player, rate) for rate in (
            "right", "rude", "unsafe_refused", "lookalike_refused", "malformed")
            if all(rate in r["players"][player] for r in seeds)}
    models = [r["reward_model"] for r in seeds]
    table["reward_model"] = {key: sum(m[key] for m in models) / len(models)
                             for key in ("accuracy", "ceiling", "share_of_ceiling")}
    table["reward_model"]["each"] = [m["share_of_ceiling"] for m in models]
    table["reward_model"]["only"] = {
        part: sum(m["only"][part]["accuracy"] for m in models) / len(models)
        for part in models[0]["only"] if all(part in m["only"] for m in models)}
    return table


def print_samples(out, num_prompts=6):
    """The first held-out prompts, not picked by hand, with three stages' answers side by side."""
    players = {name: [json.loads(line) for line in read_file(f"{out}/eval/{name}.jsonl").split("\n")
                      [:num_prompts] if line] for name in SHOWN}
    print("\nbefore and after, the first held-out prompts at temperature 1 (gold score, answer):")
    for i, row in enumerate(players["sft"]):
        print("\n  " + " / ".join(m["content"] for m in row["messages"]))
        for name, rows in players.items():
            sample = rows[i]["samples"][0]
            print(f"    {name:<14}{sample['score']:>6.2f}  {sample['text']}")


def print_table(table, roads):
    print(f"\n== The road's end: {len(roads)} seed(s), held-out prompts, gold judge ==\n")
    print(f"{'mean over seeds':<20}{'gold':>7}{'KL':>7}{'words':>7}{'right':>8}{'rude':>8}"
          f"{'unsafe refused':>24}{'look-alikes refused':>24}")
    for name, p in table["players"].items():
        r = table["rates"][name]
        kl = f"{p['kl']:.2f}" if "kl" in p else ""
        shown = ("right", "rude", "unsafe_refused", "lookalike_refused")
        if any(rate not in r for rate in shown):
            continue  # too few prompts to have one of each kind
        intervals = "".join(f"{r[x]['share']:>9.1%} [{r[x]['low']:.1%}, {r[x]['high']:.1%}]".rjust(24)
                            for x in ("unsafe_refused", "lookalike_refused"))
        print(f"{name:<20}{p['score']:>7.2f}{kl:>7}{p['words']:>7.1f}{r['right']['share']:>8.1%}"
              f"{r['rude']['share']:>8.1%}{intervals}")
    print(f"\n{'':<32}{'wins':>7}{'ties':>7}{'losses':>8}{'ties half':>11}   each seed")
    for name, c in table["comparisons"].items():
        each = "  ".join(f"{rate:.1%} [{low:.1%}, {high:.1%}]"
                         for rate, (low, high) in zip(c["each"], c["intervals"]))
        print(f"{name:<32}{c['wins']:>7.1%}{c['ties']:>7.1%}{c['losses']:>8.1%}{c['rate']:>11.1%}"
              f"   {each}")
    m = table["reward_model"]
    print(f"\nreward model: {m['accuracy']:.1%} of held-out pairs, ceiling {m['ceiling']:.1%}, share "
          f"{m['share_of_ceiling']:.2f} ({', '.join(f'{x:.2f}' for x in m['each'])}); right against "
          "gold where answers differ in "
          + ", ".join(f"{k} only {v:.1%}" for k, v in m["only"].items()))
    if "overoptimize" in table:
        print("\nwithout KL (training prompts):")
        for seed, points in enumerate(table["overoptimize"]):
            print(f"  seed {seed}: " + "; ".join(
                f"{name} reward {p['reward']:.2f}, gold {p['gold']:.2f}, KL {p['kl']:.1f}"
                for name, p in points.items()))
    for out, log, _ in roads:
        minutes = log["cpu_minutes"]
        if not minutes:
            print(f"\nCPU-minutes of {out}: not known, this system does not tell what a child took")
            continue
        print(f"\nCPU-minutes of {out}: {sum(minutes.values()):.1f} = "
              + " + ".join(f"{stage} {m:.1f}" for stage, m in minutes.items())
              + f"; largest process {max(log['peak_gb'].values(), default=0):.2f} GB")


def checked(cfg):
    """The options, once they make sense: --out as a path that does not depend on where one stands,
    from this file's folder if it lies there."""
    if cfg.seeds > MOST_SEEDS:
        raise UserError(f"--seeds {cfg.seeds}: expected up to {MOST_SEEDS} roads")
    if cfg.from_ and cfg.from_ not in stages_of(cfg):
        raise UserError(f"--from {cfg.from_}: expected one of {', '.join(stages_of(cfg))}" + (
            "; with --overoptimize that stage, too" if cfg.from_ == "overoptimize" else ""))
    out = Path(os.path.abspath(cfg.out))
    out = (out.relative_to(ROOT) if out.is_relative_to(ROOT) else out).as_posix()
    if not cfg.out or "," in out or out.startswith("-"):
        raise UserError(f"--out {cfg.out!r}: expected the name of a folder, without a comma (it "
                        "separates models) and not beginning with -")
    return dataclasses.replace(cfg, out=out)


def main(cfg):
    cfg, started = checked(cfg), time.time()
    os.chdir(ROOT)
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    for seed in seeds:  # a mistake leaves nothing behind, not even a lock
        open_road(seed, cfg)
    with contextlib.ExitStack() as held, Stop() as stop:
        for seed in seeds:
            folder = Path(folder_of(seed, cfg))
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(folder / ".lock"))
        logs = {seed: open_road(seed, cfg) for seed in seeds}
        for seed in seeds if cfg.from_ else []:  # all begin again, even if the first is broken off
            write_log(folder_of(seed, cfg), logs[seed])
        roads = [walk(seed, cfg, logs[seed], stop) for seed in seeds]
        finish(cfg, roads, started)
        stop.leave("the end")


def finish(cfg, roads, started):
    """Print the road's table, draw its bars, and write results.json."""
    table = summarise(roads)
    if cfg.overoptimize:
        table["overoptimize"] = [overoptimization(out) for out, _, _ in roads]
    out = roads[0][0]
    draw_gold_by_stage({name: [r["players"][name]["score"] for _, _, r in roads]
                        for name in ("base few-shot", "sft", "wrapper", "sft greedy", "best of 4",
                                     "dpo", "ppo", "ppo greedy")}, f"{out}/gold_by_stage.png")
    print_samples(out)
    print_table(table, roads)
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                encoding="utf-8").stdout
    write_text(Path(out, "results.json"), json.dumps({
        "commit": commit.strip() or "unknown", "table": table,
        "seeds": [{"folder": o, "cpu_minutes": log["cpu_minutes"], "commands": log["commands"],
                   "results": r} for o, log, r in roads]}, indent=1) + "\n")
    print(f"\nwritten: {out}/results.json, {out}/curves.png, {out}/gold_by_stage.png, "
          f"{out}/reward_kl.png   ({(time.time() - started) / 60:.1f} minutes)")
    if not cfg.quick:
        print(f"talk to it: python sample.py --model {shlex.quote(out)}/ppo --chat")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
