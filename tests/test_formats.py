"""formats.py: every accepted shape gives the one canonical row, everything else one clear error."""
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.plumbing import formats
from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import write_jsonl

USER = {"role": "user", "content": "Name a colour."}
ASSISTANT = {"role": "assistant", "content": "Green."}
DOG = {"role": "assistant", "content": "Dog."}
SYSTEM = {"role": "system", "content": "Answer in capitals."}


def hh(*turns):
    """A transcript in hh-rlhf's way of writing."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def write(tmp_path, *rows, name="rows.jsonl"):
    """Write rows as JSONL; a string goes to the file as it is."""
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- accepted shapes

def test_demonstrations_in_both_shapes(tmp_path):
    path = write(tmp_path, {"messages": [SYSTEM, USER, ASSISTANT], "skill": "colours"},
                 {"instruction": "Turn it round.", "input": "top", "output": "pot",
                  "history": [["Hi.", "Hello."]]},
                 {"instruction": "Say hi.", "input": "", "output": "Hi."})
    first, second, third = formats.read_demonstrations(path)
    assert first == {"messages": [SYSTEM, USER, ASSISTANT], "meta": {"skill": "colours"}}
    assert second["messages"] == [
        {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Turn it round.\ntop"},
        {"role": "assistant", "content": "pot"}]
    assert second["meta"] == {}
    assert [message["content"] for message in third["messages"]] == ["Say hi.", "Hi."]


@pytest.mark.parametrize("row", [
    {"prompt": "Name a colour.", "chosen": "Green.", "rejected": "Dog."},
    {"messages": [USER], "chosen": "Green.", "rejected": "Dog."},
    {"prompt": [USER], "chosen": "Green.", "rejected": "Dog."},
    {"query": "Name a colour.", "chosen": "Green.", "rejected": "Dog."},
    {"instruction": "Name a colour.", "input": "", "chosen": "Green.", "rejected": "Dog."},
    {"prompt": "Name a colour.", "chosen": ASSISTANT, "rejected": [DOG]},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, DOG]},
    {"prompt": "Name a colour.", "chosen": [USER, ASSISTANT], "rejected": "Dog."},
    {"chosen": hh("Name a colour.", "Green."), "rejected": hh("Name a colour.", "Dog.")},
    {"prompt": "\n\nHuman: Name a colour.\n\nAssistant:", "chosen": "Green.", "rejected": "Dog."},
    {"prompt": "Name a colour.", "output": ["Green.", "Dog."]},
])
def test_every_shape_of_a_pair_gives_the_same_row(row):
    assert formats.parse_preference(row) == {
        "messages": [USER], "answers": ["Green.", "Dog."], "ranks": [0, 1], "grades": None,
        "meta": {}}


def test_ranked_list_keeps_ties_and_grades():
    row = {"prompt": "Hi.", "output": ["a", "b", "c"], "ranks": [0, 1, 1], "safety": [True] * 3,
           "grades": [[0, "better", "significantly"], [1, 0, "negligible"], [3, 3, 0]]}
    parsed = formats.parse_preference(row)
    assert parsed["ranks"] == [0, 1, 1]
    assert parsed["grades"] == [[0, 2, 3], [0, 0, 0], [0, 0, 0]]  # below the diagonal is cleared
    assert parsed["meta"] == {"safety": [True] * 3}


@pytest.mark.parametrize("grade, number", [("significantly", 3), ("better", 2), ("slightly", 1),
                                           ("negligible", 0)])
def test_check_29_the_rating_of_a_pair(grade, number):
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b", "rating": grade}
    assert formats.parse_preference(row)["grades"] == [[0, number], [0, 0]]


def test_transcript_with_a_repeated_speaker_is_one_turn():
    text = "\n\nHuman: Hi \n\nAssistant: One.\n\nAssistant: Two.\n\nHuman: More\n\nAssistant: No"
    assert [m["content"] for m in formats.transcript_messages(text)] == [
        "Hi", "One.\n\nTwo.", "More", "No"]


def test_output_beside_chosen_is_an_extra_key():
    row = {"instruction": "Hi.", "output": "plain", "chosen": "polite", "rejected": "rude"}
    parsed = formats.parse_preference(row)
    assert parsed["answers"] == ["polite", "rude"] and parsed["meta"] == {"output": "plain"}


def test_prompts(tmp_path):
    path = write(tmp_path, {"prompt": "Hi.", "answer": "Hello."}, {"messages": [USER], "id": 7},
                 {"messages": [USER], "answer": None, "meta": {"a": 1, "b": 0}, "b": 2})
    rows = formats.read_prompts(path)
    assert [row["answer"] for row in rows] == ["Hello.", None, None]
    assert [row["meta"] for row in rows] == [{}, {"id": 7}, {"a": 1, "b": 2}]


def test_samples_survive_writing_and_reading(tmp_path):
    samples = [{"text": "Blue", "ended": True, "num_tokens": 2}, {"text": "", "ended": True}]
    row = {"messages": [USER], "answer": None, "samples": samples, "meta": {"task": {"skill": "x"}}}
    path = tmp_path / "new" / "samples.jsonl.gz"
    assert write_jsonl(path, [row]) == 1
    assert formats.read_samples(path) == [row]


def test_canonical_prompts_and_demonstrations_read_back_as_they_are(tmp_path):
    for read, row in [(formats.read_prompts, {"prompt": "Hi", "tag": 1}),
                      (formats.read_demonstrations, {"messages": [USER, ASSISTANT], "tag": 1})]:
        once = read(write(tmp_path, row))
        write_jsonl(tmp_path / "again.jsonl", once)
        assert read(tmp_path / "again.jsonl") == once


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text.strip()))
def test_any_text_round_trips_but_for_white_space_at_its_edges(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    write_jsonl(path, [{"messages": [{"role": "user", "content": text}]}])
    assert formats.read_prompts(path)[0]["messages"] == [{"role": "user", "content": text.strip()}]


def test_text_files(tmp_path):
    plain = write(tmp_path, "one\n\ntwo\r", "", name="a.txt")
    assert formats.read_text(plain) == "one\n\ntwo\n"
    stories = tmp_path / "b.txt.gz"
    stories.write_bytes(gzip.compress(b"one\n\n  more\n<|endoftext|>\n\n<|endoftext|>two\n"))
    assert formats.read_text(stories) == "one\n  more\n\ntwo\n"
    assert formats.read_text(write(tmp_path, "one  ", "", "", "two", name="c.txt")) == (
        "one  \n\ntwo\n")
    blank = write(tmp_path, {"text": "one\n \t\nmore"})  # a line of spaces looks like a blank one
    assert formats.read_text(blank) == "one\nmore\n"
    assert formats.read_text(write(tmp_path, {"text": "one\n\nmore"}, {"text": "two"})) == (
        "one\nmore\n\ntwo\n")


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("mark", ["", "<|endoftext|>"])
def test_a_text_is_the_same_with_the_line_ends_of_any_system(tmp_path, end, mark):
    """Bug: the tokenizer was trained on "\\r\\n", which pretraining took out."""
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{end}more{end}{mark}{end}two{end}".encode())
    assert list(formats.read_documents(path)) == ["one\nmore", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Bug: the first document, or the first row, began with a character that nobody sees."""
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("one".encode("utf-8-sig")))
    (tmp_path / "c.jsonl").write_text('{"text": "one", "prompt": ""}', encoding="utf-8-sig")
    for name in ("a.txt", "b.txt.gz", "c.jsonl"):
        assert list(formats.read_documents(tmp_path / name)) == ["one"]


