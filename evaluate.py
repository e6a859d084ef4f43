r"""Does one model answer better than another? Win rates, intervals, scores, KL, accuracy.

    python evaluate.py --models out/ppo,out/dpo --against out/sft --judge data/toy/judge.py:judge \
        --reward_model out/rm --base out/pretrain --preferences out/heldout_preferences.jsonl

Every model answers the same held-out prompts at temperature 1 and greedily. The judge (where there
is none, the reward model) scores each answer; A beats B on a prompt where its score is higher, and
a tie counts half. Intervals are 95%, from a bootstrap over prompts. Beside them stand baselines
that cost nothing: greedy decoding, a fixed courtesy put before every answer, refusing everything,
and the best of K samples by the reward model.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from minirlhf.batches import encode_answer, encode_prompts, pad_right, response_mask
from minirlhf.generate import sample_prompts
from minirlhf.masked import masked_sum, token_logprobs
from minirlhf.plumbing.commands import check_amount, check_file, has_keys
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_jsonl, write_text
from minirlhf.plumbing.formats import read_preferences, read_prompts
from minirlhf.plumbing.judges import load_judge, load_plain
from minirlhf.plumbing.checkpoints import load_model
from minirlhf.plumbing.devices import autocast, pick_device, pick_dtype, set_threads
from minirlhf.plumbing.stats import bootstrap, compare, wilson

# What a summary calls its own numbers: a judge's number of the same name is told apart from it.
OWN_NAMES = {"words", "ended", "reward", "kl", "right", "right_by_skill", "unsafe_refused",
             "lookalike_refused"}


@dataclass
class Config:
    models: str = "out/ppo,out/dpo"  # run folders of the models to evaluate, separated by commas
    against: str = "out/sft"  # run folder of the model to compare with; the KL's reference too
    base: str = ""  # run folder of a base model to add, prompted with few-shot plain text
    plain: str = "data/toy/world.py:plain_prompt"  # makes that plain text: file.py:function
    prompts: str = "data/toy/heldout.jsonl"  # held-out prompts
    judge: str = ""  # file.py:function(row, response, ended) -> {"score": number, ...}
    reward_model: str = ""  # run folder of a reward model: scores, best of K, the judge's stand-in
    preferences: str = ""  # held-out preferences to measure the reward model on
    out: str = "out/eval"  # folder for results.json and the samples
    best_of: int = 4  # K of the best-of-K baseline
    courtesy: str = "Of course! "  # what the wrapper baseline puts before every answer
    refusal: str = "I am sorry, but I can't help with that."  # the refuse-everything baseline
    max_new_tokens: int = 40  # longest response in tokens; above 0
    batch_size: int = 128  # sequences per batch; above 0
    limit: int = 0  # use only the first so many prompts (0: all)
    show: int = 4  # prompts whose answers are printed side by side
    seed: int = 0  # of the sampling
    device: str = ""  # cuda or cpu (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16, of the matrix products
    threads: int = 1  # CPU threads


class Evaluator:
    """The prompts, the judge and the reward model: everything that all players share."""

    def __init__(self, cfg):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.rows = read_prompts(cfg.prompts)[: cfg.limit or None]
        check_amount(len(self.rows), max(1, cfg.best_of), cfg.batch_size, "--best_of")
        self.judge = load_judge(cfg.judge, self.rows[0]) if cfg.judge else None
        self.preferences = read_preferences(cfg.preferences) if cfg.preferences else None
        self.reward_model = None
        if cfg.reward_model:
            self.reward_model, self.reward_tokenizer = load_model(cfg.reward_model, "scalar",
                                                                  self.device)
        if not (self.judge or self.reward_model):
            raise UserError("nobody to score the answers; give --judge or --reward_model")
        if cfg.preferences and not cfg.reward_model:
            raise UserError("--preferences measures the reward model; give --reward_model, too")

    def answer(self, model, tokenizer, prompts, stop_ids, temperature, num_samples=1):
        """Per prompt a list of num_samples answers {"ids", "text", "ended"}."""
        generator = torch.Generator(self.device).manual_seed(self.cfg.seed)
        with autocast(self.device, self.dtype):
            results = sample_prompts(model, prompts, stop_ids, self.cfg.max_new_tokens, temperature,
                                     generator, num_samples, self.cfg.batch_size)
        return [[{"ids": ids, "text": tokenizer.decode_response(ids), "ended": ended}
                 for ids, ended in samples] for samples in results]

    def verdicts(self, player):
        """The judge's verdict on every answer, or the reward where there is no judge."""
        if self.judge is None:
            return [[{"score": reward} for reward in rewards] for rewards in player["rewards"]]
        return [[self.judge(row, s["text"], s["ended"]) for s in samples]
                for row, samples in zip(self.rows, player["answers"])]

    @torch.no_grad()
    def rewards(self, answers, tokenizer):
        """The reward model's normalised score of each answer; answers by prompt."""
        prompts = [tokenizer.encode_prompt(row["messages"]) for row in self.rows]
        # An answer that never ended is scored as it stands, on its last real token.
        flat = [prompt + s["ids"] for prompt, samples in zip(prompts, answers) for s in samples]
        scores = iter(score_sequences(self.reward_model, flat, self))
        return [[next(scores) for _ in samples] for samples in answers]

    @torch.no_grad()
    def kl(self, model, reference, prompts, answers):
        """KL(model || reference) in nats per response: mean over sampled answers of log p/q.

        Only for answers sampled at temperature 1 from the model itself.
        """
        total, count = 0.0, 0
        rows = [(p, s["ids"]) for p, samples in zip(prompts, answers) for s in samples]
        for start in range(0, len(rows), self.cfg.batch_size):
            part = rows[start : start + self.cfg.batch_size]
            tokens, lengths = pad_right([p + ids for p, ids in part], self.device)
            prompt_lens = torch.tensor([len(p) for p, _ in part], device=self.device)
            mask = response_mask(prompt_lens, lengths, tokens.shape[1])  # (B, T-1)
            with autocast(self.device, self.dtype):
                logprobs = token_logprobs(model(tokens)[:, :-1], tokens[:, 1:])
                ref_logprobs = token_logprobs(reference(tokens)[:, :-1], tokens[:, 1:])
            total += masked_sum(logprobs - ref_logprobs, mask).item()
            count += len(part)
        return total / count


