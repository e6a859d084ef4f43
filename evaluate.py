r"""Does one model answer better than another? Win rates, intervals, scores, KL, accuracy.

    python evaluate.py --models out/ppo,out/dpo --against out/sft --judge data/toy/judge.py:judge \
        --reward_model out/rm --base out/pretrain --preferences out/heldout_preferences.jsonl

Every model answers the same held-out prompts at temperature 1 and greedily. The judge (where there
is none, the reward model) scores each answer; A beats B on a prompt where its score is higher, and
a tie counts half. Intervals are 95%, from a bootstrap over prompts. Beside the models stand baselines
that cost nothing: greedy decoding, a fixed courtesy put before every answer, refusing everything,
and the best of K samples by the reward model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minirlhf.batches import encode_answer, encode_prompts, pad_right, response_mask
from minirlhf.generate import sample_prompts
from minirlhf.masked import masked_sum, token_logprobs
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_jsonl, write_text
from minirlhf.plumbing.formats import read_preferences, read_prompts
from minirlhf.plumbing.checkpoints import load_model
from minirlhf.plumbing.devices import autocast, pick_device, pick_dtype
from minirlhf.plumbing.runs import load_function
from minirlhf.plumbing.stats import compare, wilson


@dataclass
class Config:
    models: str = "out/ppo,out/dpo"  # run folders of the models to evaluate, separated by commas
    against: str = "out/sft"  # run folder of the model to compare with; the KL's reference too
    base: str = ""  # run folder of a base model to add, prompted with few-shot plain text
    plain: str = "data/toy/world.py:plain_prompt"  # makes that plain text: file.py:function
    prompts: str = "data/toy/heldout.jsonl"  # held-out prompts
    judge: str = ""  # file.py:function(row, response, ended) -> {"score", ...}
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
        self.judge = load_function(cfg.judge) if cfg.judge else None
        self.preferences = read_preferences(cfg.preferences) if cfg.preferences else None
        self.reward_model = None
        if cfg.reward_model:
            self.reward_model, self.reward_tokenizer = load_model(cfg.reward_model, "scalar",
                                                                  self.device)
        if not (self.judge or self.reward_model):
            raise UserError("nobody to score the answers; give --judge or --reward_model")

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
    return scores


def retold(sample, text, tokenizer):
    """The sample with another text, and the ids that a reward model reads of it."""
    ids = tokenizer.encode(text) + [tokenizer.end_id] * sample["ended"]
    return {**sample, "text": text, "ids": ids}


def answered_by(player, change, tokenizer):
    """A baseline made of a player's first answers, each changed by change(text)."""
    return {"answers": [[retold(samples[0], change(samples[0]["text"]), tokenizer)]
                        for samples in player["answers"]]}


def summary(player, ev):
    """Means over all answers of a player, and the counts behind the rates of a judge's flags."""
    verdicts = [v for row in player["verdicts"] for v in row]
    answers = [s for samples in player["answers"] for s in samples]
    out = {"score": sum(v["score"] for v in verdicts) / len(verdicts),
           "words": sum(len(s["text"].split()) for s in answers) / len(answers),
           "ended": sum(s["ended"] for s in answers) / len(answers)}
    for name, value in verdicts[0].items():
        if isinstance(value, float) and name != "score":
            out[name] = sum(v[name] for v in verdicts) / len(verdicts)
        if isinstance(value, bool):
            out[name] = count_share([v[name] for v in verdicts])
    if "rewards" in player:
        rewards = [r for row in player["rewards"] for r in row]
        out["reward"] = sum(rewards) / len(rewards)
    if "kl" in player:
        out["kl"] = player["kl"]
    return {**out, **toy_rates(player, ev.rows)}


def count_share(flags):
    """{"count", "of", "share", "low", "high"} of a list of bools, with its Wilson interval."""
    low, high = wilson(sum(flags), len(flags))
    return {"count": sum(flags), "of": len(flags), "share": sum(flags) / len(flags),
            "low": low, "high": high}


def toy_rates(player, rows):
    """Rates that only make sense on some prompts; for rows whose meta has the toy world's task."""
    tasks = [row["meta"].get("task") for row in rows]
    if None in tasks or "refused" not in player["verdicts"][0][0]:
        return {}
    by_kind = {"unsafe_refused": ("unsafe", "refused"),
               "lookalike_refused": ("lookalike", "over_refused")}
    rates = {}
    for name, (kind, flag) in by_kind.items():
        flags = [v[flag] for task, row in zip(tasks, player["verdicts"]) if task[kind] for v in row]
        if flags:
            rates[name] = count_share(flags)
    # Right answers among the prompts that have one: an unsafe request has none.
    right = [v["correct"] > 0 for task, row in zip(tasks, player["verdicts"])
             if not task["unsafe"] for v in row]
    rates["right"] = count_share(right)
    skills = sorted({task["skill"] for task in tasks if not task["unsafe"]})
    rates["right_by_skill"] = {
        skill: sum(flags) / len(flags) for skill in skills
        for flags in [[v["correct"] > 0 for task, row in zip(tasks, player["verdicts"])
                       if task["skill"] == skill for v in row]]}
    return rates


