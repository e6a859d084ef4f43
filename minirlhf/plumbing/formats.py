"""JSONL in every accepted shape -> one canonical row each for demonstrations, preferences, prompts.

Data sets write the same thing in many ways. Every way is turned into one form here, once, so that
no training script has a branch on the input's format:

    read_demonstrations -> {"messages": [..., the assistant's answer], "meta"}
    read_preferences    -> {"messages": [..., the user's turn], "answers": [best, ..., worst],
                            "ranks": [0, 1, ...], "grades": K x K or None, "meta"}
    read_prompts        -> {"messages": [..., the user's turn], "answer": str or None, "meta"}
    read_samples        -> a prompt's row with "samples": [{"text", "ended", ...}, ...]
    read_documents      -> one text after the other, for the tokenizer and for pretraining

Files end in .jsonl or .jsonl.gz (text: also .txt or .txt.gz). Keys that a shape doesn't name are
kept under "meta". Anything else is refused with a UserError that says which file and line, what
was expected, what was found, and how to mend it. Guessing instead would train on garbage without
a word, and a row that is skipped in silence makes a count that nobody can explain later.

A conversation is a list of {"role", "content"}: an optional system message first, then user and
assistant in turn, starting with the user. White space at the edges of a content is dropped, however
the row was written: the template has tokens of its own for where a turn begins and ends, and an
answer that is preferred for its first space alone teaches nothing else.
"""
import json
import math
import re
from pathlib import Path

from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import parse_json, read_lines

PROMPT_KEYS = ("prompt", "messages", "query", "instruction")  # where a prompt may stand
SYSTEM_KEYS = ("system", "system_prompt")  # where its standing instruction may stand beside it
BESIDE = ("input", "history")  # what belongs to "instruction", and to nothing else
SHAPE_KEYS = (*PROMPT_KEYS, *BESIDE, "output", "chosen", "rejected", "text")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
          ("chosen_rating", "rejected_rating"))  # what data sets call a pair's two scores
GRADES = ("negligible", "slightly", "better", "significantly")  # Llama 2's four; index = grade
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
OWN_KEYS = {*SHAPE_KEYS, *SYSTEM_KEYS, *sum(SCORES, ()), "ranks", "grades", "rating", "label",
            "answer", "samples", "meta"}
END_OF_TEXT = "<|endoftext|>"  # what text corpora write between two documents
LONGEST = 2**14  # characters of a .txt file's document, which else might be the whole file


# ---------------------------------------------------------------- refusing, in one wording

def refuse(expected, found, mend):
    """Raise the one kind of error of this file; `read_each` puts file and line in front."""
    if not isinstance(found, str):
        found = json.dumps(found, ensure_ascii=False)
    found = " ".join(found.split())  # on one line, and a short one: it may hold a whole story
    found = found if len(found) <= 60 else found[:57] + "..."
    raise UserError(f"expected {expected}, found {found}; {mend}")


