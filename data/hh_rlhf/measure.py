r"""Is a reward model better than "the longer answer is better"? A paired test on held-out folds.

People like long answers, so a reward model that only counts words is right more often than not.
What it has learnt beyond that shows in three ways: in the difference of the two accuracies on the
*same* pairs, in a bag of words beside it, and on pairs of nearly equal length.

    python data/hh_rlhf/measure.py --models out/real/rm0,out/real/rm1 \
        --folds out/real/data/fold0,out/real/data/fold1

Model k has to be trained on fold k's train.jsonl, and is measured on that fold's heldout.jsonl; the
figures are of all folds together. "a+b" instead of one folder takes the mean score of two models.
"""
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minirlhf.batches import encode_answer, fit, pad_right
from minirlhf.plumbing.config import command_line
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.formats import read_preferences
from minirlhf.plumbing.checkpoints import load_model
from minirlhf.plumbing.devices import autocast, pick_device, pick_dtype, set_threads
from minirlhf.plumbing.stats import wilson


@dataclass
class Config:
    models: str = "out/real/rm0,out/real/rm1"  # run folders of reward models, one for each fold
    folds: str = "out/real/data/fold0,out/real/data/fold1"  # folders with train and heldout.jsonl
    matched: float = 0.9  # pairs whose shorter answer has this share of the longer one's length
    l2: float = 0.01  # penalty on the bag of words' squared weights
    batch_size: int = 32  # sequences per forward pass; above 0
    device: str = ""  # cuda or cpu (default: cuda where there is one)
    dtype: str = "auto"  # auto | float32 | bfloat16, of the matrix products
    threads: int = 1  # CPU threads


# 1. Three judges of a pair: each gives its preference for the chosen answer, > 0 where right ------

def length_gaps(rows):
    """Characters of the chosen answer less those of the rejected one: (N,)."""
    return torch.tensor([float(len(row["answers"][0]) - len(row["answers"][1])) for row in rows])


@torch.no_grad()
def model_gaps(folder, rows, cfg):
    """A reward model's normalised score of chosen less that of rejected: (N,)."""
    device = pick_device(cfg.device)
    model, tokenizer = load_model(folder, "scalar", device)
    dtype, n = pick_dtype(cfg.dtype, device), model.cfg.block_size
    sequences = []  # 2N
    for row in rows:  # long prompts are cut as in training
        messages, _, _ = fit(tokenizer, row["messages"], row["answers"], n, "cut", folder)
        sequences += [encode_answer(tokenizer, messages, answer)[0] for answer in row["answers"]]
    # Every pair counts here, so of an answer that fits beside no prompt the end is read.
    sequences = [ids if len(ids) <= n else ids[:1] + ids[1 - n :] for ids in sequences]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.zeros(len(sequences))
    for start in range(0, len(order), cfg.batch_size):
        part = order[start : start + cfg.batch_size]
        with autocast(device, dtype):
            scores[part] = model.score(*pad_right([sequences[i] for i in part], device)).cpu()
    scores = (scores / model.score_std.cpu()).view(-1, 2)  # (N, 2); the mean would cancel
    return scores[:, 0] - scores[:, 1]


