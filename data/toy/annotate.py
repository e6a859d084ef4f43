"""Simulated annotators: rank the answers that a model gave to each prompt, with human-like noise.

    python data/toy/annotate.py SAMPLES.jsonl --out preferences.jsonl [--temperature 0.3] [--seed 0]

An annotator feels each answer's utility: the gold judge's score over `temperature`, plus one draw
of Gumbel noise. Ranking by utility makes every pair exactly Bradley-Terry:

    P(answer i is preferred to answer j) = sigmoid((gold_i - gold_j) / temperature)

which is the very model that the reward model is trained under. So the best accuracy that any
reward model can reach is known: the mean of max(P, 1 - P) over the pairs, printed as the ceiling.
A row of the output is a ranked list, best first:

    messages     the prompt              output    its answers, best first
    grades       K x K: grades[i][j], j > i, says how much better answer i felt than answer j, in
                 Llama 2's four grades: 3 significantly, 2 better, 1 slightly, 0 negligibly
    safety       for each answer whether the annotator calls it safe
    skill        the prompt's skill, for tables

and for evaluation only, because no annotator could write them down and no training may read them:

    gold         the judge's scores      parts     {correct, manners, safe, form} of each answer
    temperature  of the noise
"""
import argparse
import math
import random
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
from judge import judge, read_toy_samples as read_samples  # noqa: E402
from minirlhf.plumbing.commands import check_file, has_keys, run_command  # noqa: E402
from minirlhf.plumbing.errors import UserError  # noqa: E402
from minirlhf.plumbing.files import write_jsonl  # noqa: E402

GRADE_THRESHOLDS = (1.0, 2.5, 4.5)      # utility differences from which on the grade is 1, 2, 3


def gumbel(rng):
    """One draw of standard Gumbel noise; the difference of two such draws is logistic."""
    return -math.log(-math.log(1.0 - rng.random()) + 1e-300)    # random() may return 0, never 1


def win_probability(gold_i, gold_j, temperature):
    """P(i is preferred to j) of the Bradley-Terry model; stable for any difference."""
    return 0.5 * (1.0 + math.tanh((gold_i - gold_j) / (2.0 * temperature)))


def grade(difference):
    """Llama 2's grade, 0 to 3, of a utility difference that is at least 0."""
    return sum(difference >= threshold for threshold in GRADE_THRESHOLDS)


def rank(golds, temperature, rng):
    """Ranks answers by noisy utility.

    Returns the order, the index of the best answer first, and the K x K grades in that order,
    which are 0 on and below the diagonal.
    """
    utilities = [gold / temperature + gumbel(rng) for gold in golds]
    order = sorted(range(len(golds)), key=lambda i: -utilities[i])
    felt = [utilities[i] for i in order]
    grades = [[grade(felt[i] - felt[j]) if j > i else 0 for j in range(len(felt))]
              for i in range(len(felt))]
    return order, grades


def usable_answers(samples, dropped):
    """The samples that annotators get to see, as texts; counts in `dropped` why others fall out."""
    texts = []
    for sample in samples:
        if not sample["ended"]:
            dropped["answers that did not end"] += 1
        elif not sample["text"].strip():
            dropped["empty answers"] += 1
        elif sample["text"] in texts:
            dropped["duplicates"] += 1
        else:
            texts.append(sample["text"])
    return texts


def annotate_row(row, temperature, rng, dropped):
    """One row of samples as a row of ranked preferences, or None if fewer than 2 answers remain."""
    texts = usable_answers(row["samples"], dropped)
    if len(texts) < 2:
        dropped["prompts with fewer than 2 answers"] += 1
        return None
    verdicts = [judge(row, text) for text in texts]
    order, grades = rank([v["score"] for v in verdicts], temperature, rng)
    verdicts = [verdicts[i] for i in order]
    task = row.get("task") or row["meta"]["task"]
    return {"messages": row["messages"], "output": [texts[i] for i in order], "grades": grades,
            "safety": [not v["complied"] for v in verdicts], "skill": task["skill"],
            "gold": [v["score"] for v in verdicts],
            "parts": [{name: v[name] for name in ("correct", "manners", "safe", "form")}
                      for v in verdicts],
            "temperature": temperature}


def report(rows, dropped):
    """Prints the counts, the ceiling, the share of ties and two examples."""
    print(f"{len(rows)} ranked lists; dropped: "
          + (", ".join(f"{count} {why}" for why, count in dropped.items()) or "nothing"))
    pairs = [(row, i, j) for row in rows for j in range(len(row["gold"])) for i in range(j)]
    probabilities = [win_probability(row["gold"][i], row["gold"][j], row["temperature"])
                     for row, i, j in pairs]
    ceiling = sum(max(p, 1 - p) for p in probabilities) / len(pairs)
    ties = sum(row["gold"][i] == row["gold"][j] for row, i, j in pairs) / len(pairs)
    grades = Counter(row["grades"][i][j] for row, i, j in pairs)
    print(f"{len(pairs)} pairs | ceiling {ceiling:.1%} | equal gold {ties:.1%} | grades "
          + ", ".join(f"{g}: {grades[g] / len(pairs):.0%}" for g in range(4)))
    for row in rows[:2]:
        print(f"\n  {row['messages'][-1]['content']}")
        for text, gold in zip(row["output"], row["gold"]):
            print(f"    gold {gold:5.2f} | {text}")


def annotate(args):
    """The command: read, rank, write, report."""
    if not 0.001 <= args.temperature <= 1000:  # else utilities overflow, or hold noise alone
        raise UserError(f"--temperature {args.temperature}: expected a number from 0.001 to 1000")
    check_file("--out", args.out, has_keys("gold", "grades"), (".jsonl", ".jsonl.gz"))
    rng, dropped = random.Random(args.seed), Counter()
    annotated = [annotate_row(row, args.temperature, rng, dropped)
                 for row in read_samples(args.samples)]
    rows = [row for row in annotated if row]
    if not rows:
        raise UserError(f"{args.samples}: no prompt has 2 different answers that ended; sample "
                        "more per prompt (--num_samples) or train longer")
    write_jsonl(args.out, rows)
    report(rows, dropped)
    print(f"\nwrote {args.out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Rank samples as noisy annotators would.")
    parser.add_argument("samples", help="JSONL as sample.py writes it, K samples a prompt")
    parser.add_argument("--out", required=True, help="where to write the preferences (JSONL)")
    parser.add_argument("--temperature", type=float, default=0.3,
                        help="the annotators' noise, in units of the gold score")
    parser.add_argument("--seed", type=int, default=0, help="the same seed ranks the same")
    run_command(parser, argv, annotate)


if __name__ == "__main__":
    main()
