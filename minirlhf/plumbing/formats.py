"""JSONL in every accepted shape -> one canonical row each for demonstrations, preferences, prompts.

Data sets write the same thing in many ways. Every way is turned into one form here, once, so that
no training script has a branch on the input's format:

    read_demonstrations -> {"messages": [..., the assistant's answer], "meta"}
    read_preferences    -> {"messages": [..., the user's turn], "answers": [best, ..., worst],
                            "ranks": [0, 1, ...], "grades": K x K or None, "meta"}
    read_prompts        -> {"messages": [..., the user's turn], "answer": str or None, "meta"}
    read_samples        -> a prompt's row with "samples": [{"text", "ended", ...}, ...]
    read_text           -> one string, its documents separated by blank lines

Files end in .jsonl or .jsonl.gz (text: also .txt or .txt.gz). Keys that a shape doesn't name are
kept under "meta". Anything else is refused with a UserError that says which file and line, what
was expected, what was found, and how to mend it. Guessing instead would train on garbage without
a word, and a row that is skipped in silence makes a count that nobody can explain later.

A conversation is a list of {"role", "content"}: an optional system message first, then user and
assistant in turn, starting with the user.
"""
import json
import re

from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import read_lines

PROMPT_KEYS = ("prompt", "messages", "query", "instruction")  # where a preference keeps its prompt
GRADES = ("negligible", "slightly", "better", "significantly")  # Llama 2's four; index = grade
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
OWN_KEYS = {"messages", "prompt", "instruction", "input", "output", "history", "query", "chosen",
            "rejected", "ranks", "grades", "rating", "answer", "samples", "meta"}
END_OF_TEXT = "<|endoftext|>"  # what text corpora write between two documents


# ---------------------------------------------------------------- refusing, in one wording

def refuse(expected, found, mend):
    """Raise the one kind of error of this file; `read_each` puts file and line in front."""
    if not isinstance(found, str):
        found = json.dumps(found, ensure_ascii=False)
    found = " ".join(found.split())  # on one line, and a short one: it may hold a whole story
    found = found if len(found) <= 60 else found[:57] + "..."
    raise UserError(f"expected {expected}, found {found}; {mend}")


def checked_text(value, what):
    """Return `value` if it is a string with something in it that UTF-8 can hold, else refuse."""
    if not isinstance(value, str):
        refuse(f"{what} to be a string", value, "write it as text in double quotes")
    if not value.strip():
        refuse(f"{what} to have text in it", "none", "remove the row or fill it in")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a character, "\ud83d"; no file can hold it
        refuse(f"{what} to be whole characters", value.encode("ascii", "backslashreplace").decode(),
               "write the file again as UTF-8")
    return value


def check_messages(messages, last):
    """Check a conversation and return it with the keys role and content only.

    `last` is the role that has to close it: "assistant" for a demonstration, "user" for a prompt.
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
    if clean[-1]["role"] != last:
        refuse(f"the last message to be the {last}'s", clean[-1]["role"],
               "a demonstration ends with the assistant, a prompt with the user")
    return clean


# ---------------------------------------------------------------- pieces that rows are made of

def is_transcript(value):
    """Whether `value` is a dialogue in hh-rlhf's way of writing, all turns in one string."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def transcript_messages(text):
    """"\\n\\nHuman: Hi\\n\\nAssistant: Hello" -> messages; white space around a turn is dropped.

    Two turns in a row of one speaker (hh-rlhf has them in one row of 300) count as one turn.
    """
    pieces = re.split(r"\n\n(Human|Assistant):", text)  # ["", role, content, role, content, ...]
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
    if row.get("input"):
        text += "\n" + checked_text(row["input"], "input")
    return check_messages(messages + [{"role": "user", "content": text}], last="user")