@torch.no_grad()
def score_sequences(reward_model, sequences, ev):
    """Normalised scores of whole sequences (lists of ids), in their order: a list of floats."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    for start in range(0, len(order), ev.cfg.batch_size):
        part = order[start : start + ev.cfg.batch_size]
        tokens, lengths = pad_right([sequences[i] for i in part], ev.device)
        with autocast(ev.device, ev.dtype):
            raw = reward_model.score(tokens, lengths)
        for i, score in zip(part, ((raw - reward_model.score_mean)
                                   / reward_model.score_std).tolist()):
            scores[i] = score
    if not all(map(math.isfinite, scores)):
        raise UserError("the reward model's scores are no finite numbers: its training went "
                        "astray; train it again")
    return scores


def retold(sample, text, tokenizer):
    """The sample with another text, and the ids that a reward model reads of it."""
    ids = tokenizer.encode(text) + [tokenizer.end_id] * sample["ended"]
    return {**sample, "text": text, "ids": ids}


def summary(player, ev):
    """Means over all answers of a player, and the counts behind the rates of a judge's flags.

    The judge's numbers come first, in its order: those that all its verdicts have.
    """
    verdicts = [v for row in player["verdicts"] for v in row]
    answers = [s for samples in player["answers"] for s in samples]
    out = {"score": sum(v["score"] for v in verdicts) / len(verdicts)}
    for name in verdicts[0]:
        values = [v.get(name) for v in verdicts]
        shown = f"the judge's {name}" if name in OWN_NAMES else name
        if name != "score" and all(isinstance(value, float) for value in values):
            out[shown] = sum(values) / len(values)
        if all(isinstance(value, bool) for value in values):
            out[shown] = count_share(values)
    if "rewards" in player:
        rewards = [r for row in player["rewards"] for r in row]
        out["reward"] = sum(rewards) / len(rewards)
    if "kl" in player:
        out["kl"] = player["kl"]
    out["words"] = sum(len(s["text"].split()) for s in answers) / len(answers)
    out["ended"] = sum(s["ended"] for s in answers) / len(answers)
    return {**out, **toy_rates(player, ev.rows)}


def count_share(flags):
    """{"count", "of", "share", "low", "high"} of a list of bools, with its Wilson interval."""
    low, high = wilson(sum(flags), len(flags))
    return {"count": sum(flags), "of": len(flags), "share": sum(flags) / len(flags),
            "low": low, "high": high}


def toy_rates(player, rows):
    """Rates that only make sense on some prompts; for rows whose meta has the toy world's task.

    A rate that no prompt asks for is left out.
    """
    tasks, verdict = [row["meta"].get("task") for row in rows], player["verdicts"][0][0]
    toy = all(isinstance(task, dict) and {"unsafe", "lookalike", "skill"} <= set(task)
              for task in tasks)
    if not toy or not {"refused", "over_refused", "correct"} <= set(verdict):
        return {}
    judged = [(task, v) for task, row in zip(tasks, player["verdicts"]) for v in row]
    # Right answers are for prompts that have one: an unsafe request has none.
    flags = {"unsafe_refused": [v["refused"] for task, v in judged if task["unsafe"]],
             "lookalike_refused": [v["over_refused"] for task, v in judged if task["lookalike"]],
             "right": [v["correct"] > 0 for task, v in judged if not task["unsafe"]]}
    rates = {name: count_share(its_flags) for name, its_flags in flags.items() if its_flags}
    by_skill = {}
    for task, v in judged:
        if not task["unsafe"]:
            by_skill.setdefault(task["skill"], []).append(v["correct"] > 0)
    rates["right_by_skill"] = {skill: sum(right) / len(right)
                               for skill, right in sorted(by_skill.items())}
    return rates


def check_preferences(rows, where):
    """Refuse preferences that measure nothing, or whose annotators' gold is not as it should be."""
    if all(len(set(row["ranks"])) < 2 for row in rows):
        raise UserError(f"{where} holds ties only: nothing to be right about")
    number = lambda value: (isinstance(value, (int, float)) and not isinstance(value, bool)
                            and abs(value) < 1e9)  # a NaN is not below either
    for i, row in enumerate(rows, start=1):
        gold, parts = row["meta"].get("gold"), row["meta"].get("parts")
        temperature, K = row["meta"].get("temperature"), len(row["answers"])
        listed = (isinstance(gold, list) and len(gold) == K and all(map(number, gold))
                  and isinstance(parts, list) and len(parts) == K
                  and all(isinstance(part, dict) and set(part) == set(parts[0])
                          and all(map(number, part.values())) for part in parts))
        if gold is not None and not (listed and number(temperature) and temperature > 1e-6):
            raise UserError(f"{where}, row {i}: expected gold as {K} numbers, parts as {K} objects "
                            "of numbers and a temperature above 0, as data/toy/annotate.py writes "
                            "them; remove the key gold to do without")