def test_a_text_without_blank_lines_is_cut_at_the_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 10)
    path = write(tmp_path, *["four", "five", "three"] * 2, "", "end", name="a.txt")
    assert list(formats.read_documents(path)) == [
        "four\nfive\nthree", "four\nfive\nthree", "end"]


def test_the_tokenizer_reads_what_dialogues_say_and_nothing_else(tmp_path):
    """Bug: ids, dates and URLs of a row were trained on as if somebody had said them."""
    path = write(tmp_path, {"messages": [SYSTEM, USER, ASSISTANT], "id": "7f3a", "url": "http://x"},
                 {"instruction": "a", "input": "b", "output": "c", "date": "2024"},
                 {"prompt": "d", "chosen": "e", "rejected": "f", "source": "web"},
                 {"prompt": "g", "output": ["h", "i"]}, {"query": "j", "id": "8"}, {"text": "k"})
    assert list(formats.read_documents(path, dialogues=True)) == [
        "Answer in capitals.", "Name a colour.", "Green.", "a\nb", "c", "d", "e", "f", "g", "h",
        "i", "j", "k"]
    check_refused(lambda path: list(formats.read_documents(path)), path, "line 1", '"text"')


# ---------------------------------------------------------------- what a row says of itself

ROW = {"instruction": "Hi.", "output": "a"}
PAIR = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("parse, row", [
    (formats.parse_demonstration, ROW), (formats.parse_demonstration, {**ROW, "history": []}),
    (formats.parse_demonstration, {"messages": [USER, ASSISTANT]}),
    (formats.parse_preference, PAIR), (formats.parse_prompt, {"query": "Hi."}),
    (formats.parse_preference, {"chosen": [USER, ASSISTANT], "rejected": [USER, DOG]}),
    (formats.parse_preference, {**PAIR, "prompt": [USER], "chosen": [SYSTEM, USER, ASSISTANT]})])
