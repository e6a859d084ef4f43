"""Bugs to plant into minirlhf/look/plot.py."""

from bugs import Bug

FILE = "minirlhf/look/plot.py"
BUGS = [
    Bug("plain", 'text.replace("$", r"\\$")', "text", "test_text_with_dollars",
        "a picture's text with dollars is set as a formula"),
    Bug("draw_sequence", "at = at[:MOST_TOKENS]", "at = at[-MOST_TOKENS:]",
        "test_a_long_or_broken_sequence", "a picture of a long sequence shows its end"),
    Bug("draw_sequence", "np.nan_to_num(np.abs(values - shift), posinf=0)",
        "np.abs(values - shift)", "test_a_long_or_broken_sequence",
        "one NaN takes the colours from a picture's whole line"),
    Bug("check_picture", "if not ours or", "if", "test_each_kind_of_picture",
        "a picture is written over somebody's notes"),
    Bug("draw_runs", 'all("accuracy" in rows[-1]', 'any("accuracy" in rows[-1]',
        "test_only_a_preference_loss", "a picture draws a preference loss's guess for any loss"),
]