def prompt_messages(row, keys):
    """The messages up to the user's last turn, found under exactly one of `keys`."""
    present = [key for key in keys if key in row]
    if len(present) != 1:
        refuse(f"exactly one of the keys {', '.join(keys)}", f"the keys {', '.join(row)}",
               "rename the key that holds the prompt, and remove a second one")
    value = row[present[0]]
    if present == ["instruction"]:
        return instruction_messages(row)
    if is_transcript(value):
        messages = transcript_messages(value)
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # hh-rlhf's prompts end in "\n\nAssistant:", waiting for the answer
    elif isinstance(value, str) and present != ["messages"]:
        messages = [{"role": "user", "content": value}]
    else:
        messages = value
    return check_messages(messages, last="user")


def split_answer(value):
    """(context, answer) of one candidate; context is None where the candidate is the answer alone.

    A candidate is a string, one assistant message, a list of messages or a whole transcript.
    """
    if isinstance(value, str) and not is_transcript(value):
        return None, checked_text(value, "the answer")
    messages = transcript_messages(value) if is_transcript(value) else value
    messages = [messages] if isinstance(messages, dict) else messages
    if isinstance(messages, list) and len(messages) == 1:
        # The answer alone: a question put in front lets the same check look at it.
        question = [{"role": "user", "content": "?"}]
        return None, check_messages(question + messages, last="assistant")[-1]["content"]
    messages = check_messages(messages, last="assistant")
    return messages[:-1], messages[-1]["content"]


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


def meta_of(row, used):
    """What is left of a row: its own "meta", and every key that the shape doesn't name."""
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        refuse("meta as an object", meta, 'write it as {"name": value}')
    return {**meta, **{key: row[key] for key in row if key != "meta" and key not in used}}


# ---------------------------------------------------------------- one row in, one canonical row out

def parse_demonstration(row):
    """{"messages"} or {"instruction", "input", "output", "history"} -> {"messages", "meta"}."""
    if "messages" in row:
        messages, used = check_messages(row["messages"], last="assistant"), ("messages",)
    elif "instruction" in row and "output" in row:
        answer = {"role": "assistant", "content": checked_text(row["output"], "output")}
        messages = instruction_messages(row) + [answer]
        used = ("instruction", "input", "output", "history")
    else:
        refuse("the key messages, or instruction and output", f"the keys {', '.join(row)}",
               "rename the keys")
    return {"messages": messages, "meta": meta_of(row, used)}


def parse_preference(row):
    """A pair ("chosen", "rejected") or a list ("output", best first) -> the canonical preference.

    The prompt stands under one of PROMPT_KEYS, or every answer is a whole conversation that brings
    it along. If several bring it along they have to agree: scores of answers to *different*
    prompts can't be compared. "ranks" marks ties by equal numbers.
    """
    used = ["ranks", "grades", "rating"]
    if "chosen" in row and "rejected" in row:
        candidates, used = [row["chosen"], row["rejected"]], used + ["chosen", "rejected"]
    elif isinstance(row.get("output"), list) and len(row["output"]) >= 2:
        candidates, used = row["output"], used + ["output"]
    else:
        refuse("chosen and rejected, or output as a list of two or more answers, best first",
               f"the keys {', '.join(row)}", "rename the keys, or drop rows with one answer")
    prompts = []
    if any(key in row for key in PROMPT_KEYS):
        prompts.append(prompt_messages(row, PROMPT_KEYS))
    contexts, answers = zip(*[split_answer(candidate) for candidate in candidates])
    if not prompts and None in contexts:
        refuse(f"a prompt under {', '.join(PROMPT_KEYS)}, or every answer as a whole conversation",
               f"the keys {', '.join(row)}", "add the prompt")
    prompts += [context for context in contexts if context is not None]
    if any(prompt != prompts[0] for prompt in prompts):
        refuse("the same conversation before every answer", "two that differ",
               "remove the row (data/hh_rlhf/prepare.py does so and counts them)")
    K = len(answers)
    ranks = row.get("ranks", list(range(K)))
    if (not isinstance(ranks, list) or len(ranks) != K or any(type(r) is not int for r in ranks)
            or ranks != sorted(ranks) or ranks[0] < 0 or ranks[-1] >= 2**63):
        # In the loss a rank of -1 means that there is no answer.
        refuse(f"ranks as {K} whole numbers from 0 on that never fall", ranks,
               "put the best answer first")
    if "instruction" in row:
        used += ["input", "history"]
    return {"messages": prompts[0], "answers": list(answers), "ranks": ranks,
            "grades": grade_table(row, K), "meta": meta_of(row, (*used, *PROMPT_KEYS))}