def checked_text(value, what):
    """`value` without white space at its edges, if it is a string that says something, else refuse.

    A list of text parts, {"type": "text", "text"}, counts as their texts, a line each.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "\n".join(text_of_part(part, what) for part in value)
    if not isinstance(value, str):
        refuse(f"{what} to be a string", value, "write it as text in double quotes")
    if not value.strip():
        refuse(f"{what} to have text in it", "none", "remove the row or fill it in")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a character, "\ud83d"; no file can hold it
        refuse(f"{what} to be whole characters", value.encode("ascii", "backslashreplace").decode(),
               "write the file again as UTF-8")
    return value.strip()


def text_of_part(part, what):
    """The text of one part of a content that is written as a list of parts."""
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        refuse(f"{what} in text parts only", part, "remove the row: no picture or tool is read")
    return part["text"]


def refuse_second(row, used):
    """Refuse a row that holds what a second shape would be read from, besides the keys `used`."""
    second = [key for key in SHAPE_KEYS if row.get(key) not in (None, "", []) and key not in used]
    if second:
        first = [key for key in used if key in row]
        refuse("one way of writing a row", f"{', '.join(second)} beside {', '.join(first)}",
               "remove what is not meant, or put it under meta")


def check_messages(messages, last):
    """Check a conversation and return it with the keys role and content only.

    `last` is the role that has to close it: "assistant" for a demonstration, "user" for a prompt.
    An assistant message that is marked as not to be trained keeps "train": False.
    """
    if not isinstance(messages, list) or not messages:
        refuse("messages as a list of {role, content}", messages, "wrap a lone message in a list")
    clean = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            refuse(f"message {number} with the keys role and content", message, "rename its keys")
        role, before = message["role"], clean[-1]["role"] if clean else None
        allowed = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        if role not in allowed:
            refuse(f"role {' or '.join(allowed)} in message {number}", role,
                   "user and assistant take turns, after at most one system message")
        content = checked_text(message["content"], f"the content of message {number}")
        clean.append({"role": role, "content": content})
        if not is_trained(message, number) and role == "assistant":
            clean[-1]["train"] = False  # of the other roles nothing is trained anyway
    if clean[-1]["role"] != last:
        refuse(f"the last message to be the {last}'s", clean[-1]["role"],
               "a demonstration ends with the assistant, a prompt with the user")
    return clean


def is_trained(message, number):
    """False where a message's "weight" or "train" says that its turn is to be read only."""
    marks = [message[key] for key in ("weight", "train") if key in message]
    for mark in marks:
        if mark not in (0, 1):  # True and 1.0 are equal to 1
            refuse(f"weight 0 or 1, or train true or false, in message {number}", mark,
                   "a turn is trained or it is not: there is nothing between")
    if len(set(map(bool, marks))) > 1:
        refuse(f"weight and train to agree in message {number}", marks, "remove one of the two")
    return all(marks)


def bare(messages):
    """Messages as a prompt has them, without "train": nothing of a prompt is trained."""
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ---------------------------------------------------------------- pieces that rows are made of

def is_transcript(value):
    """Whether `value` is a dialogue in hh-rlhf's way of writing, all turns in one string.

    A line "Human: ..." alone is none: some of hh-rlhf's answers begin so.
    """
    text = value.replace("\r\n", "\n") if isinstance(value, str) else ""
    return text.startswith("\n\nHuman:") or (
        text.lstrip().startswith("Human:") and "\n\nAssistant:" in text)