def measure_reward_model(ev, tokenizer):
    """Accuracy on held-out pairs, beside the ceiling where the rows carry the annotators' gold."""
    rows = ev.preferences
    sequences = [encode_answer(tokenizer, row["messages"], answer)[0]
                 for row in rows for answer in row["answers"]]
    scores = iter(score_sequences(ev.reward_model, sequences, ev))
    right, ceiling, longer, only = [], [], [], {}
    for row in rows:
        s, K = [next(scores) for _ in row["answers"]], len(row["answers"])
        for i in range(K):
            for j in range(K):
                if row["ranks"][i] >= row["ranks"][j]:
                    continue
                hit = 0.5 if s[i] == s[j] else float(s[i] > s[j])
                right.append(hit)
                a, b = len(row["answers"][i]), len(row["answers"][j])
                longer.append(0.5 if a == b else float(a > b))
                if "gold" not in row["meta"]:
                    continue
                gold, parts = row["meta"]["gold"], row["meta"]["parts"]
                p = 1 / (1 + torch.exp(torch.tensor((gold[j] - gold[i])
                                                    / row["meta"]["temperature"])).item())
                ceiling.append(max(p, 1 - p))
                differing = [name for name in parts[i] if parts[i][name] != parts[j][name]]
                if len(differing) == 1:  # measured against gold, not against a noisy annotator
                    name, sign = differing[0], gold[i] - gold[j]
                    only.setdefault(name, []).append(
                        0.5 if s[i] == s[j] else float((s[i] > s[j]) == (sign > 0)))
    out = {"pairs": len(right), "accuracy": sum(right) / len(right),
           "longer_is_better": sum(longer) / len(longer)}
    if ceiling:
        out["ceiling"] = sum(ceiling) / len(ceiling)
        out["share_of_ceiling"] = (out["accuracy"] - 0.5) / (out["ceiling"] - 0.5)
        out["only"] = {name: {"pairs": len(hits), "accuracy": sum(hits) / len(hits)}
                       for name, hits in sorted(only.items())}
    return out


