"""What sample.py is asked, and where it is to write."""

from malformed import Case, write


def case(name, words, make=lambda road, folder: {}, *flags, **options):
    """make(road, folder) -> options of sample.py."""
    def argv(road, folder):
        chosen = {"model": road.folder / "sft", **make(road, folder), **options}
        return ["sample.py", *flags, *(f"--{option}={value}" for option, value in chosen.items())]
    return Case(name, argv, words)


def saved(name, words, make=lambda road, folder: {}, **options):
    """The same, of a file of prompts whose samples are to be saved."""
    return case(name, words, lambda road, folder: {
        "prompts": road.prompts, "save": folder / "s.jsonl", **make(road, folder)}, **options)


CASES = [
    # Options that do nothing together, or nothing at all.
    case("an empty prompt", "give one of --prompt TEXT", prompt=""),
    case("a blank prompt", "expected --prompt to have text in it", prompt=" \t\n"),
    case("half a character as a prompt", "expected --prompt to be whole characters",
         prompt="cow\udcff?"),
    case("half a character to go on with", "expected --prompt to be whole characters",
         lambda road, folder: {}, "--plain", prompt="\udcff"),
    case("a blank system message", "expected --system to have text in it", prompt="cow?",
         system="  "),
    case("a system message for plain text", "--system goes with --prompt", lambda road, folder: {},
         "--plain", prompt="cow?", system="Be brief."),
    saved("a system message for a file", "a file's prompts bring their own", system="Be brief."),
    case("a ledger of a conversation", "--ledger goes with", lambda road, folder: {
        "ledger": folder / "look"}, "--chat"),
    case("a ledger of plain text", "--ledger goes with", lambda road, folder: {
        "ledger": folder / "look"}, "--plain", prompt="cow?"),
    case("a limit of one prompt", "--limit goes with --prompts", prompt="cow?", limit=1),
    case("several answers in a conversation", "--num_samples with all but --chat",
         lambda road, folder: {}, "--chat", num_samples=2),
    case("a conversation without room", "leaves no room for a conversation in a context of 64",
         lambda road, folder: {}, "--chat", max_new_tokens=64),
    case("a conversation of 10^9 tokens", "leaves no room", lambda road, folder: {}, "--chat",
         max_new_tokens=10**9),
    case("no --save", "go together", lambda road, folder: {"prompts": road.prompts}),
    # Sizes.
    saved("a billion samples", "more than 5,000,000 samples", num_samples=10**9),
    case("a billion samples of one prompt", "more than 5,000,000 samples", prompt="cow?",
         num_samples=10**9),
    case("a billion samples of plain text", "more than 5,000,000 samples",
         lambda road, folder: {}, "--plain", prompt="cow?", num_samples=10**9),
    case("a batch of millions", "--batch_size 4000000: expected at most 100,000 sequences",
         prompt="cow?", num_samples=4_000_000, batch_size=4_000_000),
    saved("the largest number of samples", "--num_samples: expected a whole number up to a billion",
          num_samples=2**63 - 1),
    saved("more than the largest", "up to a billion", num_samples=2**63),
    saved("a temperature that overflows", "--temperature 1e-30: expected 0 (greedy)",
          temperature=1e-30),
    saved("a temperature just too small", "expected 0 (greedy), or from 0.001", temperature=9e-4),
    saved("a temperature of words", "--temperature: invalid float value", temperature="warm"),
    saved("top_k below zero", "--top_k -1: expected", top_k=-1),
    saved("no prompts in the file", "found blank lines only", lambda road, folder: {
        "prompts": write(folder, "p.jsonl", "\n\n")}),
    # Outputs.
    saved("--save is a folder", "{folder}/s.jsonl is a folder", lambda road, folder: {
        "save": (folder / "s.jsonl").mkdir() or folder / "s.jsonl"}),
    saved("--save ends in a slash", "expected a name in .jsonl", lambda road, folder: {
        "save": f"{folder}/"}),
    saved("--save below a file", "since {folder}/mine is a file", lambda road, folder: {
        "save": write(folder, "mine", "x") + "/s.jsonl"}),
    saved("--save in another format", "s.csv: expected a name in .jsonl", lambda road, folder: {
        "save": folder / "s.csv"}),
    saved("--save without an ending", "expected a name in .jsonl", lambda road, folder: {
        "save": folder / "samples"}),
    saved("--save onto the prompts", "exists, and minirlhf did not write it",
          lambda road, folder: dict.fromkeys(("prompts", "save"), write(
              folder, "p.jsonl", [{"prompt": "cow?"}]))),
    saved("--save onto samples that are the prompts", "is also --prompts",
          lambda road, folder: dict.fromkeys(("prompts", "save"), write(
              folder, "p.jsonl", [{"samples": [{"text": "a", "ended": True}], "prompt": "cow?"}]))),
    saved("--save onto other rows", "exists, and minirlhf did not write it", lambda road, folder: {
        "save": write(folder, "s.jsonl", [{"prompt": "cow?", "chosen": "a", "rejected": "b"}])}),
    saved("--save onto an empty file", "exists, and minirlhf did not write it",
          lambda road, folder: {"save": write(folder, "s.jsonl", "")}),
    saved("--save onto a list", "exists, and minirlhf did not write it", lambda road, folder: {
        "save": write(folder, "s.jsonl", '["samples"]\n')}),
    saved("--save onto brackets without end", "exists, and minirlhf did not write it",
          lambda road, folder: {"save": write(folder, "s.jsonl", "[" * 100_000)}),
    saved("--save onto bytes", "expected text in UTF-8, found text in UTF-16", lambda road, folder: {
        "save": write(folder, "s.jsonl", b"\xff\xfe")}),
    saved("--save onto what only says gzip", "expected a whole gzip file", lambda road, folder: {
        "save": write(folder, "s.jsonl.gz", "{}")}),
    saved("--save onto a device", "is no ordinary file", lambda road, folder: {
        "save": (folder / "s.jsonl").symlink_to("/dev/zero") or folder / "s.jsonl"}),
    case("the ledger's folder is a file", "since {folder}/look is a file", lambda road, folder: {
        "ledger": write(folder, "look", "x")}, prompt="cow?"),
    case("the ledger below a file", "since {folder}/look/ledger is a file", lambda road, folder: {
        "ledger": (write(folder, "look/ledger", "x") and folder / "look")}, prompt="cow?"),
    case("the ledger of a run", "holds a run, with a ledger of its own", lambda road, folder: {
        "ledger": road.folder / "sft"}, prompt="cow?"),
]