def measure_reward_model(ev, tokenizer):
    """Accuracy on held-out pairs, beside the ceiling where the rows carry the annotators' gold.

    Its interval is clustered by prompt: the pairs of one list share their answers.
    """
    rows = ev.preferences
    sequences = [encode_answer(tokenizer, row["messages"], answer)[0]
                 for row in rows for answer in row["answers"]]
    scores = iter(score_sequences(ev.reward_model, sequences, ev))
    right, ceiling, longer, only = {}, [], [], {}  # right: {prompt: [hit of each of its pairs]}
    for row in rows:
        s, K = [next(scores) for _ in row["answers"]], len(row["answers"])
        for i in range(K):
            for j in range(K):
                if row["ranks"][i] >= row["ranks"][j]:
                    continue
                hit = 0.5 if s[i] == s[j] else float(s[i] > s[j])
                right.setdefault(json.dumps(row["messages"]), []).append(hit)
                a, b = len(row["answers"][i]), len(row["answers"][j])
                longer.append(0.5 if a == b else float(a > b))
                if "gold" not in row["meta"]:
                    continue
                gold, parts = row["meta"]["gold"], row["meta"]["parts"]
                gap = abs(gold[i] - gold[j])
                ceiling.append(1 / (1 + math.exp(-gap / row["meta"]["temperature"])))
                differing = [name for name in parts[i] if parts[i][name] != parts[j][name]]
                # Measured against gold, not against a noisy annotator; where gold ties, neither
                # answer is the better one.
                if len(differing) == 1 and gap > 1e-6:
                    only.setdefault(differing[0], []).append(
                        0.5 if s[i] == s[j] else float((s[i] > s[j]) == (gold[i] > gold[j])))
    hits = [hit for its_hits in right.values() for hit in its_hits]
    low, high = bootstrap([sum(its_hits) / len(its_hits) for its_hits in right.values()],
                          [len(its_hits) for its_hits in right.values()])
    out = {"pairs": len(hits), "accuracy": sum(hits) / len(hits), "low": low, "high": high,
           "longer_is_better": sum(longer) / len(longer)}
    if ceiling:
        out["ceiling"] = sum(ceiling) / len(ceiling)
        if out["ceiling"] > 0.5:
            out["share_of_ceiling"] = (out["accuracy"] - 0.5) / (out["ceiling"] - 0.5)
        out["only"] = {name: {"pairs": len(hits), "accuracy": sum(hits) / len(hits)}
                       for name, hits in sorted(only.items())}
    return out


