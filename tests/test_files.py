"""Whole files, read and written: what is named when it fails, and that nothing is left half done."""

import dataclasses
import gzip
from pathlib import Path

import pytest

from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import (MADE_BY, how_to_make, parse_json, read_file, read_lines,
                                     write_atomically, write_lines, write_text)


def test_line_ends_stay_as_they_are(tmp_path):
    for text in ("one\r\ntwo\n\nthree", "", "\N{GRINNING FACE}\r"):
        write_text(tmp_path / "new" / "text.txt", text)
        assert read_file(tmp_path / "new" / "text.txt") == text
        assert (tmp_path / "new" / "text.txt").read_bytes() == text.encode("utf-8")
    write_text(tmp_path / "a.txt", "one\r\ntwo")
    assert list(read_lines(tmp_path / "a.txt")) == [(1, "one"), (2, "two")]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Bug: the first line began with a character that nobody sees, and was another word for it."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo"))
    for name in ("a.txt", "a.txt.gz"):
        assert read_file(tmp_path / name) == "one\n\ufefftwo"  # only at the head
        assert list(read_lines(tmp_path / name)) == [(1, "one"), (2, "\ufefftwo")]


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    (gzip.compress(b"one", mtime=0), "doesn't end in .gz; rename it"), (b"PK\x03\x04one", "zip archive"),
    (b"PAR1one", "Parquet"), ("one".encode("utf-16"), "UTF-16; save it as UTF-8"),
    ("one".encode("utf-16-be"), "something else")])
def test_a_file_of_another_kind_is_called_by_its_name(content, words, tmp_path):
    """Bug: each of them was answered with "expected UTF-8" or "broken JSON"."""
    (tmp_path / "a.txt").write_bytes(content)
    for read in (read_file, lambda path: list(read_lines(path))):
        with pytest.raises(UserError, match=words):
            read(tmp_path / "a.txt")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=words):
        read_file(tmp_path / "a.txt.gz")


def test_json_says_each_thing_once_and_only_numbers_that_json_knows():
    """Bug: of two equal keys the last was read; NaN was read, and no other program could later."""
    assert parse_json('{"a": [1, 2.5, null, "NaN"], "b": {"a": -1e300}}') == {
        "a": [1, 2.5, None, "NaN"], "b": {"a": -1e300}}
    for text, words in [('[{"a": 1, "b": 2, "a": 3}]', '"a" twice'), ("[NaN]", "found NaN"),
                        ("-Infinity", "found -Infinity"), ("1e400", "found 1e400"),
                        ("{", "broken JSON"), ("[" * 10**5, "nested too deeply")]:
        with pytest.raises(UserError, match=words):
            parse_json(text)


def test_a_compressed_file_reads_like_a_plain_one(tmp_path):
    assert write_lines(tmp_path / "a.txt.gz", iter(["one", "two"])) == 2
    assert gzip.decompress((tmp_path / "a.txt.gz").read_bytes()) == b"one\ntwo\n"
    assert read_file(tmp_path / "a.txt.gz") == "one\ntwo\n"


@pytest.mark.parametrize("name", ["ckpt.pt", "rows.jsonl.gz"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"old")

    def half(part):
        part.write_bytes(b"half of the ne")
        assert path.read_bytes() == b"old"
        raise OSError("disk full")

    with pytest.raises(UserError, match=f"{name} cannot be written .disk full.; make room"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [name]
    write_atomically(str(path), lambda part: part.write_bytes(b"new"))
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_missing_file_is_answered_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="no such file; check the path"):
        read_file(tmp_path / "x.txt")
    assert how_to_make("out/preferences.jsonl") == (
        "; make it with: python data/toy/annotate.py out/samples.jsonl --out out/preferences.jsonl")
    assert how_to_make("sft") == "; make it with: python train_sft.py"
    assert how_to_make(Path("out/mine")) == "; check the path"


def test_every_default_input_of_a_script_has_its_command():
    from tiny_road import SCRIPTS  # it imports every script

    inputs = {field.default for script in SCRIPTS.values()
              for field in dataclasses.fields(script.Config)
              if field.type is str and "/" in str(field.default) and field.name != "out"}
    for name in inputs:  # a run's folder is named after its stage
        assert name.removeprefix("out/") in MADE_BY or name in MADE_BY, name