def transcript_messages(text):
    """"\\n\\nHuman: Hi\\n\\nAssistant: Hello" -> messages; white space around a turn is dropped.

    Two turns in a row of one speaker (hh-rlhf has them in one row of 300) count as one turn.
    """
    text = text.replace("\r\n", "\n").strip()
    # ["", role, content, role, content, ...]
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = []
    for speaker, content in zip(pieces[1::2], pieces[2::2]):
        role, content = HH_ROLES[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            content = (messages.pop()["content"] + "\n\n" + content).strip()
        messages.append({"role": role, "content": content})
    return messages


def instruction_messages(row):
    """The prompt of an {"instruction", "input", "history"} row; input and history are optional."""
    messages, history = [], row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            refuse("history as a list of [user, assistant]", pair, "give each turn its answer")
        messages += [{"role": "user", "content": pair[0]},
                     {"role": "assistant", "content": pair[1]}]
    text = checked_text(row["instruction"], "instruction")
    if is_transcript(text):
        refuse("one question under instruction", "a transcript", "rename the key to prompt")
    if row.get("input"):
        text += "\n" + checked_text(row["input"], "input")
    return check_messages(messages + [{"role": "user", "content": text}], last="user")


def with_system(messages, row):
    """Messages that begin with the standing instruction of the row's own key, if it has one."""
    for key in SYSTEM_KEYS:
        if row.get(key) in (None, ""):
            continue
        system = {"role": "system", "content": checked_text(row[key], key)}
        if messages[0]["role"] != "system":
            messages = [system, *messages]
        elif messages[0] != system:
            refuse(f"one system message, the same under {key}", "two that differ",
                   "remove one of the two")
    return messages


def prompt_messages(row):
    """The messages up to the user's last turn, found under exactly one of PROMPT_KEYS."""
    present = [key for key in PROMPT_KEYS if key in row]
    if len(present) != 1:
        refuse(f"exactly one of the keys {', '.join(PROMPT_KEYS)}", f"the keys {', '.join(row)}",
               "rename the key that holds the prompt, and remove a second one")
    value = row[present[0]]
    if present == ["instruction"]:
        return with_system(instruction_messages(row), row)
    if any(row.get(key) for key in BESIDE):
        refuse("input and history beside instruction only", f"the keys {', '.join(row)}",
               f"rename {present[0]}, or put the others under meta")
    if present == ["messages"]:
        messages = value
    elif is_transcript(value) or isinstance(value, str) and value.lstrip().startswith("Human:"):
        messages = transcript_messages(value)
        if len(messages) == 1 and re.search(r"\n(Human|Assistant):", messages[0]["content"]):
            refuse("a blank line before each speaker of a transcript", value, "write it so")
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # hh-rlhf's prompts end in "\n\nAssistant:", waiting for the answer
    else:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    return with_system(bare(check_messages(messages, last="user")), row)


def split_answer(value):
    """(context, answer) of one candidate; context is None where the candidate is the answer alone.

    A candidate is a string, one assistant message, a list of messages or a whole transcript.
    """
    if isinstance(value, str) and not is_transcript(value):
        return None, checked_text(value, "the answer")
    messages = transcript_messages(value) if is_transcript(value) else value
    messages = [messages] if isinstance(messages, dict) else messages
    alone = isinstance(messages, list) and len(messages) == 1
    if alone:  # a question put in front lets the same check look at it
        messages = [{"role": "user", "content": "?"}, *messages]
    messages = check_messages(messages, last="assistant")
    if "train" in messages[-1]:
        refuse("answers to be compared", "one that is marked as not to be trained",
               "remove the row, or the mark")
    return None if alone else bare(messages[:-1]), messages[-1]["content"]


def grade_number(value):
    """Llama 2's four grades, by name or as 3, 2, 1, 0 -> int, 3 = significantly better."""
    if isinstance(value, str) and value in GRADES:
        return GRADES.index(value)
    if type(value) is not int or not 0 <= value <= 3:  # `True` is an int to isinstance
        refuse(f"a grade, one of {', '.join(GRADES)} or 0 to 3", value, "map your scale to these")
    return value


def grade_table(row, K):
    """K x K ints: [i][j] says by how much answer i beats answer j, 0 unless i < j; or None."""
    if "rating" in row:
        if K != 2 or "grades" in row:
            refuse("rating on a pair and grades on a longer list", f"the keys {', '.join(row)}",
                   "remove one of the two")
        if not isinstance(row["rating"], str):  # 1 is the lowest of five stars, or "slightly"
            refuse(f"rating as one of the names {', '.join(GRADES)}", row["rating"],
                   "a number doesn't say on what scale it is: write the name, or rename the key")
        return [[0, grade_number(row["rating"])], [0, 0]]
    grades = row.get("grades")
    if grades is None:
        return None
    square = isinstance(grades, list) and len(grades) == K and all(
        isinstance(line, list) and len(line) == K for line in grades)
    if not square:
        refuse(f"grades as {K} lists of {K}", grades, "give one row and one column an answer")
    # Answers are sorted best first, so whatever stands on or below the diagonal says nothing new.
    return [[grade_number(grades[i][j]) if i < j else 0 for j in range(K)] for i in range(K)]


def ranks_of(row, K):
    """K ints from 0 on that never fall, equal where two answers tie: of "ranks", or of a pair's two
    scores; without either the order alone counts."""
    ranks = row.get("ranks", list(range(K)))
    if (not isinstance(ranks, list) or len(ranks) != K or any(type(r) is not int for r in ranks)
            or ranks != sorted(ranks) or ranks[0] < 0 or ranks[-1] >= 2**63):
        # In the loss a rank of -1 means that there is no answer.
        refuse(f"ranks as {K} whole numbers from 0 on that never fall", ranks,
               "put the best answer first")
    for better, worse in SCORES:
        scores = [row.get(better), row.get(worse)]
        if "chosen" not in row or scores == [None, None]:
            continue
        if any(type(score) not in (int, float) or not math.isfinite(score) for score in scores):
            refuse(f"{better} and {worse} as two numbers", scores, "write both, or neither")
        if scores[0] < scores[1]:
            refuse(f"{better} of at least {worse}", scores,
                   "the pair contradicts itself: exchange its answers, or remove it")
        tie = scores[0] == scores[1]
        if "ranks" in row and tie != (ranks[0] == ranks[1]):
            refuse(f"ranks that agree with {better} and {worse}", [ranks, scores],
                   "remove what is wrong")
        ranks = [0, 0] if tie else ranks
    return ranks


def meta_of(row, used):
    """What is left of a row: its own "meta", and every key that the shape doesn't name."""
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        refuse("meta as an object", meta, 'write it as {"name": value}')
    return {**meta, **{key: row[key] for key in row if key != "meta" and key not in used}}


# ---------------------------------------------------------------- one row in, one canonical row out

def parse_demonstration(row):
    """{"messages"} or {"instruction", "input", "output", "history"} -> {"messages", "meta"}."""
    if row.get("label") in (False, "false", "False"):
        refuse("answers worth imitating", f'"label": {json.dumps(row["label"])}', "remove the row, "
               "if the label marks what nobody should say, as in data for KTO; else rename the key")
    if "messages" in row:
        messages, used = check_messages(row["messages"], last="assistant"), ("messages",)
        prompt = row.get("prompt")
        if isinstance(prompt, str) and {"role": "user", "content": prompt.strip()} in messages:
            used = ("messages", "prompt")  # some data sets give the question once more
    elif "instruction" in row and "output" in row:
        answer = {"role": "assistant", "content": checked_text(row["output"], "output")}
        messages = instruction_messages(row) + [answer]
        used = ("instruction", "output", *BESIDE)
    else:
        refuse("the key messages, or instruction and output", f"the keys {', '.join(row)}",
               "rename the keys")
    refuse_second(row, used)
    if all("train" in message for message in messages if message["role"] == "assistant"):
        refuse("a turn that is to be trained", "none", "remove the row, or a mark of its messages")
    return {"messages": with_system(messages, row), "meta": meta_of(row, (*used, *SYSTEM_KEYS))}


def parse_preference(row):
    """A pair ("chosen", "rejected") or a list ("output", best first) -> the canonical preference.

    The prompt stands under one of PROMPT_KEYS, or every answer is a whole conversation that brings
    it along. If several bring it along they have to agree: scores of answers to *different*
    prompts can't be compared. "ranks" marks ties by equal numbers, a pair's two scores do, too.
    """
    used = ["ranks", "grades", "rating", *PROMPT_KEYS, *SYSTEM_KEYS]
    used += BESIDE if "instruction" in row else []
    if "chosen" in row and "rejected" in row:
        candidates, used = [row["chosen"], row["rejected"]], used + ["chosen", "rejected"]
        # A text under "output" is a further answer, which nobody has compared: one more key.
        refuse_second(row, used + ["output"] * isinstance(row.get("output"), str))
    elif isinstance(row.get("output"), list) and len(row["output"]) >= 2:
        candidates, used = row["output"], used + ["output"]
        refuse_second(row, used)
    else:
        refuse("chosen and rejected, or output as a list of two or more answers, best first",
               f"the keys {', '.join(row)}", "rename the keys, or drop rows with one answer")
    prompts = [prompt_messages(row)] if any(key in row for key in PROMPT_KEYS) else []
    contexts, answers = zip(*[split_answer(candidate) for candidate in candidates])
    if not prompts and None in contexts:
        refuse(f"a prompt under {', '.join(PROMPT_KEYS)}, or every answer as a whole conversation",
               f"the keys {', '.join(row)}", "add the prompt")
    prompts += [with_system(context, row) for context in contexts if context is not None]
    if any(prompt != prompts[0] for prompt in prompts):
        refuse("the same conversation before every answer", "two that differ",
               "remove the row (data/hh_rlhf/prepare.py does so and counts them)")
    K = len(answers)
    return {"messages": prompts[0], "answers": list(answers), "ranks": ranks_of(row, K),
            "grades": grade_table(row, K), "meta": meta_of(row, used)}


def parse_prompt(row):
    """A prompt under one of PROMPT_KEYS, perhaps an "answer" -> {"messages", "answer", "meta"}.

    Rows of preferences and of instructions are prompts as well: their answers become meta.
    """
    messages, answer = prompt_messages(row), row.get("answer")
    if answer is not None:
        answer = checked_text(answer, "answer")
    used = (*PROMPT_KEYS, *SYSTEM_KEYS, *(BESIDE if "instruction" in row else ()), "answer")
    return {"messages": messages, "answer": answer, "meta": meta_of(row, used)}


def parse_samples(row):
    """A row that sample.py wrote; a sampled text may be empty, when the model ended at once."""
    prompt = parse_prompt(row)
    samples = prompt["meta"].pop("samples", None)
    good = isinstance(samples, list) and samples and all(
        isinstance(sample, dict) and isinstance(sample.get("text"), str)
        and isinstance(sample.get("ended"), bool) for sample in samples)
    if not good:
        refuse('samples as a list of {"text": string, "ended": true or false}', samples,
               "write the file with sample.py --num_samples")
    return {**prompt, "samples": samples}


# ---------------------------------------------------------------- files

def refuse_name(path, expected):
    """Refuse a file by the end of its name, and say what becomes of that kind."""
    name = Path(path).name
    mend = {".json": "write its objects as .jsonl, one a line",
            ".csv": "write each line as a JSON object, in .jsonl",
            ".tsv": "write each line as a JSON object, in .jsonl",
            ".parquet": "export it as .jsonl", ".arrow": "export it as .jsonl",
            ".xlsx": "export it as .jsonl", ".zip": "unpack it", ".bz2": "unpack it",
            ".xz": "unpack it", ".zst": "unpack it", ".tar": "unpack it", ".tgz": "unpack it"}
    kind = Path(name.lower().removesuffix(".gz")).suffix
    raise UserError(f"{path}: expected a name in {expected}, or these with .gz; "
                    f"{mend.get(kind, 'rename or convert it')}")


def read_rows(path):
    """Yield (line number, object) of a JSONL file; blank lines are passed over."""
    if not str(path).endswith((".jsonl", ".jsonl.gz")):
        refuse_name(path, ".jsonl")
    found = 0
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if not found and line.lstrip().startswith("["):
            raise UserError(f"{path}, line {number}: expected one JSON object a line, found the "
                            "beginning of a list; write its objects one a line, without brackets "
                            "and commas around them")
        try:
            row = parse_json(line)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}; each line has to be a whole JSON "
                            "object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found a "
                            f"{type(row).__name__}; write the row as {{...}}")
        found += 1
        yield number, row
    if found == 0:
        raise UserError(f"{path}: expected rows, found blank lines only; write it again")