def parse_prompt(row):
    """{"prompt" or "messages", "answer"?} -> {"messages", "answer", "meta"}."""
    messages = prompt_messages(row, ("prompt", "messages"))
    answer = row.get("answer")
    if answer is not None:
        checked_text(answer, "answer")
    return {"messages": messages, "answer": answer,
            "meta": meta_of(row, ("prompt", "messages", "answer"))}


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

def read_rows(path):
    """Yield (line number, object) of a JSONL file; blank lines are passed over."""
    if not str(path).endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: expected a name in .jsonl or .jsonl.gz; rename or convert it")
    found = 0
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected one JSON object, found broken JSON "
                            f"({error}); each line has to be a whole object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found a "
                            f"{type(row).__name__}; write the row as {{...}}")
        found += 1
        yield number, row
    if found == 0:
        raise UserError(f"{path}: expected rows, found blank lines only; write it again")


def read_each(path, parse):
    """Every row of a JSONL file through `parse`; an error is given its file and line."""
    rows = []
    for number, row in read_rows(path):
        try:
            rows.append(parse(row))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except RecursionError:  # deep enough to be read, too deep to be shown
            raise UserError(f"{path}, line {number}: lists or objects are nested too deeply; write "
                            "the row as plain text and messages") from None
    return rows


def read_demonstrations(path):
    """Demonstrations for SFT; see `parse_demonstration`."""
    return read_each(path, parse_demonstration)


def read_preferences(path):
    """Preferences for the reward model and DPO; see `parse_preference`."""
    return read_each(path, parse_preference)


def read_prompts(path):
    """Prompts for sampling and PPO; see `parse_prompt`."""
    return read_each(path, parse_prompt)


def read_samples(path):
    """Samples that sample.py wrote, for annotators and best-of-K; see `parse_samples`."""
    return read_each(path, parse_samples)


def as_document(text):
    """`text` without blank lines, because a blank line is what separates two documents."""
    return re.sub(r"\n\s*\n", "\n", text.strip())


def read_text(path):
    """Text for pretraining and tokenizer training -> one string, blank lines between documents.

    A .txt file is taken as it is, unless "<|endoftext|>" separates its documents: then each becomes
    one. Of JSONL, the string under "text" is one document.
    """
    if str(path).endswith((".jsonl", ".jsonl.gz")):
        documents = read_each(path, lambda row: checked_text(row.get("text"), 'the key "text"'))
    elif str(path).endswith((".txt", ".txt.gz")):
        text = "\n".join(line for _, line in read_lines(path)).strip("\n")
        if END_OF_TEXT not in text:
            return checked_file_text(text, path)
        documents = text.split(END_OF_TEXT)
    else:
        raise UserError(f"{path}: expected a name in .txt or .jsonl, or these with .gz; "
                        "rename or convert it")
    return checked_file_text("\n\n".join(filter(None, map(as_document, documents))), path)


def checked_file_text(text, path):
    """`text` with one line end at its end; refused where nothing but white space is in the file."""
    if not text.strip():
        raise UserError(f"{path}: expected text, found white space only; write it again")
    return text + "\n"


def spread_meta(row):
    """The inverse of `meta_of`, for writing: a canonical row's meta back beside its other keys.

    What a reader would take for the row's own (a "prompt" beside "messages") stays under "meta".
    """
    meta = row.get("meta", {})
    kept = {key: meta[key] for key in meta if key in OWN_KEYS}
    rest = {key: meta[key] for key in meta if key not in OWN_KEYS}
    return {**rest, **{key: row[key] for key in row if key != "meta"},
            **({"meta": kept} if kept else {})}