def name_of(folder):
    """What the tables call a run folder: its last name, of "." the name of where one is."""
    return Path(os.path.abspath(folder)).name


def split_models(cfg):
    """The run folders of --models."""
    if not cfg.models.strip():
        return []
    folders = [folder.strip() for folder in cfg.models.split(",")]
    if "" in folders:
        raise UserError(f"--models {cfg.models}: expected folders with a comma between two, found "
                        "nothing before or after one; remove the comma")
    return folders


def player_names(cfg):
    """The names of all that answer, in the tables' order; UserError where two would be the same."""
    folders = [cfg.against, *split_models(cfg)]
    if len({name_of(folder) for folder in folders}) < len(folders):
        raise UserError(f"two of {', '.join(folders)} have the same last name, by which the table "
                        "calls them; rename a folder")
    names = [name for folder in folders for name in (name_of(folder), f"{name_of(folder)} greedy")]
    names += ["wrapper"] * bool(cfg.courtesy) + ["refuse all"] * bool(cfg.refusal)
    names += [f"best of {cfg.best_of}"] * (bool(cfg.reward_model) and cfg.best_of > 1)
    names += ["base few-shot", "base zero-shot"] * bool(cfg.base)
    for name in names:
        if sum(file_of(cfg, name) == file_of(cfg, other) for other in names) > 1:
            raise UserError(f"a model's folder is called {name}, as the table calls another "
                            "player; rename the folder")
    return names


def file_of(cfg, name):
    """Where a player's answers are kept."""
    return Path(cfg.out) / f"{name.replace(' ', '_')}.jsonl"


def check_outputs(cfg):
    """Refuse, before any work, what could not be written at the end, or is not ours to replace."""
    if not cfg.out:
        raise UserError("--out: expected a folder for the results")
    check_file("--out", Path(cfg.out) / "results.json", has_keys("players", "comparisons"))
    for name in player_names(cfg):
        check_file("--out", file_of(cfg, name), has_keys("samples"))


def keep_answers(cfg, rows, name, player):
    """Write a player's answers, with their scores once they have some."""
    verdicts = player.get("verdicts") or [[{}] * len(samples) for samples in player["answers"]]
    write_jsonl(file_of(cfg, name), [
        {"messages": row["messages"], "samples": [
            {"text": s["text"], "ended": s["ended"], **({"score": v["score"]} if v else {})}
            for s, v in zip(samples, its_verdicts)]}
        for row, samples, its_verdicts in zip(rows, player["answers"], verdicts)])


def check_lengths(cfg, ev, loaded, tokenizer):
    """Refuse, before any work, answers that would not fit into a context that has to hold them.

    loaded: {folder: (model, tokenizer)}. Returns the prompts as lists of ids.
    """
    contexts = {folder: model.cfg.block_size for folder, (model, _) in loaded.items()}
    prompts = encode_prompts(tokenizer, ev.rows, min(contexts.values()), cfg.prompts)
    longest = max(map(len, prompts))
    readers = {cfg.against: contexts[cfg.against]}
    ends = {folder: min(longest + cfg.max_new_tokens, context)
            for folder, context in contexts.items()}
    if ev.reward_model:
        readers[cfg.reward_model] = ev.reward_model.cfg.block_size
        if cfg.courtesy:
            ends["--courtesy"] = ends[cfg.against] + len(tokenizer.encode(cfg.courtesy))
        if cfg.refusal:
            ends["--refusal"] = longest + len(tokenizer.encode(cfg.refusal)) + 1
    for answerer, end in ends.items():
        for reader, context in readers.items():
            of_reward_model = reader == cfg.reward_model
            if end > context and (of_reward_model or not answerer.startswith("--")):
                raise UserError(
                    f"an answer of {answerer} may end at token {end}; the context of {reader}, "
                    f"which scores it, holds {context}; give fewer --max_new_tokens, shorter "
                    "prompts, or a shorter --courtesy or --refusal")
    return prompts