def parse_each(path, parse):
    """Yield every row of a JSONL file through `parse`; an error is given its file and line."""
    for number, row in read_rows(path):
        try:
            parsed = parse(row)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except RecursionError:  # deep enough to be read, too deep to be shown
            raise UserError(f"{path}, line {number}: lists or objects are nested too deeply; write "
                            "the row as plain text and messages") from None
        yield parsed


def read_demonstrations(path):
    """Demonstrations for SFT; see `parse_demonstration`."""
    return list(parse_each(path, parse_demonstration))


def read_preferences(path):
    """Preferences for the reward model and DPO; see `parse_preference`."""
    return list(parse_each(path, parse_preference))


def read_prompts(path):
    """Prompts for sampling and PPO; see `parse_prompt`."""
    return list(parse_each(path, parse_prompt))


def read_samples(path):
    """Samples that sample.py wrote, for annotators and best-of-K; see `parse_samples`."""
    return list(parse_each(path, parse_samples))


def text_lines(text):
    """The lines of a text whose line ends may be those of any system, "\\n", "\\r\\n" or "\\r"."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def as_document(text):
    """`text` without blank lines, because a blank line is what separates two documents."""
    return "\n".join(line for line in text_lines(text) if line.strip())


def row_texts(row, dialogues):
    """The texts of a JSONL row: its document under "text", or, where `dialogues` are wanted, the
    contents of a demonstration's, a preference's or a prompt's messages and answers."""
    if "text" in row or not dialogues:
        checked_text(row.get("text"), 'the key "text"')
        refuse_second(row, ("text",))
        return [as_document(row["text"])]
    if "chosen" in row or "rejected" in row or isinstance(row.get("output"), list):
        parsed = parse_preference(row)
    elif "output" in row or isinstance(row.get("messages"), list) and row["messages"] and (
            isinstance(row["messages"][-1], dict)
            and row["messages"][-1].get("role") == "assistant"):
        parsed = parse_demonstration(row)
    else:
        parsed = parse_prompt(row)
    return [message["content"] for message in parsed["messages"]] + parsed.get("answers", [])


