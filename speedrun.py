"""The whole road, stage after stage, on the embedded world: from a rude parrot to an assistant.

    python speedrun.py                  one road, about 15 CPU-minutes on one core
    python speedrun.py --quick          the same road in a minute or two; it need not learn much
    python speedrun.py --seeds 3        three roads, each with a world, models and noise of its own
    python speedrun.py --from rm  start again at a stage
    python speedrun.py --overoptimize   add a long PPO without KL: reward up, gold down

Every stage is a command that you could type; it is printed before it runs. An interrupted road goes
on where it stopped. At the end stand a table, three pictures, and results.json.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_text
from minirlhf.plumbing.folders import read_metrics
from minirlhf.plumbing.stats import wilson
from minirlhf.look.plot import draw_gold_by_stage, draw_reward_against_kl, draw_road

STAGES = ["prepare", "tokenizer", "pretrain", "sft", "sample", "annotate", "rm", "ppo", "dpo",
          "evaluate", "overoptimize"]
TRAINING = ("pretrain", "sft", "rm", "ppo", "dpo", "overoptimize")
JUDGE = "data/toy/judge.py:judge"


@dataclass
class Config:
    quick: bool = False  # a tiny version of every stage, in out/quick
    seeds: int = 1  # how many roads; seed 0 lives in out/, seed k in out/seed_k/
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


def commands(stage, seed, out, quick):
    """The command lines of one stage. For seed 0 in out/ they are short: the defaults fit."""
    data = "data/toy" if seed == 0 and not quick else f"{out}/data"
    python = "python"
    extra = quick_options().get(stage, "") if quick else ""
    short = seed == 0 and out == "out"

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
    return [" ".join(line.split()) for line in lines]


def run_stage(stage, seed, out, quick, log):
    """Run one stage's commands; log: {"cpu_minutes", "commands"} of the stages done so far."""
    lines, cpu_minutes, peak_gb = commands(stage, seed, out, quick), 0.0, 0.0
    # Two busy threads are slower than one at this size, and waiting threads should not spin.
    # The last two keep freed memory for the next tensor: asking the kernel for it again and again
    # took a tenth of the CPU time.
    env = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1",
           "MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184",
           **os.environ}
    for line in lines:
        words = shlex.split(line)
        if stage in TRAINING:
            folder = Path(words[words.index("--out") + 1] if "--out" in words else f"{out}/{stage}")
            unfinished = (folder / "ckpt.pt").exists() and stage == log["running"]
            started = (folder / "config.json").exists()
            words += ["--resume"] if unfinished else ["--overwrite"] if started else []
        print(f"\n$ {shlex.join(words)}", flush=True)
        log["running"] = stage
        write_log(out, log)
        process = subprocess.Popen([sys.executable, *words[1:]], env=env)
        _, status, used = os.wait4(process.pid, 0)  # like wait, but it tells what was used
        code = os.waitstatus_to_exitcode(status)
        cpu_minutes += (used.ru_utime + used.ru_stime) / 60
        peak_gb = max(peak_gb, used.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6))
        if code:
            raise UserError(f"the command above ended with exit code {code}; after mending the "
                            "cause, the same speedrun command goes on from here")
    log["done"] = [name for name in log["done"] if name != stage] + [stage]
    log["cpu_minutes"][stage], log["peak_gb"][stage] = cpu_minutes, peak_gb
    log["commands"][stage] = lines
    log["running"] = ""
    write_log(out, log)


def write_log(out, log):
    write_text(Path(out, "speedrun.json"), json.dumps(log, indent=1) + "\n")


def walk(seed, cfg):
    """All stages of one seed; returns its log and its evaluation."""
    out = f"{cfg.out}/quick" if cfg.quick else cfg.out
    out = out if seed == 0 else f"{out}/seed_{seed}"
    path = Path(out, "speedrun.json")
    log = json.loads(path.read_text()) if path.exists() else {
        "done": [], "cpu_minutes": {}, "peak_gb": {}, "commands": {}, "running": ""}
    log.setdefault("peak_gb", {})
    stages = [s for s in STAGES if s != "overoptimize" or cfg.overoptimize]
    if cfg.from_:
        if cfg.from_ not in stages:
            raise UserError(f"--from {cfg.from_}: expected one of {', '.join(stages)}")
        log["done"] = stages[: stages.index(cfg.from_)]
        log["running"] = ""
    for stage in stages:
        if stage in log["done"]:
            print(f"{stage}: done before in {out}; --from {stage} does it again")
        else:
            run_stage(stage, seed, out, cfg.quick, log)
    results = json.loads(Path(out, "eval", "results.json").read_text())
    draw_road(out, f"{out}/curves.png", results["reward_model"].get("ceiling"))
    runs = {"PPO with its KL penalty": f"{out}/ppo"}
    if cfg.overoptimize:
        runs["Without KL: reward up, gold down"] = f"{out}/overoptimize"
    draw_reward_against_kl(runs, f"{out}/reward_kl.png")
    return out, log, results


def overoptimization(out):
    """Reward and gold of the long run: at the start, where gold peaks, and at the end."""
    rows = read_metrics(f"{out}/overoptimize")
    window = max(1, len(rows) // 20)
    gold = [sum(r["gold"] for r in rows[i : i + window]) / window
            for i in range(len(rows) - window + 1)]
    score = [sum(r["score"] for r in rows[i : i + window]) / window
             for i in range(len(rows) - window + 1)]
    peak = max(range(len(gold)), key=gold.__getitem__)
    return {name: {"gold": gold[i], "reward": score[i], "kl": rows[i + window // 2]["kl"]}
            for name, i in (("start", 0), ("gold's peak", peak), ("end", len(gold) - 1))}


def pooled(seeds, name, rate):
    """A rate's counts over all seeds, with the Wilson interval of the pooled share."""
    counts = [r["players"][name][rate] for r in seeds]
    k, n = sum(c["count"] for c in counts), sum(c["of"] for c in counts)
    low, high = wilson(k, n)
    return {"count": k, "of": n, "share": k / n, "low": low, "high": high}


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
        table["rates"][player] = {rate: pooled(seeds, player, rate) for rate in (
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
    players = {name: [json.loads(line) for line in open(f"{out}/eval/{name}.jsonl")][:num_prompts]
               for name in ("base_few-shot", "sft", "ppo")}
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
        print(f"\nCPU-minutes of {out}: {sum(minutes.values()):.1f} = "
              + " + ".join(f"{stage} {m:.1f}" for stage, m in minutes.items())
              + f"; largest process {max(log['peak_gb'].values(), default=0):.2f} GB")


def main(cfg):
    if cfg.seeds < 1:
        raise UserError(f"--seeds {cfg.seeds}: at least one road has to be walked")
    os.chdir(Path(__file__).parent)
    started = time.time()
    roads = [walk(seed, cfg) for seed in
             range(cfg.first_seed, cfg.first_seed + cfg.seeds)]
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
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    write_text(Path(out, "results.json"), json.dumps({
        "commit": commit.strip() or "unknown", "table": table,
        "seeds": [{"folder": o, "cpu_minutes": log["cpu_minutes"], "commands": log["commands"],
                   "results": r} for o, log, r in roads]}, indent=1) + "\n")
    print(f"\nwritten: {out}/results.json, {out}/curves.png, {out}/gold_by_stage.png, "
          f"{out}/reward_kl.png   ({(time.time() - started) / 60:.1f} minutes)")
    if not cfg.quick:
        print("talk to it: python sample.py --model out/ppo --chat")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
