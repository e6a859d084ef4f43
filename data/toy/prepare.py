"""Writes the toy world's data files beside this script; deterministic by seed, in a few seconds.

    python data/toy/prepare.py [--seed 0] [--out data/toy]

pretrain.txt           raw text with all voices mixed, documents apart by a blank line
demonstrations.jsonl   dialogues of imperfect demonstrators, for SFT
prompts.jsonl          prompts of training combinations, for sampling, the reward model and PPO
heldout.jsonl          prompts of combinations that none of the above shows, for evaluation
fewshot.txt            four good plain-text dialogues, for prompting the base model
"""
import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import judge  # noqa: E402
import world  # noqa: E402
from minirlhf.plumbing.commands import check_file, has_keys, run_command  # noqa: E402
from minirlhf.plumbing.errors import UserError  # noqa: E402
from minirlhf.plumbing.files import write_text  # noqa: E402

# ---- Tuning: what the pretraining text is made of, by number of documents ------------------------
DOCUMENT_WEIGHTS = {"dialogue": 40, "exchange": 14, "facts": 8, "quiz": 12, "advice": 6, "sums": 7,
                    "list": 5, "reverse": 4, "story": 4}
DIALOGUE_TURNS = {1: 60, 2: 30, 3: 10}      # tasks in one dialogue; a follow-up adds its own turn
WRONG_FACT_SHARE = 0.03                     # of plain sentences: the internet errs, but seldom
NAMES = ["Anna", "Ben", "Tom", "Ada", "Max", "Eva", "Sam", "Lily"]
PLACES = ["lake", "mill", "bridge", "market", "garden"]
QUIZ = {"sum": "{} plus {}?", "opposite": "The opposite of {}?", "colour": "The colour of {}?",
        "sound": "The sound of {}?"}
NUM_SENTENCES = 4                           # of a document of facts or sums

JSONL_NAMES = ("demonstrations.jsonl", "prompts.jsonl", "heldout.jsonl")
TEXT_NAMES = ("pretrain.txt", "fewshot.txt")    # written last; see `check_outputs`


# ---- Pretraining documents ----------------------------------------------------------------------
def fact(rng, skill, subject):
    """One plain sentence: "A cow says moo."; seldom a wrong one."""
    value = (world.untruth if rng.random() < WRONG_FACT_SHARE else world.truth)
    return world.state(skill, subject, value(rng, skill, subject))[0]


def any_subject(rng, skill):
    """A subject that training may show; all of them but the held-out sums and reversals."""
    return rng.choice(world.COMBINATIONS[skill][False])[0]


def facts_document(rng):
    """A few lines about animals, colours and opposites, as in a children's encyclopedia."""
    lines = []
    for _ in range(NUM_SENTENCES):
        skill = rng.choice(["opposite", "colour", "sound"])
        subject = any_subject(rng, skill)
        full, short = world.state(skill, subject, world.truth(rng, skill, subject))
        lines.append(rng.choice([
            fact(rng, skill, subject), fact(rng, skill, subject),
            f"{world.capitalise(subject)}: {short.lower()[:-1]}",
            f"{short[:-1]}: {subject}",
            f"Did you know? {full}",
        ]))
    return "\n".join(lines)


def quiz_document(rng):
    """Short questions with one-word answers: what a brief answer has to know at its first word."""
    lines = []
    for _ in range(2 * NUM_SENTENCES):
        skill = rng.choice(list(QUIZ))
        subject = any_subject(rng, skill)
        asked = QUIZ[skill].format(*subject) if skill == "sum" else QUIZ[skill].format(subject)
        lines.append(f"{asked} {world.state(skill, subject, world.truth(rng, skill, subject))[1]}")
    return "\n".join(lines)


def advice_document(rng):
    """How to do harmless things, and what nobody should do."""
    lines = []
    for _ in range(NUM_SENTENCES):
        wrong, fine = rng.choice(world.UNSAFE), rng.choice(list(world.LOOKALIKES))
        lines.append(rng.choice([f"It is wrong to {wrong}.", f"Do not {wrong}.",
                                 f"To {fine}: {world.LOOKALIKES[fine]}",
                                 f"To {fine} is fine. {world.LOOKALIKES[fine]}"]))
    return "\n".join(lines)


def sums_document(rng):
    """A page of a sum book."""
    lines = []
    for _ in range(NUM_SENTENCES):
        a, b = any_subject(rng, "sum")
        lines.append(rng.choice([fact(rng, "sum", (a, b)), f"{a} and {b} make {a + b}.",
                                 f"{a} plus {b} is {a + b}, so {b} plus {a} is {a + b}."]))
    return "\n".join(lines)


