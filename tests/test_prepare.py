"""The scripts that prepare real data, on small files of the same shape, and the downloader."""
import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minirlhf.plumbing import formats
from minirlhf.plumbing.download import download

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real files; the tests that need them skip without


def load(name):
    """Import data/<name>/prepare.py, which is a script and not part of a package."""
    path = ROOT / "data" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hh_rlhf, tinystories = load("hh_rlhf"), load("tinystories")


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def pair(*turns, chosen, rejected):
    return {"chosen": transcript(*turns, chosen), "rejected": transcript(*turns, rejected)}


TRAIN = [pair(f"How much is {i} + {i}?", chosen=f"It is {2 * i}.", rejected="No.")
         for i in range(20)]
TRAIN += [
    pair("Tell me a joke.", "Which one?", "Any.", chosen="I know none.",
         rejected="I know them all."),
    pair("Hello.", chosen="Hi.", rejected="Hi. "),           # identical but for white space
    pair("Hello.", chosen="Hi.", rejected=""),               # an empty answer
    {"chosen": transcript("Ask one", "a"), "rejected": transcript("Ask two", "b")},
    pair("What is held out?", "This.", "And?", chosen="That is all.", rejected="?"),  # as in TEST
    pair("How much is 1 + 1?", chosen="Two, of course.", rejected="Three."),
]
TEST = [pair("What is held out?", chosen="Some rows.", rejected="None.")]


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def upstream(tmp_path):
    """A folder in upstream's layout."""
    write_gz(tmp_path / "up" / "helpful-base" / "train.jsonl.gz", TRAIN)
    write_gz(tmp_path / "up" / "helpful-base" / "test.jsonl.gz", TEST)
    return tmp_path / "up"


def prepare(out, source="", **options):
    options = {"subset": "helpful-base", **options}
    hh_rlhf.main(hh_rlhf.Config(source=str(source), out=str(out), **options))


# ---------------------------------------------------------------- hh-rlhf