def collect_players(cfg, ev):
    """Every player's answers: {name: {"answers", "verdicts", ...}}, and the tokenizer."""
    reference, tokenizer = load_model(cfg.against, device=ev.device)
    prompts = encode_prompts(tokenizer, ev.rows, reference.cfg.block_size, cfg.prompts)
    stop = [tokenizer.end_id]
    # Load everything before the first answer is sampled: a wrong path should cost no time.
    folders = [cfg.against, *filter(None, cfg.models.split(","))]
    if len({Path(folder).name for folder in folders}) < len(folders):
        raise UserError(f"two of {', '.join(folders)} have the same last name, by which the table "
                        "calls them; rename a folder")
    loaded = {folder: load_model(folder, device=ev.device) for folder in folders}
    vocabularies = {folder: its_tokenizer for folder, (_, its_tokenizer) in loaded.items()}
    if ev.reward_model:
        vocabularies[cfg.reward_model] = ev.reward_tokenizer
    for folder, its_tokenizer in vocabularies.items():
        if its_tokenizer.fingerprint() != tokenizer.fingerprint():
            raise UserError(f"{folder} has another vocabulary than {cfg.against}; compare models "
                            "of one base model")
    if cfg.base:
        base, base_tokenizer = load_model(cfg.base, device=ev.device)
        plain_prompt = load_function(cfg.plain)
        plain = {name: [base_tokenizer.encode(plain_prompt(row["messages"], few_shot))
                        for row in ev.rows]
                 for name, few_shot in (("base few-shot", True), ("base zero-shot", False))}
        longest = max(map(len, plain["base few-shot"]))
        if longest >= base.cfg.block_size:
            raise UserError(f"the few-shot prompt takes up to {longest} tokens; {cfg.base} has a "
                            f"context of {base.cfg.block_size}; leave --base out")
    if cfg.preferences and ev.reward_model:
        longest = max(len(encode_answer(tokenizer, row["messages"], answer)[0])
                      for row in ev.preferences for answer in row["answers"])
        if longest > ev.reward_model.cfg.block_size:
            raise UserError(f"{cfg.preferences} has an answer that ends at token {longest}; the "
                            f"reward model's context holds {ev.reward_model.cfg.block_size}")
        if all(len(set(row["ranks"])) < 2 for row in ev.preferences):
            raise UserError(f"{cfg.preferences} holds ties only: nothing to be right about")

    players = {}
    for folder, (model, _) in loaded.items():
        name = Path(folder).name
        answers = ev.answer(model, tokenizer, prompts, stop, 1.0)
        players[name] = {"answers": answers, "kl": ev.kl(model, reference, prompts, answers)}
        players[f"{name} greedy"] = {"answers": ev.answer(model, tokenizer, prompts, stop, 0.0)}
    first = Path(cfg.against).name
    if cfg.courtesy:
        players["wrapper"] = answered_by(players[first], lambda text: cfg.courtesy + text,
                                         tokenizer)
    if cfg.refusal:
        players["refuse all"] = answered_by(players[first], lambda text: cfg.refusal, tokenizer)
    if ev.reward_model and cfg.best_of > 1:
        answers = ev.answer(reference, tokenizer, prompts, stop, 1.0, cfg.best_of)
        rewards = ev.rewards(answers, tokenizer)
        players[f"best of {cfg.best_of}"] = {"answers": [
            [samples[max(range(len(samples)), key=lambda k: r[k] if samples[k]["ended"] else -1e9)]]
            for samples, r in zip(answers, rewards)]}
    if cfg.base:
        # A base model knows no end token: its turn is over at the next line break.
        breaks = [i for i in range(len(base_tokenizer.ranks)) if b"\n" in base_tokenizer.ranks[i]]
        for name, its_prompts in plain.items():
            answers = ev.answer(base, base_tokenizer, its_prompts, breaks, 1.0)
            players[name] = {"answers": [
                [retold(s, s["text"].split("\n")[0].strip(), tokenizer) for s in samples]
                for samples in answers]}
    for player in players.values():
        if ev.reward_model:
            player["rewards"] = ev.rewards(player["answers"], tokenizer)
        player["verdicts"] = ev.verdicts(player)
    return players, tokenizer


def print_results(results, judge_name):
    """The tables: every player's means, then every comparison."""
    columns = ["score", "correct", "manners", "safe", "form", "reward", "kl", "words"]
    print(f"\n{'':<16}" + "".join(f"{c:>9}" for c in columns) + f"   scored by {judge_name}")
    for name, s in results["players"].items():
        print(f"{name:<16}" + "".join(f"{s[c]:>9.2f}" if c in s else f"{'':>9}" for c in columns))
    rates = ["right", "rude", "unsafe_refused", "lookalike_refused", "malformed"]
    if "right" in next(iter(results["players"].values())):
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
        print(f"\nreward model    {r['accuracy']:.1%} of {r['pairs']:,} held-out pairs; the longer "
              f"answer is better in {r['longer_is_better']:.1%}")
        if "ceiling" in r:
            print(f"                ceiling {r['ceiling']:.1%}, share (accuracy - 0.5) / "
                  f"(ceiling - 0.5) = {r['share_of_ceiling']:.2f}; against gold, where the answers differ in "
                  + ", ".join(f"{k} only {v['accuracy']:.1%} of {v['pairs']}"
                              for k, v in r["only"].items()))


def main(cfg):
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    ev = Evaluator(cfg)
    players, tokenizer = collect_players(cfg, ev)
    scores = {name: [[v["score"] for v in row] for row in player["verdicts"]]
              for name, player in players.items()}
    first = Path(cfg.against).name
    models = [Path(folder).name for folder in cfg.models.split(",") if folder]
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
    print_results(results, "the judge" if ev.judge else "the reward model")
    for i in range(min(cfg.show, len(ev.rows))):
        print("\nuser: " + " / ".join(m["content"] for m in ev.rows[i]["messages"]))
        for name, player in players.items():
            if name in ("base few-shot", first, *models):
                print(f"  {name:<14}{scores[name][i][0]:>6.2f}  {player['answers'][i][0]['text']}")
    out = Path(cfg.out)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    for name, player in players.items():
        write_jsonl(out / f"{name.replace(' ', '_')}.jsonl", [
            {"messages": row["messages"], "samples": [
                {"text": s["text"], "ended": s["ended"], "score": v["score"]}
                for s, v in zip(samples, verdicts)]}
            for row, samples, verdicts in zip(ev.rows, player["answers"], player["verdicts"])])
    print(f"\nwritten to {out}: results.json and every player's answers")
    return results


if __name__ == "__main__":
    command_line(main, Config, __doc__)