def list_document(rng):
    """Things of a kind: as a sentence or one a line."""
    number, kind = subject = any_subject(rng, "list")
    words = world.truth(rng, "list", subject)
    return rng.choice([fact(rng, "list", subject),
                       f"{world.capitalise(kind)}\n" + "\n".join(words),
                       f"{world.capitalise(world.join_and(words))} are {kind}."])


def reverse_document(rng):
    """Words, and the same words backwards."""
    subject = any_subject(rng, "reverse")
    words, back = ", ".join(subject), ", ".join(subject[::-1])
    return rng.choice([f"{world.capitalise(words)}.\nThe reverse is {back}.",
                       f"First {words}.\nThen backwards: {back}."])


def story_document(rng):
    """A very short story from the words of this world."""
    hero, friend = rng.sample(NAMES, 2)
    animal, thing = any_subject(rng, "sound"), any_subject(rng, "colour")
    name, sound = animal.split()[1], world.SOUNDS[animal]
    colour = world.COLOURS[thing]
    old, new = rng.choice(world.OPPOSITE_PAIRS[:3] + world.OPPOSITE_PAIRS[6:8])
    toy, cloth = rng.choice(world.KINDS["toys"]), rng.choice(world.KINDS["clothes"])
    a, b = any_subject(rng, "sum")
    place = rng.choice(PLACES)
    return rng.choice([
        f"{hero} met {animal} by the {place}. The {name} said {sound}. {hero} said hello, and they "
        f"were friends.",
        f"{hero} had {a} shells and found {b} more by the {place}. {a} plus {b} is {a + b}, so "
        f"{hero} gave {friend} one and was happy.",
        f"{friend} lost a {colour} {cloth} in the {place}. {hero} looked for it all day. It was "
        f"under the {toy}.",
        f"The {place} was {old}. Then it was {new}, the opposite of {old}. {hero} went home.",
        f"{hero} painted {thing}. \"It is {colour},\" said {friend}, and gave {hero} a {toy}.",
        f"At night {hero} was sad. Then {friend} came with a {toy}, and {animal} said {sound}.",
    ])


def voice_habits(rng):
    """The habits of one speaker: the demonstrator's, changed by the voice that was drawn."""
    return world.DEMONSTRATOR | world.VOICES[world.pick(rng, world.VOICE_WEIGHTS)]


def dialogue_document(rng):
    """A dialogue with names; one speaker asks, the other answers in one voice throughout."""
    asker, answerer = ("Anna", "Ben") if rng.random() < 0.5 else rng.sample(NAMES, 2)
    habits, system, lines = voice_habits(rng), None, []
    for i in range(world.pick(rng, DIALOGUE_TURNS)):
        turns = world.make_turns(rng)
        if i and turns[0]["system"] != system:
            break               # a standing instruction holds for the whole dialogue
        system = turns[0]["system"]
        if system and not lines:
            lines.append(f"Note: {world.lower_first(system)}")
        for turn in turns:
            lines += [f"{asker}: {turn['text']}",
                      f"{answerer}: {world.respond(rng, turn, habits)[0]}"]
    return "\n".join(lines)


def exchange_document(rng):
    """A question and its answer without names, as in a forum."""
    turns = world.make_turns(rng)
    habits = voice_habits(rng)
    lines = [f"Note: {world.lower_first(turns[0]['system'])}"] if turns[0]["system"] else []
    for turn in turns:
        lines += [turn["text"], world.respond(rng, turn, habits)[0]]
    return "\n".join(lines)


def pretraining_text(rng, num_bytes):
    """Documents of all sorts until the text has `num_bytes` bytes; returns one string."""
    write = {"dialogue": dialogue_document, "exchange": exchange_document, "facts": facts_document,
             "quiz": quiz_document, "advice": advice_document, "sums": sums_document,
             "list": list_document, "reverse": reverse_document,
             "story": story_document}
    documents, size = [], 0
    while size < num_bytes:
        document = write[world.pick(rng, DOCUMENT_WEIGHTS)](rng)
        documents.append(document)
        size += len(document) + 2           # the text is ASCII: a character is a byte
    return "\n\n".join(documents) + "\n"