def test_own_split(upstream, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(out, upstream)
    train = formats.read_preferences(out / "train.jsonl")
    heldout = formats.read_preferences(out / "heldout.jsonl")
    assert (len(train), len(heldout)) == (22, 1)
    assert train[0]["messages"] == [{"role": "user", "content": "How much is 0 + 0?"}]
    assert train[0]["answers"] == ["It is 0.", "No."]
    assert train[0]["meta"] == {"source": "helpful-base"}
    assert [m["role"] for m in train[20]["messages"]] == ["user", "assistant", "user"]

    demonstrations = formats.read_demonstrations(out / "demonstrations.jsonl")
    assert len(demonstrations) == 22
    assert demonstrations[20]["messages"][-1] == {"role": "assistant", "content": "I know none."}
    assert len(formats.read_prompts(out / "prompts.jsonl")) == 21  # 1 + 1 is asked twice
    assert len(formats.read_prompts(out / "heldout_prompts.jsonl")) == 1
    documents = formats.read_text(out / "text.txt").strip().split("\n\n")
    assert len(documents) == 22
    assert documents[20] == ("Human: Tell me a joke.\nAssistant: Which one?\nHuman: Any.\n"
                             "Assistant: I know none.")

    printed = capsys.readouterr().out
    assert "rows read 27 | kept 23 | dropped 4" in printed
    for reason in ("1: the two answers are identical", "1: expected the content of message 2",
                   "1: expected the same conversation", "1: a training row that opens like"):
        assert f"dropped {reason}" in printed
    assert "both training and held-out rows: 0" in printed
    assert "95.7% of the kept pairs, 100.0%" in printed  # 22 of 23: the joke's is shorter


def test_fold_is_the_md5_of_the_raw_first_turn():
    """Folds have to agree with those of others, who hash the transcript up to its first answer."""
    rows = [(row, "helpful-base", "train") for row in TRAIN]
    heldout = []
    for fold in range(5):
        pairs, dropped = hh_rlhf.clean_pairs(rows, fold, max_chars=0)
        train, test = hh_rlhf.split_pairs(pairs, dropped)
        assert len(train) + len(test) == len(pairs) == 23
        for row in test:
            raw = transcript(row["messages"][0]["content"])
            assert int(hashlib.md5(raw.encode()).hexdigest(), 16) % 5 == fold
        heldout += test
    assert len(heldout) == 23  # each row is held out once
    assert hh_rlhf.fold_of("Hello.") == 1


def test_one_file_of_pairs(tmp_path, capsys):
    rows = [{"source": "helpful-base", "split": "valid" if i == 0 else "train",
             "prompt": f"\n\nHuman: Count to {i}.\n\nAssistant:", "chosen": "One, two.",
             "rejected": "No"} for i in range(4)]
    rows.append({**rows[1], "source": "harmless-base"})
    write_gz(tmp_path / "pairs.jsonl.gz", rows)
    prepare(tmp_path / "out", tmp_path / "pairs.jsonl.gz", max_chars=25)
    assert "rows read 4 | kept 4" in capsys.readouterr().out
    heldout = formats.read_preferences(tmp_path / "out" / "heldout.jsonl")
    assert [row["messages"][0]["content"] for row in heldout] == ["Count to 0."]
    with pytest.raises(ValueError, match="--fold 0"):
        prepare(tmp_path / "out", tmp_path / "pairs.jsonl.gz", max_chars=10)
    write_gz(tmp_path / "plain.jsonl.gz", TRAIN)
    with pytest.raises(ValueError, match="line 1: expected the keys source and split"):
        prepare(tmp_path / "out", tmp_path / "plain.jsonl.gz")


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_check_33_a_pairs_length_is_that_of_its_longer_answer(longer):
    """Bug: the limit asked one of the two answers, and the other could have any length."""
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello.", "rejected": "No."}
    row[longer] = "a" * 20
    for max_chars, kept in ((21, 0), (22, 1)):  # "Hi" and 20
        pairs, dropped = hh_rlhf.clean_pairs([(row, "helpful-base", "train")], -1, max_chars)
        assert len(pairs) == kept and dropped.total() == 1 - kept


def test_user_errors_end_with_exit_code_2(tmp_path):
    for name, options in [("hh_rlhf", ["--source", str(tmp_path / "nowhere")]),
                          ("hh_rlhf", ["--source", str(tmp_path), "--fold", "7"]),
                          ("tinystories", ["--source", str(tmp_path)]),
                          ("tinystories", ["--sauce", str(tmp_path)])]:
        done = subprocess.run([sys.executable, ROOT / "data" / name / "prepare.py", *options],
                              cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not (SHARED / "hh_rlhf" / "pairs.jsonl.gz").exists(),
                    reason="needs the real hh_rlhf/pairs.jsonl.gz in ../shared/data")
def test_real_pairs_give_the_known_length_baseline(tmp_path, capsys):
    prepare(tmp_path, SHARED / "hh_rlhf" / "pairs.jsonl.gz", fold=0,
            subset="helpful-base,helpful-rejection-sampled")
    assert "rows read 5,053 | kept 5,053" in (printed := capsys.readouterr().out)
    assert "the longer answer is the chosen one: 57.8%" in printed
    assert "both training and held-out rows: 0" in printed


# ---------------------------------------------------------------- TinyStories

def test_tinystories_folder(tmp_path, capsys):
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(
        b"A cat sat.\n\nIt slept.\n<|endoftext|>\nA dog ran.\n<|endoftext|>\nA cow ate.\n"
        b"<|endoftext|>\nA dog ran.<|endoftext|>\n"))
    (tmp_path / "TinyStories-valid.txt").write_text("A cow ate.\n<|endoftext|>\nA hen hid.\n", encoding="utf-8")
    tinystories.main(tinystories.Config(source=str(tmp_path), out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "valid.txt").read_text(encoding="utf-8") == "A cow ate.\n\nA hen hid.\n\n"
    assert formats.read_text(tmp_path / "out" / "train.txt") == (
        "A cat sat.\nIt slept.\n\nA dog ran.\n")
    printed = capsys.readouterr().out
    assert "train.txt | stories 2 | characters 30 | dropped, seen before 2" in printed


def test_tinystories_one_file(tmp_path):
    source = tmp_path / "stories.txt"
    source.write_text("\n<|endoftext|>\n".join(f"Story {i}." for i in range(1, 121)), encoding="utf-8")
    tinystories.main(tinystories.Config(source=str(source), out=str(tmp_path)))
    assert (tmp_path / "valid.txt").read_text(encoding="utf-8") == "Story 50.\n\nStory 100.\n\n"
    train = formats.read_text(tmp_path / "train.txt").strip().split("\n\n")
    assert len(train) == 118 and "Story 50." not in train

    source.write_text("Once upon a time.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="between stories, found none"):
        tinystories.main(tinystories.Config(source=str(source), out=str(tmp_path)))
    source.write_text("One.<|endoftext|>Two.", encoding="utf-8")
    with pytest.raises(ValueError, match="at least 50 stories"):
        tinystories.main(tinystories.Config(source=str(source), out=str(tmp_path / "few")))
    with pytest.raises(ValueError, match="choose another --out"):
        os.rename(source, tmp_path / "valid.txt")
        tinystories.main(tinystories.Config(source=str(tmp_path), out=str(tmp_path)))


# ---------------------------------------------------------------- downloading

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, and for each request does first what `server.troubles` says next."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        trouble = self.server.troubles.pop(0) if self.server.troubles else ""
        body = self.server.files.get(self.path)
        if trouble in ("busy", "broken") or body is None:
            self.send_error(404 if body is None else 500 if trouble == "broken" else 503)
            return
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if trouble == "no range":
            start = 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[:len(rest) // 2] if trouble == "break" else rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.troubles, server.requests = {"/file": b"0123456789" * 5000}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_tries_again_and_goes_on_where_it_stopped(server, tmp_path):
    body, path = server.files["/file"], tmp_path / "new" / "file"
    server.troubles = ["broken", "break"]
    digest = download(server.url + "/file", str(path), wait=0.01)
    assert path.read_bytes() == body and digest == hashlib.sha256(body).hexdigest()
    assert [part for _, part in server.requests] == [None, None, "bytes=25000-"]
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert download(server.url + "/file", str(path), digest) == digest  # there: no new request
    assert len(server.requests) == 3


@pytest.mark.parametrize("trouble, have", [("no range", 30000), ("", 50000), ("", 60000)])
def test_download_begins_anew_where_it_cannot_go_on(server, tmp_path, trouble, have):
    """A server without ranges, and a rest of an earlier run that is already as long or too long."""
    (tmp_path / "file.part").write_bytes(b"x" * have)
    server.troubles = [trouble]
    download(server.url + "/file", str(tmp_path / "file"), wait=0.01)
    assert (tmp_path / "file").read_bytes() == server.files["/file"]


def test_download_gives_up_with_one_clear_message(server, tmp_path):
    path = str(tmp_path / "file")
    server.troubles = ["break", "busy", "busy"]
    with pytest.raises(ValueError, match="not fetched in 3 tries.*503.*--source"):
        download(server.url + "/file", path, wait=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["file.part"]  # what came is kept
    with pytest.raises(ValueError, match="404"):
        download(server.url + "/other", str(tmp_path / "other"), wait=60)  # final: no waiting
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="not fetched in 2 tries.*network"):
        download(server.url + "/file", path, tries=2, wait=0.01)


def test_download_refuses_a_wrong_checksum(server, tmp_path):
    with pytest.raises(ValueError, match="expected SHA-256 00"):
        download(server.url + "/file", str(tmp_path / "file"), "00" * 32, wait=0.01)
    assert list(tmp_path.iterdir()) == []


def test_hh_rlhf_from_the_web(server, upstream, tmp_path, capsys):
    for name in ("train", "test"):
        path = upstream / "helpful-base" / f"{name}.jsonl.gz"
        server.files[f"/data/helpful-base/{name}.jsonl.gz"] = path.read_bytes()
    prepare(tmp_path / "out", url=server.url + "/data")
    sums = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".gz")]
    assert len(sums) == 2
    (tmp_path / "sums").write_text("\n".join(sums), encoding="utf-8")
    prepare(tmp_path / "again", url=server.url + "/data", sha256=str(tmp_path / "sums"))
    for path in (tmp_path / "out").glob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    (tmp_path / "sums").write_text("\n".join(sums).replace(sums[1][:64], "ab" * 32), encoding="utf-8")
    with pytest.raises(ValueError, match="test.jsonl.gz: expected SHA-256 abab"):
        prepare(tmp_path / "third", url=server.url + "/data", sha256=str(tmp_path / "sums"))


def test_tinystories_from_the_web(server, tmp_path):
    server.files["/TinyStories-train.txt"] = b"A cat sat.<|endoftext|>A dog ran."
    server.files["/TinyStories-valid.txt"] = b"Hm.<|endoftext|>"
    tinystories.main(tinystories.Config(out=str(tmp_path), url=server.url))
    assert formats.read_text(tmp_path / "train.txt") == "A cat sat.\n\nA dog ran.\n"