def test_check_14_a_system_key_is_the_standing_instruction(key, parse, row):
    """Bug: it went to meta, and nobody was trained to obey it."""
    parsed = parse({**row, key: " Answer in capitals. "})
    assert parsed["messages"][0] == SYSTEM and parsed["messages"][1]["role"] == "user"
    assert key not in parsed["meta"]
    if "messages" not in row and "chosen" not in row:
        assert parse({**row, key: ""}) == parse({**row, key: None}) == parse(row)


def test_an_equal_system_message_is_not_doubled_and_another_one_refused():
    row = {"messages": [SYSTEM, USER, ASSISTANT], "system": SYSTEM["content"]}
    assert formats.parse_demonstration(row)["messages"] == row["messages"]
    with pytest.raises(UserError, match="the same under system, found two that differ"):
        formats.parse_demonstration({**row, "system": "Shout."})
    with pytest.raises(UserError, match="the same under system_prompt"):
        formats.parse_demonstration({**ROW, "system": "Shout.", "system_prompt": "Whisper."})


@pytest.mark.parametrize("parse, row, named", [
    (formats.parse_demonstration, {"messages": [USER, ASSISTANT], **ROW}, "instruction, output"),
    (formats.parse_demonstration, {"messages": [USER, ASSISTANT], "output": "a"}, "output beside"),
    (formats.parse_demonstration, {"messages": [USER, ASSISTANT], "prompt": "a"}, "prompt beside"),
    (formats.parse_demonstration, {**ROW, "chosen": "a", "rejected": "b"}, "chosen, rejected"),
    (formats.parse_demonstration, {**ROW, "text": "Hi. a"}, "text beside instruction, output"),
    (formats.parse_preference, {**PAIR, "output": ["a", "b"]}, "output beside prompt, chosen"),
    (formats.parse_preference, {"prompt": "Hi.", "output": ["a", "b"], "chosen": "a"}, "chosen"),
    (formats.parse_preference, {**PAIR, "history": [["a", "b"]]}, "history"),
    (formats.parse_prompt, {"prompt": "Hi.", "query": "Hi."}, "exactly one of the keys")])
def test_a_row_of_two_shapes_is_refused_by_the_names_of_its_keys(parse, row, named):
    """Bug: one of the two was read, the other dropped without a word."""
    with pytest.raises(UserError, match=named):
        parse(row)