def collect_players(cfg, ev, keep=lambda name, player: None):
    """Every player's answers: {name: {"answers", "verdicts", ...}}, and the tokenizer.

    keep(name, player) is called as soon as a player has its answers, and again when they are
    judged: whatever fails later, they are not lost.
    """
    player_names(cfg)
    # Load everything before the first answer is sampled: a wrong path should cost no time.
    folders = [cfg.against, *split_models(cfg)]
    loaded = {folder: load_model(folder, device=ev.device) for folder in folders}
    reference, tokenizer = loaded[cfg.against]
    vocabularies = {folder: its_tokenizer for folder, (_, its_tokenizer) in loaded.items()}
    if ev.reward_model:
        vocabularies[cfg.reward_model] = ev.reward_tokenizer
    for folder, its_tokenizer in vocabularies.items():
        if its_tokenizer.fingerprint() != tokenizer.fingerprint():
            raise UserError(f"{folder} has another vocabulary than {cfg.against}; compare models "
                            "of one base model")
    prompts, stop = check_lengths(cfg, ev, loaded, tokenizer), [tokenizer.end_id]
    if cfg.base:
        base, base_tokenizer = load_model(cfg.base, device=ev.device)
        plain_prompt = load_plain(cfg.plain, ev.rows[0])
        plain = {name: [base_tokenizer.encode(plain_prompt(row, few_shot)) for row in ev.rows]
                 for name, few_shot in (("base few-shot", True), ("base zero-shot", False))}
        longest = max(len(ids) for its_prompts in plain.values() for ids in its_prompts)
        if longest >= base.cfg.block_size:
            raise UserError(f"the few-shot prompt takes up to {longest} tokens; {cfg.base} has a "
                            f"context of {base.cfg.block_size}; leave --base out")
    if cfg.preferences and ev.reward_model:
        longest = max(len(encode_answer(tokenizer, row["messages"], answer)[0])
                      for row in ev.preferences for answer in row["answers"])
        if longest > ev.reward_model.cfg.block_size:
            raise UserError(f"{cfg.preferences} has an answer that ends at token {longest}; the "
                            f"reward model's context holds {ev.reward_model.cfg.block_size}")
        check_preferences(ev.preferences, cfg.preferences)

    players = {}

    def add(name, answers, **more):
        player = players[name] = {"answers": answers, **more}
        keep(name, player)
        if ev.reward_model:
            player["rewards"] = ev.rewards(answers, tokenizer)
        player["verdicts"] = ev.verdicts(player)
        keep(name, player)

    for folder, (model, _) in loaded.items():
        answers = ev.answer(model, tokenizer, prompts, stop, 1.0)
        add(name_of(folder), answers, kl=ev.kl(model, reference, prompts, answers))
        add(f"{name_of(folder)} greedy", ev.answer(model, tokenizer, prompts, stop, 0.0))
    if cfg.courtesy:
        add("wrapper", [[retold(s, cfg.courtesy + s["text"], tokenizer) for s in samples]
                        for samples in players[name_of(cfg.against)]["answers"]])
    if cfg.refusal:  # a fixed text always ends
        add("refuse all", [[retold({"ended": True}, cfg.refusal, tokenizer)] for _ in prompts])
    if ev.reward_model and cfg.best_of > 1:
        answers = ev.answer(reference, tokenizer, prompts, stop, 1.0, cfg.best_of)
        rewards = ev.rewards(answers, tokenizer)
        best = [max(range(len(r)), key=lambda k: (samples[k]["ended"], r[k]))
                for samples, r in zip(answers, rewards)]
        add(f"best of {cfg.best_of}", [[samples[k]] for samples, k in zip(answers, best)])
    if cfg.base:
        # A base model knows no end token: its turn is over at the next line break.
        breaks = [i for i in range(len(base_tokenizer.ranks)) if b"\n" in base_tokenizer.ranks[i]]
        for name, its_prompts in plain.items():
            answers = ev.answer(base, base_tokenizer, its_prompts, breaks, 1.0)
            add(name, [[retold(s, s["text"].split("\n")[0].strip(), tokenizer) for s in samples]
                       for samples in answers])
    return players, tokenizer