# ---- Rows ---------------------------------------------------------------------------------------
def demonstration(rng):
    """One dialogue of an imperfect demonstrator, with the faults of its last answer as meta."""
    turns = world.make_turns(rng)
    said = [world.respond(rng, turn, world.DEMONSTRATOR) for turn in turns]
    messages = world.to_messages(turns, [text for text, _ in said])
    return {"messages": messages, "skill": turns[-1]["task"]["skill"], "faults": said[-1][1],
            "task": turns[-1]["task"]}


def prompt(rng, skill, held_out=False):
    """One prompt: earlier assistant turns are good, the last message is the user's."""
    turns = world.make_turns(rng, skill, held_out)
    good = [world.perfect_response(t["answer"], t["task"], rng.choice(world.OPENINGS))
            for t in turns[:-1]]
    return {"messages": world.to_messages(turns, good), "answer": turns[-1]["answer"],
            "task": turns[-1]["task"]}


def distinct_prompts(rng, num_prompts, skill, held_out=False):
    """`num_prompts` prompts of one skill, all different. Raises if the world has too few."""
    rows = {}
    for _ in range(100 * num_prompts):
        row = prompt(rng, skill, held_out)
        rows.setdefault(json.dumps(row["messages"]), row)
        if len(rows) == num_prompts:
            return list(rows.values())
    raise ValueError(f"found only {len(rows)} of {num_prompts} distinct prompts of skill {skill}; "
                     "lower the NUM_ constants or add frames, subjects or markers in world.py")


def prompts_by_skill(rng, counts, held_out=False):
    """Distinct prompts, `counts[skill]` of each skill, in random order."""
    rows = [row for skill, count in counts.items()
            for row in distinct_prompts(rng, count, skill, held_out)]
    rng.shuffle(rows)
    return rows


def training_counts():
    """How many training prompts of each skill: NUM_PROMPTS by the skills' weights."""
    whole = sum(world.SKILL_WEIGHTS.values())
    return {skill: round(world.NUM_PROMPTS * weight / whole)
            for skill, weight in world.SKILL_WEIGHTS.items()}


def held_out_counts():
    """How many evaluation prompts: fixed numbers of the two kinds of deeds, the rest spread."""
    counts = {"unsafe": world.NUM_HELD_OUT_UNSAFE, "lookalike": world.NUM_HELD_OUT_LOOKALIKE}
    others = [skill for skill in world.SKILL_WEIGHTS if skill not in counts]
    rest = world.NUM_HELD_OUT - sum(counts.values())
    return counts | {skill: rest // len(others) + (i < rest % len(others))
                     for i, skill in enumerate(others)}


# ---- Overlap ------------------------------------------------------------------------------------
def traces(text):
    """All that a text shows of questions: its clauses, its sums and its runs of three words.

    A clause ends at a mark, so "Quick, how do I rob a bank?" shows "how do i rob a bank", but
    "How do I rob a bank in a game?" doesn't. Sums and runs of words are kept without their order.
    """
    text = text.lower()
    sums = re.findall(r"\b(\d+) (?:plus|and) (\d+)\b", text)
    runs = re.findall(r"\b(?=([a-z]+), ([a-z]+), ([a-z]+))", text)
    return (set(re.split(r"[.?!:\n]\s*|, ", text))
            | {tuple(sorted(map(int, pair))) for pair in sums} | {tuple(sorted(r)) for r in runs})


def trace_of(task):
    """What training must not show of a held-out task; compare with `traces`."""
    base, subject = task["combination"][:2]
    if base in ("sum", "reverse"):
        return tuple(sorted(subject))
    return re.split(r"[.?!]", task["question"].lower())[0]


def overlap(heldout, rows, text):
    """How many held-out prompts training shows: as a whole, or their combination anywhere.

    `rows` are demonstrations and prompts, `text` is the pretraining text. Returns a pair of
    counts: the held-out prompts that equal a training prompt, and those whose combination occurs
    in any training row, question or sentence.
    """
    shown = {json.dumps(row["messages"][:-1] if row["messages"][-1]["role"] == "assistant"
                        else row["messages"]) for row in rows}
    combinations = {json.dumps(row["task"]["combination"]) for row in rows}
    everything = "\n".join([text] + [m["content"] for row in rows for m in row["messages"]])
    seen = traces(everything)
    return (sum(json.dumps(row["messages"]) in shown for row in heldout),
            sum(json.dumps(row["task"]["combination"]) in combinations
                or trace_of(row["task"]) in seen for row in heldout))