def test_a_question_that_stands_there_twice_says_nothing_new():
    row = {"messages": [USER, ASSISTANT], "prompt": USER["content"], "prompt_id": "7"}
    assert formats.parse_demonstration(row)["meta"] == {"prompt_id": "7"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0},
                                  {"train": 0, "weight": 0}])
def test_check_14_a_turn_that_is_not_to_be_trained_keeps_its_mark_in_a_demonstration_only(mark):
    turns = [USER, {**ASSISTANT, **mark}, {**USER, "weight": 0},
             {**DOG, "weight": 1, "train": True}]
    read = formats.parse_demonstration({"messages": turns})["messages"]
    assert read == [USER, {**ASSISTANT, "train": False}, USER, DOG]
    assert formats.parse_demonstration({"messages": read})["messages"] == read
    assert formats.parse_prompt({"prompt": turns[:3]})["messages"] == [USER, ASSISTANT, USER]
    pair = {"chosen": turns, "rejected": [USER, ASSISTANT, USER, ASSISTANT]}
    assert formats.parse_preference(pair)["messages"] == [USER, ASSISTANT, USER]
    with pytest.raises(UserError, match="a turn that is to be trained, found none"):
        formats.parse_demonstration({"messages": turns[:2]})
    with pytest.raises(UserError, match="marked as not to be trained"):
        formats.parse_preference({**PAIR, "chosen": turns[1]})


@pytest.mark.parametrize("names", formats.SCORES)
def test_check_28_equal_scores_are_a_tie_and_contradicting_ones_refused(names):
    """Bug: a pair whose answers were scored alike counted as a preference for the first."""
    def ranks(*scores, **more):
        return formats.parse_preference({**PAIR, **dict(zip(names, scores)), **more})["ranks"]

    assert ranks(4, 4.0) == ranks(4, 4, ranks=[0, 0]) == [0, 0]
    assert ranks(5, 4) == ranks(None, None) == ranks() == [0, 1]
    for scores, more in [((3, 4), {}), ((4,), {}), ((4, None), {}), (("4", "3"), {}),
                         ((True, False), {}), ((4, 4), {"ranks": [0, 1]}),
                         ((5, 4), {"ranks": [0, 0]})]:
        with pytest.raises(UserError, match=names[0]):
            ranks(*scores, **more)


def test_a_label_of_false_is_refused_in_demonstrations():
    assert formats.parse_demonstration({**ROW, "label": True})["meta"] == {"label": True}
    for label, said in ((False, "false"), (0, "0"), ("False", '"False"')):
        with pytest.raises(UserError, match=f'worth imitating, found "label": {said}; remove'):
            formats.parse_demonstration({**ROW, "label": label})


def test_prompts_stand_where_those_of_preferences_do():
    for row in ({"prompt": "Name a colour."}, {"messages": [USER]}, {"query": "Name a colour."},
                {"instruction": "Name a colour.", "input": "", "output": "Green."}):
        assert formats.parse_prompt(row)["messages"] == [USER]
    row = {"instruction": "Now?", "input": "b", "history": [["first?", "a"]], "system": "Short."}
    assert [m["content"] for m in formats.parse_prompt(row)["messages"]] == [
        "Short.", "first?", "a", "Now?\nb"]


def test_white_space_at_the_edges_goes_in_every_shape():
    """Bug: of two answers that differ in a space at the edge, one was preferred."""
    pair = {"prompt": " Name a colour.\n", "chosen": " Green.", "rejected": "Dog.\n"}
    assert formats.parse_preference(pair) == formats.parse_preference(
        {"prompt": "Name a colour.", "chosen": "Green.", "rejected": "Dog."})
    row = {"instruction": " a ", "input": " b ", "output": " c ", "history": [[" d ", " e "]]}
    assert [m["content"] for m in formats.parse_demonstration(row)["messages"]] == [
        "d", "e", "a\nb", "c"]
    assert formats.parse_prompt({"prompt": "a", "answer": " b "})["answer"] == "b"


