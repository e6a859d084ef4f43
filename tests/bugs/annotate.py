"""Bugs to plant into data/toy/annotate.py."""

from bugs import Bug

FILE = "data/toy/annotate.py"
BUGS = [
    Bug("gumbel", "-math.log(-math.log(1.0 - rng.random()) + 1e-300)",
        "math.log(-math.log(1.0 - rng.random()) + 1e-300)", "test_rankings_of_three",
        "Gumbel noise of the wrong sign, which pairs alone can't show"),
    Bug("rank", "felt = [utilities[i] for i in order]", "felt = [golds[i] / temperature for i in order]",
        "test_a_grade_says", "grades of the true gap, not of the one that was felt"),
    Bug("annotate", "random.Random(args.seed)", "random.Random(0)", "test_the_annotators_seed",
        "the annotators ignore their seed"),
    Bug("report", "max(p, 1 - p) for p", "p for p", "test_the_ceiling_is",
        "the ceiling is the mean of P"),
    Bug("rank", "gold / temperature + gumbel(rng)", "gold / temperature",
        "test_close_answers_are", "annotators without noise"),
    Bug("annotate_row", '("correct", "manners", "safe", "form")', '("correct", "manners", "safe")',
        "test_the_parts_of_an_answer", "annotators leave form out of the parts"),
]