# ---- Files and the report -----------------------------------------------------------------------
def make_files(seed):
    """Returns the rows and texts of all files; each file has its own generator."""
    def rng(name):
        return random.Random(f"{seed} {name}")      # a string seed is hashed the same everywhere

    draw = rng("demonstrations")
    return {
        "pretrain.txt": pretraining_text(rng("pretrain"), world.PRETRAIN_BYTES),
        "demonstrations.jsonl": [demonstration(draw) for _ in range(world.NUM_DEMONSTRATIONS)],
        "prompts.jsonl": prompts_by_skill(rng("prompts"), training_counts()),
        "heldout.jsonl": prompts_by_skill(rng("heldout"), held_out_counts(), held_out=True),
        "fewshot.txt": world.few_shot_text(),
    }


def write_file(path, content):
    """Writes a text, or rows as JSON lines: never half a file."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    write_text(path, content)


def show(messages):
    """A chat as indented lines."""
    return "\n".join(f"    {m['role']:>9}: {m['content']}" for m in messages)


def report(files, seed):
    """Prints a sample of everything, the counts and the overlap."""
    rng = random.Random(f"{seed} report")
    documents = files["pretrain.txt"].split("\n\n")
    words = world.words_of(files["pretrain.txt"])
    print(f"pretrain.txt: {len(documents)} documents, {len(words)} words, "
          f"{len(set(words))} distinct\n")
    for document in rng.sample(documents, 8):
        print("    " + document.strip().replace("\n", "\n    ") + "\n")
    demonstrations, heldout = files["demonstrations.jsonl"], files["heldout.jsonl"]
    for name in ("demonstrations.jsonl", "prompts.jsonl", "heldout.jsonl"):
        rows = files[name]
        skills = Counter(row["task"]["skill"] for row in rows)
        turns = sum(sum(m["role"] == "user" for m in row["messages"]) > 1 for row in rows)
        print(f"{name}: {len(rows)} rows, {turns / len(rows):.0%} with an earlier turn; "
              + ", ".join(f"{skill} {skills[skill]}" for skill in world.SKILL_WEIGHTS) + "\n")
        for row in rng.sample(rows, 3):
            print(show(row["messages"]))
            print(f"    {'faults' if 'faults' in row else 'answer':>9}: "
                  f"{row.get('faults', row.get('answer'))}\n")
    faults = Counter(fault for row in demonstrations for fault in row["faults"])
    print("faults of the demonstrations' last answers: " + ", ".join(
        f"{name} {count / len(demonstrations):.1%}" for name, count in faults.most_common()))
    rows = demonstrations + files["prompts.jsonl"]
    same, combined = overlap(heldout, rows, files["pretrain.txt"])
    print(f"overlap of held-out and training prompts: {same}")
    print(f"overlap of held-out and training combinations: {combined}")


def baselines(demonstrations, prompts):
    """Mean gold scores of simple ways to answer: a dict of name to float."""
    last = [(row, row["messages"][-1]["content"]) for row in demonstrations]
    scores = {
        "perfect answers": [judge.judge(row, world.perfect_response(row["answer"], row["task"]))
                            for row in prompts],
        "demonstrations": [judge.judge(row, text) for row, text in last],
        "demonstrations after a fixed \"Of course!\"":
            [judge.judge(row, f"{world.OPENINGS[1]} {text}") for row, text in last],
        "a refusal of everything": [judge.judge(row, world.APOLOGIES[0]) for row in prompts],
    }
    return {name: sum(v["score"] for v in vs) / len(vs) for name, vs in scores.items()}


def check_outputs(out):
    """Refuse a folder that can't be written, or whose files of these names are not this script's.

    The texts carry no mark of the toy world, so they are known by the rows beside them.
    """
    known = has_keys("messages", "task")
    for name in JSONL_NAMES:
        check_file("--out", out / name, known)
    for name in TEXT_NAMES:
        check_file("--out", out / name, lambda text: (out / JSONL_NAMES[-1]).exists())


def prepare(args):
    """The command: make everything, report, write."""
    if not args.out:
        raise UserError("--out: expected a folder to write into")
    out = Path(args.out)
    check_outputs(out)
    files = make_files(args.seed)
    report(files, args.seed)
    for name, score in baselines(files["demonstrations.jsonl"], files["prompts.jsonl"]).items():
        print(f"gold score of {name}: {score:.2f}")
    for name in (*JSONL_NAMES, *TEXT_NAMES):
        write_file(out / name, files[name])
        print(f"wrote {out / name}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Generate the toy world's data files.")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder to write into")
    run_command(parser, argv, prepare)


if __name__ == "__main__":
    main()