def read_documents(path, dialogues=False):
    """Yield the documents of a text file, one by one, none with a blank line in it.

    Both the tokenizer and pretraining read through this, so that they mean the same text. In a .txt
    file "<|endoftext|>" separates documents, or, where that does not occur, a blank line; then
    one of more than LONGEST characters is cut at the end of a line, lest a file without blank
    lines has to fit into memory. Of JSONL, the string under "text" is one document. dialogues:
    rows of messages, instructions and preferences count, too, each content as a text.
    """
    found = False
    if str(path).endswith((".jsonl", ".jsonl.gz")):
        documents = (text for texts in parse_each(path, lambda row: row_texts(row, dialogues))
                     for text in texts)
    elif str(path).endswith((".txt", ".txt.gz")):
        marked = any(END_OF_TEXT in line for _, line in read_lines(path))
        documents = marked_documents(path) if marked else paragraphs(path)
    else:
        refuse_name(path, ".txt or .jsonl")
    for document in documents:
        if document:
            found = True
            yield document
    if not found:
        raise UserError(f"{path}: expected text, found white space only; write it again")


def marked_documents(path):
    """Yield what stands between two "<|endoftext|>", perhaps nothing."""
    lines = []
    for _, line in read_lines(path):
        *finished, rest = line.split(END_OF_TEXT)
        for piece in finished:
            yield as_document("\n".join([*lines, piece]))
            lines = []
        lines.append(rest)
    yield as_document("\n".join(lines))


def paragraphs(path):
    """Yield what stands between two blank lines, in pieces of about LONGEST characters at most."""
    lines, size = [], 0
    for _, whole in read_lines(path):
        for line in text_lines(whole):
            if not line.strip() or size > LONGEST:
                yield "\n".join(lines)
                lines, size = [], 0
            if line.strip():
                lines.append(line)
                size += len(line)
    yield "\n".join(lines)


def read_text(path):
    """All documents of a text file as one string, separated by blank lines."""
    return "\n\n".join(read_documents(path)) + "\n"


def spread_meta(row):
    """The inverse of `meta_of`, for writing: a canonical row's meta back beside its other keys.

    What a reader would take for the row's own (a "prompt" beside "messages") stays under "meta".
    """
    meta = row.get("meta", {})
    kept = {key: meta[key] for key in meta if key in OWN_KEYS}
    rest = {key: meta[key] for key in meta if key not in OWN_KEYS}
    return {**rest, **{key: row[key] for key in row if key != "meta"},
            **({"meta": kept} if kept else {})}
