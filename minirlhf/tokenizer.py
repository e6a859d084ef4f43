"""A byte-level BPE tokenizer trained here, and the chat template that turns messages into ids.

A language model reads numbers, not letters, so text is first cut into tokens. Byte-pair encoding
starts from the 256 single bytes, which makes every text encodable, and then again and again glues
together the pair of neighbours that occurs most often, until the vocabulary is full. What is
learned is only the list of tokens in the order of their making, their *ranks*: id 0..255 are the
bytes, id 256 is the first merge. Encoding a text repeats the merges, lowest rank first; that part
is the same for everybody, so tiktoken does it for us with our ranks, fast.

    python -m minirlhf.tokenizer FILE [FILE ...] --vocab_size 1024 --out data/toy/tokenizer.json
"""

import argparse
import base64
import hashlib
import heapq
import json
import sys
from collections import Counter, defaultdict

import regex  # like re, but it knows \p{L}, "any letter of any script"
import tiktoken

from minirlhf.plumbing.errors import UserError
from minirlhf.plumbing.files import check_output, parse_json, read_file, write_text
from minirlhf.plumbing.formats import read_documents

LARGEST = 1_000_000  # ids in a vocabulary; published ones have up to a quarter of that

# Their ids follow the ranks, in this order. They exist only as ids: no text encodes to them.
SPECIAL_TOKENS = ("<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# Text is cut into pieces first, and merges never cross a piece: otherwise "dog.", "dog!" and
# "dog?" would each become a token. A word keeps the space before it (" dog" is one token), so
# that a sentence needs no tokens for its spaces. These are GPT-2's rules with three changes: it
# makes one piece of a number of any length, so 1987 gets a token of its own; it cuts a Hindi word
# at each vowel sign, which Unicode calls a mark, \p{M}; and it has no 64 below, where a very long
# run of spaces overflows the stack of the regex engine.
SPLIT_PATTERN = "|".join([
    r"'(?:[sdmt]|ll|ve|re)",  # English endings: 's 'd 'm 't 'll 've 're
    r" ?\p{L}[\p{L}\p{M}]*",  # a word: letters of any script with their accents and vowel signs
    r" ?\p{N}{1,3}",          # up to three digits
    r" ?[^\s\p{L}\p{N}]+",    # punctuation, symbols, emoji
    r"\s{1,64}(?!\S)",        # whitespace, less the last space, which belongs to the next word
    r"\s",                    # a single tab or line break just before a word
])


# ---------------------------------------------------------------- training

def train_bpe(texts, num_merges, pattern=SPLIT_PATTERN):
    """Learn a byte-pair vocabulary: a list of token bytes, where the index is the id.

    texts: a str or an iterable of str; their order does not matter. num_merges: how many tokens
    to add to the 256 bytes; fewer come back only if each piece has become one token before.
    Of pairs that occur equally often, the one with the smaller (left id, right id) goes first,
    so the same text always gives the same vocabulary.
    Source: Sennrich, Haddow, Birch, arXiv 1508.07909; here over bytes, as in GPT-2.
    """
    words, counts = count_pieces(texts, pattern)
    pair_counts = Counter()      # pair of ids -> how often it occurs in all the text
    found_in = defaultdict(set)  # pair of ids -> the words that hold it: a merge visits only those
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            found_in[pair].add(i)

    # The heap pops the most frequent pair: the smallest -count, then the smallest pair. A merge
    # lowers the counts of pairs that are in the heap already. Their entries come out too early,
    # never too late, so it is enough to look when one is popped, and to put it back.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    ranks = [bytes([b]) for b in range(256)]
    while heap and len(ranks) < 256 + num_merges:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        new_id, new_pairs = len(ranks), set()
        ranks.append(ranks[pair[0]] + ranks[pair[1]])
        for i in found_in.pop(pair):
            old, words[i] = words[i], merge_pair(words[i], pair, new_id)
            for neighbours in zip(old, old[1:]):
                pair_counts[neighbours] -= counts[i]
            for neighbours in zip(words[i], words[i][1:]):
                pair_counts[neighbours] += counts[i]
                if new_id in neighbours:
                    found_in[neighbours].add(i)
                    new_pairs.add(neighbours)
        for neighbours in new_pairs:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    return ranks


def count_pieces(texts, pattern):
    """The different pieces of the texts as lists of byte values, and how often each occurs.

    A text repeats its words, so merging each piece once, not each occurrence, saves nearly all
    the work. errors="replace" concerns lone surrogates, half characters without UTF-8 bytes.
    """
    pieces = Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        pieces.update(regex.findall(pattern, text))
    return [list(piece.encode("utf-8", errors="replace")) for piece in pieces], [*pieces.values()]


def merge_pair(word, pair, new_id):
    """Replace `pair` by `new_id` in a list of ids, from left to right: aaa becomes (aa)a."""
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# ---------------------------------------------------------------- the tokenizer

PROBE = "A  word's 12345 of\tanything:\n\n é! 海 हिन्दी \N{GRINNING FACE}  "


def check_pattern(pattern):
    """Raise UserError unless the pattern cuts PROBE into pieces without losing any of it."""
    try:
        pieces = [found[0] for found in regex.finditer(pattern, PROBE)]
    except (regex.error, MemoryError) as error:  # the latter where it calls itself without end
        raise UserError(f"the tokenizer's pattern is no regular expression: {error}") from error
    if "" in pieces or "".join(pieces) != PROBE:
        raise UserError(f"the tokenizer's pattern {pattern[:60]!r} loses text: its pieces have to "
                        "be the whole text, none of them empty")


class Tokenizer:
    """Text to ids and back, and chats to ids and loss mask.

    ranks: list of distinct bytes, index = id, the 256 single bytes among them. The special
    tokens get the ids after them. name: set when the ranks are published ones (see `named`).
    """

    def __init__(self, ranks, pattern=SPLIT_PATTERN, name=None):
        ids = {token: idx for idx, token in enumerate(ranks)}
        if len(ids) != len(ranks) or b"" in ids or any(bytes([b]) not in ids for b in range(256)):
            raise UserError("a vocabulary needs all 256 single bytes, and each token only once, "
                            "none of them empty")
        check_pattern(pattern)
        self.ranks, self.pattern, self.name = list(ranks), pattern, name
        specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.begin_id, self.system_id, self.user_id, self.assistant_id, self.end_id = (
            specials.values())
        try:
            self.encoding = tiktoken.Encoding(
                name or "minirlhf", pat_str=pattern, mergeable_ranks=ids, special_tokens=specials)
        except ValueError as error:  # it knows fewer expressions than `regex`
            raise UserError(f"tiktoken can't use the tokenizer's pattern: {error}") from error
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(f"the tokenizer's pattern {pattern[:60]!r} loses text in tiktoken")

    @property
    def n_vocab(self):
        """Number of ids, the special tokens included: the model's vocabulary size."""
        return len(self.ranks) + len(SPECIAL_TOKENS)

    @classmethod
    def train(cls, texts, vocab_size):
        """Train on a str or an iterable of str; vocab_size counts the special tokens too."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if not smallest <= vocab_size <= LARGEST:
            raise UserError(f"vocab_size is {vocab_size}, but the 256 bytes and the special "
                            f"tokens alone need {smallest}: choose at least that, and at most "
                            f"{LARGEST:,}")
        tokenizer = cls(train_bpe(texts, vocab_size - smallest))
        if tokenizer.n_vocab < vocab_size:
            raise UserError(f"vocab_size is {vocab_size}, but this text has only enough different "
                             f"words for {tokenizer.n_vocab}: lower it, or give more text")
        return tokenizer

    @classmethod
    def named(cls, name):
        """A published vocabulary, such as "gpt2", with our special tokens after its ranks.

        tiktoken downloads it once and keeps a copy. Its own special tokens are left out, so in
        GPT-2's case <|begin|> has the id of <|endoftext|>, which marked where a document begins.
        """
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network; no such name
            reason = str(error).splitlines()[0]
            raise UserError(f"tiktoken can't fetch the tokenizer {name!r}: {reason} (check name "
                             "and network, or train one: see python -m minirlhf.tokenizer --help)"
                             ) from error
        # Private names, but the ones that tiktoken's own README extends an encoding with.
        id_of = encoding._mergeable_ranks
        return cls(sorted(id_of, key=id_of.get), encoding._pat_str, name)

    @classmethod
    def from_tiktoken_file(cls, path, pattern=SPLIT_PATTERN):
        """Read a ranks file in tiktoken's format: a line per token, its base64 bytes and its id.

        Such a file does not say how its text was split, so `pattern` has to.
        """
        ranks = []
        for i, line in enumerate(read_file(path).splitlines()):
            try:
                token, idx = line.split()
                ranks.append(base64.b64decode(token, validate=True))
                if int(idx) != i:
                    raise ValueError
            except ValueError as error:
                raise UserError(f"{path}, line {i + 1}: expected base64 bytes and the id {i}, "
                                 f"found {line[:60]!r}") from error
        try:
            return cls(ranks, pattern)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    # ---- storing

    def to_dict(self):
        """All that defines the tokenizer, as str and lists: fit for JSON and for a checkpoint."""
        return {"name": self.name} if self.name else self._content()

    def _content(self):
        # latin-1 maps byte 0..255 to character 0..255, so English tokens stay readable.
        return {"pattern": self.pattern, "special_tokens": list(SPECIAL_TOKENS),
                "ranks": [token.decode("latin-1") for token in self.ranks]}

    @classmethod
    def from_dict(cls, d):
        """The inverse of `to_dict`; ValueError if `d` is not one of its dicts."""
        if isinstance(d, dict) and isinstance(d.get("name"), str):
            return cls.named(d["name"])
        if isinstance(d, dict) and isinstance(d.get("model"), dict):
            raise UserError("a tokenizer of Hugging Face's library, which can't be read; train one "
                            "(python -m minirlhf.tokenizer --help), or name a published one: gpt2")
        try:
            if tuple(d["special_tokens"]) != SPECIAL_TOKENS:
                raise UserError(f"its special tokens are {str(d['special_tokens'])[:60]}, expected "
                                f"{SPECIAL_TOKENS}: train the tokenizer again")
            if not isinstance(d["ranks"], list):  # a text would be taken for a list of letters
                raise TypeError
            return cls([token.encode("latin-1") for token in d["ranks"]], d["pattern"])
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
            raise UserError("not a tokenizer: expected the keys pattern, special_tokens and "
                             "ranks, as `python -m minirlhf.tokenizer` writes them") from error

    def save(self, path):
        """Write tokenizer.json, a token a line; whole or not at all, even if interrupted."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; ValueError naming the file if it is missing or broken."""
        text = read_file(path)
        try:
            return cls.from_dict(parse_json(text))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def open(cls, where):
        """A tokenizer.json, a ranks file (.tiktoken) or a published name such as gpt2."""
        if str(where).endswith(".json"):
            return cls.load(where)
        if str(where).endswith(".tiktoken"):
            return cls.from_tiktoken_file(where)
        return cls.named(where)

    def fingerprint(self):
        """12 hex digits that differ between vocabularies: a checkpoint of another is refused."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()[:12]

    # ---- text

    def encode(self, text):
        """Ids of a text, a list of int. "<|end|>" in it is plain text, never the special token."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts, num_threads=2):
        """`encode` of each text of a list."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids):
        """Text of ids (list or 1-D tensor). Special tokens show as their names; bytes that are no
        whole UTF-8 character, as a model may sample them, show as the replacement sign."""
        return self.encoding.decode([int(idx) for idx in ids], errors="replace")

    def token_bytes(self, idx):
        """The bytes of one id. Not a str: a token may hold a part of a character only."""
        return self.encoding.decode_single_token_bytes(int(idx))

    def decode_response(self, ids):
        """Text of sampled ids up to the first end token, which is left out."""
        ids = [int(idx) for idx in ids]
        return self.decode(ids[:ids.index(self.end_id)] if self.end_id in ids else ids)

    # ---- chats

    def encode_chat(self, messages, add_assistant=False):
        """The chat template: messages to ids, and the mask of what a model is trained to say.

            <|begin|> <|user|>Hi! <|end|> <|assistant|>Hello. <|end|> ...   (spaces for the eye)

        messages: list of {"role", "content"}: perhaps one system message, then user and assistant
        in turn. Content is encoded as it is: no space is stripped or added. add_assistant: close
        with <|assistant|>, so that a model goes on with the answer.
        Returns ids, a list of int, and loss_mask, a list of bool of the same length: True at the
        content of every assistant turn and at its <|end|>, for a model that is never trained on
        the end never stops; but a message with "train": False is read only. ids of a chat start
        with the ids of its first messages.
        """
        check_messages(messages, add_assistant)
        role_ids = {"system": self.system_id, "user": self.user_id, "assistant": self.assistant_id}
        ids, loss_mask = [self.begin_id], [False]
        for message in messages:
            content = self.encode(message["content"])
            trained = message["role"] == "assistant" and message.get("train", True)
            ids += [role_ids[message["role"]], *content, self.end_id]
            loss_mask += [False] + [trained] * (len(content) + 1)  # + 1: the end token
        if add_assistant:
            ids.append(self.assistant_id)
            loss_mask.append(False)
        return ids, loss_mask

    def encode_prompt(self, messages):
        """Ids from which a model answers: the chat, then <|assistant|>."""
        return self.encode_chat(messages, add_assistant=True)[0]


def check_messages(messages, add_assistant=False):
    """Raise ValueError unless roles are (system), user, assistant, user, ... and contents str."""
    if not messages:
        raise UserError("a chat needs at least one message, found none")
    allowed = ("system", "user")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {i + 1}: expected a role and a content, "
                             f"found {str(message)[:60]!r}")
        role, content = message["role"], message["content"]
        if role not in allowed:
            raise UserError(f"message {i + 1}: expected the role {' or '.join(allowed)}, found "
                             f"{role!r} (perhaps one system, then user and assistant in turn)")
        if not isinstance(content, str):
            raise UserError(f"message {i + 1}: expected a text as content, "
                             f"found {type(content).__name__}")
        allowed = ("assistant",) if role == "user" else ("user",)
    if add_assistant and role != "user":
        raise UserError(f"the last message of a prompt must be the user's, found {role!r}")


# ---------------------------------------------------------------- files and command line

def is_tokenizer(text):
    """Whether a file's text is what `Tokenizer.save` writes."""
    try:
        content = parse_json(text)
    except UserError:
        return False
    return isinstance(content, dict) and ("special_tokens" in content or [*content] == ["name"])


def refuse_words(message):
    """argparse's own way out prints its usage, too; here every mistake is answered in one line."""
    raise UserError(f"{message}; --help lists every option")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minirlhf.tokenizer", allow_abbrev=False,
                                     description="Train a byte-level BPE tokenizer.")
    parser.add_argument("files", nargs="+", help=".txt or .jsonl, perhaps with .gz after it")
    parser.add_argument("--vocab_size", type=int, default=1024, help="special tokens included")
    parser.add_argument("--out", default="data/toy/tokenizer.json", help="file to write, a .json")
    parser.error = refuse_words
    try:
        args = parser.parse_args(argv)
        check_output(args.out, is_tokenizer)
        if not args.out.endswith(".json"):  # by its end --tokenizer tells it from a published name
            raise UserError(f"--out {args.out}: expected a name in .json")
        tokenizer = Tokenizer.train(texts_of(args.files), args.vocab_size)
        tokenizer.save(args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    num_bytes, num_tokens, longest_text = 0, 0, ""
    for text in texts_of(args.files):
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(tokenizer.encode(text))
        longest_text = max(longest_text, text[:400], key=len)
    longest = sorted(tokenizer.ranks, key=len, reverse=True)[:8]
    example = tokenizer.encode(" ".join(longest_text.split())[:80])
    print(f"vocabulary      {tokenizer.n_vocab} = 256 bytes + {len(tokenizer.ranks) - 256} merges "
          f"+ {len(SPECIAL_TOKENS)} special tokens")
    print(f"text            {num_bytes:,} bytes = {num_tokens:,} tokens, "
          f"{num_bytes / num_tokens:.2f} bytes per token")
    print(f"longest tokens  {[token.decode('utf-8', errors='replace') for token in longest]}")
    print(f"an example      {'|'.join(tokenizer.decode([idx]) for idx in example)}")
    print(f"written         {args.out}, fingerprint {tokenizer.fingerprint()}")


def texts_of(paths):
    """The texts of all files, one after the other, read as they are asked for."""
    return (text for path in paths for text in read_documents(path, dialogues=True))


if __name__ == "__main__":
    main()