def words_of(text):
    """A text's words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bag_of_words_gaps(train, heldout, l2):
    """Logistic regression on word counts and length: trained on `train`, (N,) gaps on `heldout`.

    Bradley-Terry with a linear score: the loss is -log sigmoid(w . (chosen - rejected)), where an
    answer's features are log(1 + count) of each word that 5 or more training answers have, and its
    log length. Without a constant, which the difference would cancel.
    """
    occurs = Counter(word for row in train for answer in row["answers"]
                     for word in set(words_of(answer)))
    column = {word: i for i, word in enumerate(w for w, count in occurs.items() if count >= 5)}

    def features(rows):
        x = torch.zeros(len(rows), len(column) + 1)  # (N, words + 1)
        for i, row in enumerate(rows):
            for sign, answer in zip((1, -1), row["answers"]):
                words = words_of(answer)
                for word, count in Counter(words).items():
                    if word in column:
                        x[i, column[word]] += sign * math.log(1 + count)
                x[i, -1] += sign * math.log(1 + len(words))
        return x

    x, w = features(train), torch.zeros(len(column) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.softplus(-(x @ w)).mean() + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (features(heldout) @ w).detach()


# 2. Compare them on the same pairs ----------------------------------------------------------------

def hits_of(gaps):
    """1 where the chosen answer is preferred, 0 where the other, 0.5 at a tie: (N,) float64."""
    return (gaps > 0).double() + 0.5 * (gaps == 0)


def clustered_bootstrap(values, clusters, num_resamples=10_000, seed=0):
    """95% interval (low, high) of the mean of `values` (N,), resampling whole clusters.

    clusters: (N,) int64, 0 to C - 1. Two pairs that grew out of one opening are not independent.
    """
    num = int(clusters.max()) + 1
    sums = torch.zeros(num, dtype=torch.float64).index_add(0, clusters, values)  # (C,)
    sizes = torch.bincount(clusters, minlength=num).double()  # (C,)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(num_resamples):
        picks = torch.randint(num, (num,), generator=generator)
        means.append(sums[picks].sum() / sizes[picks].sum())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()


def mcnemar(hits, others):
    """Exact two-sided McNemar test: (pairs only we get right, only the other does, p).

    Where both are right or both wrong nothing can be learnt. Of the rest, each would be right as
    often as the other by chance: a fair coin. Ties are left out. Source: McNemar (1947).
    """
    ours = int(((hits == 1) & (others == 0)).sum())
    theirs = int(((hits == 0) & (others == 1)).sum())
    n, k = ours + theirs, max(ours, theirs)
    tail = sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
    return ours, theirs, min(1.0, 2 * tail)


def print_comparison(name, hits, other_name, others, clusters):
    """The difference of two accuracies on the same pairs, its interval, and the paired test."""
    low, high = clustered_bootstrap(hits - others, clusters)
    ours, theirs, p = mcnemar(hits, others)
    print(f"{name} less {other_name}: {100 * (hits - others).mean():+.1f} points, "
          f"95% interval [{100 * low:+.1f}, {100 * high:+.1f}] | only one is right: "
          f"{ours} to {theirs}, p = {p:.2g}")


def main(cfg):
    set_threads(cfg.threads)
    models, folds = cfg.models.split(","), cfg.folds.split(",")
    if len(models) != len(folds):
        raise UserError(f"{len(models)} --models and {len(folds)} --folds; give one for each")
    rows, gaps = [], {"longer": [], "bag of words": [], "reward model": []}
    for folders, fold in zip(models, folds):
        train = read_preferences(os.path.join(fold, "train.jsonl"))
        heldout = read_preferences(os.path.join(fold, "heldout.jsonl"))
        if any(len(row["answers"]) != 2 for row in train + heldout):
            raise UserError(f"{fold}: expected pairs, found a row with a longer list of answers; "
                            "give the files that prepare.py wrote")
        singles = [model_gaps(folder, heldout, cfg) for folder in folders.split("+")]
        for folder, single in zip(folders.split("+"), singles):
            print(f"{folder}: {hits_of(single).mean():.1%} of the {len(heldout):,} pairs of {fold}")
        gaps["reward model"].append(torch.stack(singles).mean(0))
        gaps["longer"].append(length_gaps(heldout))
        gaps["bag of words"].append(bag_of_words_gaps(train, heldout, cfg.l2))
        rows += heldout

    hits = {name: hits_of(torch.cat(parts)) for name, parts in gaps.items()}  # each (N,)
    firsts = [row["messages"][0]["content"] for row in rows]
    number = {first: i for i, first in enumerate(dict.fromkeys(firsts))}
    clusters = torch.tensor([number[first] for first in firsts])  # (N,)
    lengths = torch.tensor([[len(answer) for answer in row["answers"]] for row in rows])  # (N, 2)
    matched = lengths.min(1).values >= cfg.matched * lengths.max(1).values  # (N,)
    print(f"\nright, of the held-out pairs{'':<10}all {len(rows):,}          "
          f"{int(matched.sum())} of nearly equal length")
    for name, h in hits.items():
        line = f"{name:<34}"
        for part in (h, h[matched]):
            low, high = wilson(part.sum().item(), len(part))
            line += f"{part.mean():>6.1%} [{low:.1%}, {high:.1%}]   "
        print(line)
    print()
    print_comparison("reward model", hits["reward model"], "longer", hits["longer"], clusters)
    print_comparison("reward model", hits["reward model"], "bag of words", hits["bag of words"],
                     clusters)
    print_comparison("bag of words", hits["bag of words"], "longer", hits["longer"], clusters)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