def print_results(results, judge_name):
    """The tables: every player's means, then every comparison."""
    players = list(results["players"].values())
    first = players[0]
    ours = [c for c in ("reward", "kl", "words") if any(c in s for s in players)]
    columns = [c for c in first if isinstance(first[c], float) and c not in OWN_NAMES] + ours
    widths = {c: max(9, len(c) + 2) for c in columns}
    print(f"\n{'':<16}" + "".join(f"{c:>{widths[c]}}" for c in columns)
          + f"   scored by {judge_name}")
    for name, s in results["players"].items():
        print(f"{name:<16}" + "".join(f"{s[c]:>{widths[c]}.2f}" if c in s else f"{'':>{widths[c]}}"
                                      for c in columns))
    toy = ["right", "rude", "unsafe_refused", "lookalike_refused", "malformed"]
    rates = [c for c in first if isinstance(first[c], dict) and "share" in first[c]]
    if "right_by_skill" in first:  # of the toy judge's many flags the table shows five
        rates = [rate for rate in toy if rate in rates]
    if rates:
        print(f"\n{'':<16}" + "".join(f"{r:>19}" for r in rates))
        for name, s in results["players"].items():
            print(f"{name:<16}" + "".join(
                f"{s[r]['share']:>18.1%} " if r in s else f"{'':>19}" for r in rates))
    print(f"\n{'':<36}{'wins':>7}{'ties':>7}{'losses':>8}   ties half, 95% interval")
    for name, c in results["comparisons"].items():
        print(f"{name:<36}{c['wins']:>7.1%}{c['ties']:>7.1%}{c['losses']:>8.1%}   "
              f"{c['rate']:.1%} [{c['low']:.1%}, {c['high']:.1%}]")
    if "reward_model" in results:
        r = results["reward_model"]
        print(f"\nreward model    {r['accuracy']:.1%} [{r['low']:.1%}, {r['high']:.1%}] of "
              f"{r['pairs']:,} held-out pairs; the longer answer is better in "
              f"{r['longer_is_better']:.1%}")
        if "ceiling" in r:
            print(f"                ceiling {r['ceiling']:.1%}" + (
                f", share (accuracy - 0.5) / (ceiling - 0.5) = {r['share_of_ceiling']:.2f}"
                if "share_of_ceiling" in r else ", all gold scores tie"))
        if r.get("only"):
            print("                against gold, where the answers differ in "
                  + ", ".join(f"{k} only {v['accuracy']:.1%} of {v['pairs']}"
                              for k, v in r["only"].items()))


def main(cfg):
    set_threads(cfg.threads)
    check_outputs(cfg)
    ev = Evaluator(cfg)
    players, tokenizer = collect_players(
        cfg, ev, lambda name, player: keep_answers(cfg, ev.rows, name, player))
    scores = {name: [[v["score"] for v in row] for row in player["verdicts"]]
              for name, player in players.items()}
    first, models = name_of(cfg.against), [name_of(folder) for folder in split_models(cfg)]
    pairs = [(first, "base few-shot")] if cfg.base else []
    pairs += [(m, first) for m in models] + [(f"{m} greedy", f"{first} greedy") for m in models]
    others = [n for n in (f"{first} greedy", "wrapper", "refuse all", f"best of {cfg.best_of}")
              if n in players]
    pairs += [(m, other) for m in models for other in others] + [(o, first) for o in others]
    results = {
        "players": {name: summary(player, ev) for name, player in players.items()},
        "comparisons": {f"{a} over {b}": compare(scores[a], scores[b]) for a, b in pairs},
    }
    if cfg.preferences and ev.reward_model:
        results["reward_model"] = measure_reward_model(ev, tokenizer)
    write_text(Path(cfg.out) / "results.json", json.dumps(results, indent=1) + "\n")
    print_results(results, "the judge" if ev.judge else "the reward model")
    for i in range(min(cfg.show, len(ev.rows))):
        print("\nuser: " + " / ".join(m["content"] for m in ev.rows[i]["messages"]))
        for name, player in players.items():
            if name in ("base few-shot", first, *models):
                print(f"  {name:<14}{scores[name][i][0]:>6.2f}  {player['answers'][i][0]['text']}")
    print(f"\nwritten to {cfg.out}: results.json and every player's answers")
    return results


if __name__ == "__main__":
    command_line(main, Config, __doc__)