@pytest.mark.parametrize("text", [
    "\r\n\r\nHuman: Hi\r\n\r\nAssistant: Hello\r\n\r\nHuman: So?\r\n\r\nAssistant:",
    "Human: Hi\n\nAssistant: Hello\n\nHuman: So?\n\nAssistant:",
    "\nHuman: Hi\n\nAssistant: Hello\n\nHuman: So?",
    " Human: Hi\n\nAssistant: Hello\n\nHuman: So?"])
def test_a_transcript_is_known_without_its_first_blank_lines_and_with_other_line_ends(text):
    """Bug: it became one turn of the user's, in which "Human:" and "Assistant:" were said."""
    messages = formats.parse_prompt({"prompt": text})["messages"]
    assert [m["content"] for m in messages] == ["Hi", "Hello", "So?"]
    assert formats.parse_prompt({"prompt": "Human: Hi"})["messages"][0]["content"] == "Hi"
    # Some real answers begin so; what follows no question is no transcript.
    assert formats.split_answer("Human: no") == (None, "Human: no")


def test_text_parts_of_a_content_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "Name"}, {"type": "text", "text": "a colour."}]
    message = {"role": "user", "content": parts}
    assert formats.parse_prompt({"messages": [message]})["messages"][0]["content"] == (
        "Name\na colour.")
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}):
        with pytest.raises(UserError, match="in text parts only"):
            formats.parse_prompt({"messages": [{"role": "user", "content": [*parts, part]}]})


# ---------------------------------------------------------------- refused rows

def check_refused(read, path, *parts):
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    for part in (path.name, *parts):
        assert part in message, message
    assert "\n" not in message and len(message) < 500


GOOD = {"demonstrations": {"messages": [USER, ASSISTANT]}, "prompts": {"prompt": "Hi."},
        "preferences": {"prompt": "Hi.", "chosen": "a", "rejected": "b"},
        "samples": {"prompt": "Hi.", "samples": [{"text": "a", "ended": True}]}}


