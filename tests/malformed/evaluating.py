"""What evaluate.py is asked to compare, with what, and where it is to write."""

import os

from malformed import Case, write


def case(name, words, make=lambda road, folder: {}, **options):
    """make(road, folder) -> options of evaluate.py, beside those that a sound evaluation has."""
    def argv(road, folder):
        chosen = {"models": "", "against": road.folder / "sft", "prompts": road.prompts,
                  "out": folder / "eval", "reward_model": road.folder / "rm",
                  **make(road, folder), **options}
        return ["evaluate.py", *(f"--{option}={value}" for option, value in chosen.items())]
    return Case(name, argv, words)


def preferences(name, words, **changes):
    """A row of preferences with the annotators' gold, some keys changed."""
    row = {"prompt": "cow?", "output": ["moo", "Moo."], "gold": [1.0, 0.5], "temperature": 0.3,
           "parts": [{"correct": 1.0, "form": 0.0}, {"correct": 1.0, "form": -0.5}], **changes}
    return case(name, words, lambda road, folder: {
        "preferences": write(folder, "p.jsonl", [row])})


def linked(road, folder, name):
    """A run folder of another name: a link to the SFT model's."""
    os.symlink(road.folder / "sft", folder / name)
    return folder / name


def foreign(name):
    """A file in the output folder that this project did not write."""
    return lambda road, folder: write(folder / "eval", name, "my notes\n") and {}


CASES = [
    # Sizes that no machine has room for.
    case("a billion samples for the best of K", "--best_of 1000000000: with 40 prompts",
         best_of=10**9),
    case("the largest best of K", "--best_of: expected a whole number up to a billion", best_of=2**63 - 1),
    case("a best of K below zero", "--best_of -1: expected", best_of=-1),
    case("a best of K that is no number", "--best_of: invalid int value", best_of="all"),
    case("answers of 2^63 tokens", "--max_new_tokens: expected a whole number up to a billion",
         max_new_tokens=2**63),
    case("a batch of nothing", "--batch_size 0: expected", batch_size=0),
    case("a batch of half a sequence", "--batch_size: invalid int value", batch_size=0.5),
    # What is compared.
    case("nothing between two models", "found nothing before or after one",
         lambda road, folder: {"models": f"{road.folder}/sft,,{road.folder}/rm"}),
    case("a comma at the end", "found nothing before or after one",
         lambda road, folder: {"models": f"{road.folder}/pretrain,"}),
    case("a comma alone", "found nothing before or after one", models=","),
    case("one model twice", "have the same last name",
         lambda road, folder: {"models": f"{road.folder}/pretrain,{road.folder}/pretrain/"}),
    case("the model that is compared with", "have the same last name",
         lambda road, folder: {"models": road.folder / "sft"}),
    case("a model called like a baseline", "as the table calls another player",
         lambda road, folder: {"models": linked(road, folder, "wrapper")}),
    case("a model called like another's greedy answers", "as the table calls another player",
         lambda road, folder: {"models": linked(road, folder, "sft_greedy")}),
    case("a model called like the best of K", "as the table calls another player",
         lambda road, folder: {"models": linked(road, folder, "best of 4")}),
    case("a model that does not exist", "{folder}/none/ckpt.pt does not exist",
         lambda road, folder: {"models": folder / "none"}),
    case("a second model that does not exist", "{folder}/none/ckpt.pt does not exist",
         lambda road, folder: {"models": f"{road.folder}/pretrain, {folder}/none"}),
    case("a reward model as a model", "holds a scalar model, a gpt model is needed",
         lambda road, folder: {"models": road.folder / "rm"}),
    case("a model as the reward model", "holds a gpt model, a scalar model is needed",
         lambda road, folder: {"reward_model": road.folder / "sft"}),
    case("an empty --against", "ckpt.pt does not exist", against=""),
    case("nobody to score", "give --judge or --reward_model", reward_model=""),
    # Prompts and baselines that leave no room.
    case("a limit below zero", "--limit -1: expected", limit=-1),
    case("prompts in a text file", "expected a name in .jsonl",
         lambda road, folder: {"prompts": write(folder, "p.txt", "cow?\n")}),
    case("a prompt without any room", "fills the whole context of 64",
         lambda road, folder: {"prompts": write(folder, "p.jsonl", [{"prompt": "cow? " * 99}])}),
    case("a courtesy without end", "--courtesy may end at token", courtesy="Of course! " * 99),
    case("a refusal without end", "--refusal may end at token", refusal="I refuse. " * 99),
    # Preferences.
    case("preferences without a reward model", "give --reward_model, too",
         lambda road, folder: {"preferences": road.preferences, "reward_model": "",
                               "judge": f"{road.tools}:judge"}),
    preferences("gold of another number", "row 1: expected gold as 2 numbers", gold=[1.0]),
    preferences("gold that is NaN", "expected numbers that JSON knows, found NaN",
                gold=[float("nan"), 1.0]),
    preferences("gold as text", "row 1: expected gold as 2 numbers", gold=["1.0", "0.5"]),
    preferences("gold that is one number", "row 1: expected gold as 2 numbers", gold=1.0),
    preferences("a temperature of zero", "a temperature above 0", temperature=0),
    preferences("a temperature that is missing", "a temperature above 0", temperature=None),
    preferences("a temperature that is a bool", "a temperature above 0", temperature=True),
    preferences("parts that are missing", "parts as 2 objects", parts=None),
    preferences("parts of other names", "parts as 2 objects",
                parts=[{"correct": 1.0}, {"manners": 0.5}]),
    preferences("parts that are no numbers", "parts as 2 objects", parts=[{"form": "x"}] * 2),
    preferences("ties only", "holds ties only", ranks=[0, 0]),
    # Where it is to write.
    case("no --out", "--out: expected a folder", out=""),
    case("--out is a file", "can't be a folder, since {folder}/eval is a file",
         lambda road, folder: {"out": write(folder, "eval", "mine")}),
    case("--out below a file", "can't be a folder, since {folder}/mine is a file",
         lambda road, folder: {"out": write(folder, "mine", "x") + "/eval"}),
    case("foreign results", "results.json exists, and minirlhf did not write it",
         foreign("results.json")),
    case("foreign results that are JSON", "results.json exists, and minirlhf did not write it",
         lambda road, folder: write(folder / "eval", "results.json", "[1]") and {}),
    case("foreign answers", "sft.jsonl exists, and minirlhf did not write it", foreign("sft.jsonl")),
    case("foreign answers of a baseline", "refuse_all.jsonl exists", foreign("refuse_all.jsonl")),
    case("a folder in place of the results", "{folder}/eval/results.json is a folder",
         lambda road, folder: (folder / "eval" / "results.json").mkdir(parents=True) or {}),
    case("a device in place of the answers", "is no ordinary file",
         lambda road, folder: (folder / "eval").mkdir() or os.symlink(
             "/dev/zero", folder / "eval" / "wrapper.jsonl") or {}),
]