@pytest.mark.parametrize("kind, row, found", [
    ("demonstrations", {"text": "Hi."}, "the keys text"),
    ("demonstrations", {"messages": [USER]}, "found user"),
    ("demonstrations", {"messages": []}, "found []"),
    ("demonstrations", {"messages": "Hi."}, "found Hi."),
    ("demonstrations", {"messages": [ASSISTANT, USER]}, "in message 1, found assistant"),
    ("demonstrations", {"messages": [USER, USER, ASSISTANT]}, "in message 2, found user"),
    ("demonstrations", {"messages": [USER, SYSTEM, ASSISTANT]}, "in message 2, found system"),
    ("demonstrations", {"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "found system"),
    ("demonstrations", {"messages": [USER, {"role": "bot", "content": "Hi."}]}, "found bot"),
    ("demonstrations", {"messages": [USER, {"role": ["assistant"], "content": "a"}]}, "message 2"),
    ("demonstrations", {"messages": [USER, {"role": "assistant"}]}, "message 2"),
    ("demonstrations", {"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "have text"),
    ("demonstrations", {"messages": [USER, {**ASSISTANT, "content": 7}]}, "found 7"),
    ("demonstrations", {"messages": [USER, {**ASSISTANT, "content": "\ud83d"}]}, "characters"),
    ("demonstrations", {"instruction": "Hi.", "output": ""}, "output to have text"),
    ("demonstrations", {"instruction": 3, "output": "a"}, "instruction"),
    ("demonstrations", {"instruction": "Hi.", "output": "a", "history": ["Hi."]}, "history"),
    ("demonstrations", {"instruction": "Hi.", "output": "a", "history": [["", "b"]]}, "message 1"),
    ("demonstrations", {"instruction": "Hi.", "output": "a", "history": 5}, "found 5"),
    ("demonstrations", {"messages": "one\ntwo"}, "found one two"),
    ("demonstrations", {"messages": [USER, ASSISTANT], "meta": 3}, "meta"),
    ("prompts", {"question": "Hi."}, "the keys question"),
    ("prompts", {"prompt": "Hi.", "input": "you"}, "beside instruction only"),
    ("prompts", {"prompt": "Hi.", "messages": [USER]}, "exactly one"),
    ("prompts", {"prompt": ""}, "have text"),
    ("prompts", {"prompt": None}, "found null"),
    ("prompts", {"messages": [USER, ASSISTANT]}, "found assistant"),
    ("prompts", {"prompt": "Hi.", "answer": 4}, "answer to be a string, found 4"),
    ("preferences", {"prompt": "Hi.", "chosen": "a"}, "the keys prompt, chosen"),
    ("preferences", {"prompt": "Hi.", "output": ["a"]}, "two or more"),
    ("preferences", {"prompt": "Hi.", "chosen": "a", "rejected": " "}, "answer to have text"),
    ("preferences", {"prompt": "Hi.", "chosen": "a", "rejected": None}, "found null"),
    ("preferences", {"chosen": "a", "rejected": "b"}, "a prompt under"),
    ("preferences", {"chosen": hh("q", "a"), "rejected": "b"}, "a prompt under"),
    ("preferences", {"chosen": hh("q", "a"), "rejected": hh("p", "b")}, "two that differ"),
    ("preferences", {"prompt": "p", "chosen": hh("q", "a"), "rejected": "b"}, "two that differ"),
    ("preferences", {"chosen": hh("q", "x", "q", "a"), "rejected": hh("q", "y", "q", "b")},
     "two that differ"),
    ("prompts", {"prompt": hh("q", "a")}, "user"),
    ("preferences", {"chosen": hh("q"), "rejected": hh("q", "b")}, "assistant"),
    ("preferences", {"chosen": hh("q", ""), "rejected": hh("q", "b")}, "have text"),
    ("preferences", {"prompt": "Hi.", "chosen": USER, "rejected": "b"}, "found user"),
    ("preferences", {"prompt": "Hi.", "chosen": "a", "rejected": "b", "rating": 1}, "scale"),
    ("preferences", {"prompt": "Hi.", "chosen": "a", "rejected": "b", "rating": True}, "true"),
    ("preferences", {"prompt": "Hi.", "output": ["a", "b", "c"], "rating": 3}, "pair"),
    ("preferences", {"prompt": "Hi.", "chosen": "a", "rejected": "b", "rating": 3, "grades": []},
     "remove one"),
    ("preferences", {"prompt": "Hi.", "output": ["a", "b"], "ranks": [1, 0]}, "never fall"),
    ("preferences", {"prompt": "Hi.", "output": ["a", "b"], "ranks": [0]}, "found [0]"),
    ("preferences", {"prompt": "Hi.", "output": ["a", "b"], "grades": [[0, 1]]}, "2 lists of 2"),
    ("samples", {"prompt": "Hi."}, "samples"),
    ("samples", {"prompt": "Hi.", "samples": []}, "samples"),
    ("samples", {"prompt": "Hi.", "samples": [{"text": "a"}]}, "ended"),
])
def test_refused_rows_name_line_and_finding(tmp_path, kind, row, found):
    read = getattr(formats, f"read_{kind}")
    check_refused(read, write(tmp_path, GOOD[kind], row, GOOD[kind]), "line 2: expected", found)


KEYS = ["prompt", "messages", "query", "instruction", "input", "output", "history", "chosen",
        "rejected", "rating", "grades", "ranks", "answer", "samples", "meta", "role", "content"]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 4), st.floats(), st.text(max_size=3),
              st.sampled_from(["user", "assistant", "system", "Hi.", hh("q", "a"), "better"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3),
                            st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=12)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_any_json_object_is_read_or_refused(row):
    """Whatever stands in a row, a reader gives its row or a UserError, never another exception."""
    for parse in (formats.parse_demonstration, formats.parse_preference, formats.parse_prompt,
                  formats.parse_samples):
        try:
            assert parse(row)["messages"][-1]["content"].strip()
        except UserError as error:
            assert str(error).startswith("expected ") and "\n" not in str(error)


READERS = [formats.read_demonstrations, formats.read_preferences, formats.read_prompts,
           formats.read_samples]


@pytest.mark.parametrize("read", READERS)
def test_refused_files(tmp_path, read):
    kind = read.__name__.removeprefix("read_")
    good = GOOD[kind]
    check_refused(read, tmp_path / "nowhere.jsonl", "no such file")
    check_refused(read, write(tmp_path, name="empty.jsonl"), "empty file")
    check_refused(read, write(tmp_path, "", "  ", name="blank.jsonl"), "blank lines")
    check_refused(read, write(tmp_path, *[good] * 6, '{"prompt": "Hi'), "line 7", "broken JSON")
    check_refused(read, write(tmp_path, good, "[1, 2]"), "line 2", "found a list")
    check_refused(read, write(tmp_path, good, name="rows.csv"), ".jsonl")
    check_refused(read, tmp_path, "name in .jsonl")
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    check_refused(read, folder, "readable file")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(good).encode() + b'\n{"prompt": "caf\xe9"}\n')
    check_refused(read, path, "line 2", "UTF-8")


@pytest.mark.parametrize("read", READERS + [formats.read_text])
def test_refused_gzip(tmp_path, read):
    whole = gzip.compress("\n".join(json.dumps({"text": str(i)}) for i in range(9999)).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b'{"text": "Hi."}\n')
    check_refused(read, path, "gzip")
    if read is formats.read_text:
        path.write_bytes(whole[:len(whole) // 2])
        check_refused(read, path, "gzip", "breaks off")


def test_refused_text(tmp_path):
    check_refused(formats.read_text, write(tmp_path, "x", name="a.md"), ".txt or .jsonl")
    check_refused(formats.read_text, write(tmp_path, "", "", name="a.txt"), "white space only")
    check_refused(formats.read_text, write(tmp_path, "<|endoftext|>", name="b.txt"), "white space")
    check_refused(formats.read_text, write(tmp_path, {"txt": "x"}), "line 1", '"text"')


def test_blank_lines_are_passed_over_but_counted_in_line_numbers(tmp_path):
    path = write(tmp_path, {"prompt": "Hi."}, "", {"prompt": "Ho."}, "")
    assert len(formats.read_prompts(path)) == 2
    check_refused(formats.read_prompts, write(tmp_path, {"prompt": "Hi."}, "", {"x": 1}), "line 3")


def test_writing_is_all_or_nothing(tmp_path):
    """An interrupted stage must not leave half a file that the next one takes for the whole."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_written_samples_are_read_again_whatever_the_rows_meta_holds(tmp_path):
    """Bug: a key "prompt" in a row's meta was written beside "messages", and refused when read."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "cow?"}], "kind": "farm",
                                "meta": {"prompt": "x", "note": "\ud83d"}}) + "\n", encoding="utf-8")
    (row,) = formats.read_prompts(path)
    samples = [{"text": "moo", "ended": True}]
    write_jsonl(tmp_path / "samples.jsonl",
                [formats.spread_meta({**row, "samples": samples})])
    (again,) = formats.read_samples(tmp_path / "samples.jsonl")
    assert again["samples"] == samples and again["messages"] == row["messages"]
    assert again["meta"] == {"prompt": "x", "note": "\ud83d", "kind": "farm"}


def test_check_38_a_history_is_read_from_its_oldest_turn_to_its_newest():
    row = {"instruction": "And now?", "output": "d",
           "history": [["first?", "a"], ["second?", "b"], ["third?", "c"]]}
    messages = formats.parse_demonstration(row)["messages"]
    assert [m["content"] for m in messages] == [
        "first?", "a", "second?", "b", "third?", "c", "And now?", "d"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 4
