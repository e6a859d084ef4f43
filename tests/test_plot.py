"""The pictures: which numbers they show, and where."""

import errno
import json
import math
import shutil

import malformed.looking
import numpy as np
import pytest

from minirlhf.look import plot
from minirlhf.plumbing.errors import UserError


def rows_of(count, **columns):
    """Metrics of `count` steps; a column is a function of the step, or None for a missing one."""
    return [{"step": i, **{name: f(i) for name, f in columns.items() if f(i) is not None}}
            for i in range(1, count + 1)]


def write_run(folder, rows):
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """[(figure, path)] of what was to be saved."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda fig, path: figures.append((fig, path)))
    return figures


def lines_of(ax):
    """[(label, xs, ys)] of the curves of a panel."""
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata()))
            for line in ax.lines]


def level(ax, label):
    """The height of the one horizontal line with this label."""
    (ys,) = [ys for name, _, ys in lines_of(ax) if name == label]
    assert ys[0] == ys[1] and len(ys) == 2
    return ys[0]


# ---------------------------------------------------------------- curves

def test_smoothing_by_hand():
    assert plot.smooth([0.0, 3.0, 6.0, 0.0], window=3) == [1.5, 3.0, 3.0, 3.0]
    values = [float(i == 6) for i in range(13)]  # a point reaches four steps to either side
    assert plot.smooth(values) == pytest.approx(
        [0, 0, 1 / 7, 1 / 8, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 8, 1 / 7, 0, 0])


@pytest.mark.parametrize("count, curves", [(3, 1), (20, 1), (21, 2)])
def test_a_long_curve_is_drawn_pale_and_smoothed_over_it(count, curves):
    ax = plot.new_figure(4, 3).subplots()
    rows = rows_of(count, loss=lambda i: float(i * i), val=lambda i: 1.0)
    plot.draw(ax, rows + [{"step": 99, "val": 2.0}], "loss", "mine", "red")
    steps, values = list(range(1, count + 1)), [float(i * i) for i in range(1, count + 1)]
    found = lines_of(ax)
    assert len(found) == curves and all(xs == steps for _, xs, _ in found)
    assert found[0][2] == values
    assert found[-1][0] == "mine"
    assert found[-1][2] == (plot.smooth(values) if curves == 2 else values)
    assert ax.lines[-1].get_marker() == ("o" if count == 3 else "None")


def test_each_logged_metric_has_a_panel_with_its_unit_its_guess_and_all_runs(drawn, tmp_path):
    one = write_run(tmp_path / "a" / "rm", rows_of(
        5, loss=lambda i: 1 / i, accuracy=lambda i: 0.6, lr=lambda i: 0.1, kl=lambda i: 2.0,
        val_loss=lambda i: 0.5))
    two = write_run(tmp_path / "b" / "rm", rows_of(4, loss=lambda i: i, accuracy=lambda i: 0.7))
    plot.draw_runs([one, two], tmp_path / "x.png")
    [(fig, path)] = drawn
    assert path == tmp_path / "x.png"
    panels = {ax.get_title().split(":")[0]: ax for ax in fig.axes if ax.axison}
    assert list(panels) == ["loss", "val_loss", "accuracy", "kl"]  # learning rates are no news
    assert len(fig.axes) == 6
    assert all(ax.get_xlabel() == "step" for ax in panels.values())
    assert panels["kl"].get_ylabel() == "nats per response"
    # Both runs are called rm, so their whole paths tell them apart.
    named = {name: (xs, ys) for name, xs, ys in lines_of(panels["loss"])}
    assert named[str(one)] == ([1, 2, 3, 4, 5], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert named[str(two)] == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert [name for name, *_ in lines_of(panels["kl"])] == [str(one), "the reference"]
    assert panels["loss"].lines[0].get_color() != panels["loss"].lines[1].get_color()
    assert panels["loss"].get_legend() is not None
    assert level(panels["accuracy"], "guessing") == 0.5
    assert level(panels["loss"], "guessing") == level(panels["val_loss"], "guessing") == math.log(2)
    assert level(panels["kl"], "the reference") == 0


def test_only_a_preference_loss_has_a_guess(drawn, tmp_path):
    """Bug: log 2 drawn into the loss of a language model, which guesses log of its vocabulary."""
    ranked = write_run(tmp_path / "rm", rows_of(3, loss=lambda i: i, accuracy=lambda i: 0.5))
    plain = write_run(tmp_path / "sft", rows_of(3, loss=lambda i: i))
    plot.draw_runs([ranked, plain], "x.png")
    ax = drawn[0][0].axes[0]
    assert [name for name, *_ in lines_of(ax)] == ["rm", "sft"]


@pytest.mark.parametrize("num_keys, shape", [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 3))])
def test_panels_stand_in_rows_of_three(num_keys, shape, drawn, tmp_path):
    keys = list(plot.PANELS)[:num_keys]
    folder = write_run(tmp_path / "ppo", rows_of(3, **{key: float for key in keys}))
    plot.draw_runs([folder], "x.png")
    fig = drawn[0][0]
    assert fig.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    assert sum(ax.axison for ax in fig.axes) == num_keys


def test_runs_without_any_metric_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics"):
        plot.metrics_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no metrics"):
        plot.metrics_of(tmp_path)
    folder = write_run(tmp_path / "a", rows_of(3, lr=float))
    with pytest.raises(ValueError, match="none of loss, .* was logged"):
        plot.draw_runs([folder], "x.png")


def test_a_picture_is_saved_and_its_name_told(tmp_path, capsys):
    fig = plot.new_figure(4, 3)
    fig.subplots()
    plot.save(fig, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"drawn: {tmp_path / 'x.png'}\n"


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_each_kind_of_picture_begins_as_it_should_and_may_be_drawn_again(suffix, tmp_path):
    """Bug: the picture's own name ends in .part while it is written, which tells no kind."""
    path = tmp_path / f"x{suffix}"
    folder = write_run(tmp_path / "ppo", rows_of(4, kl=float))
    plot.draw_runs([folder], path)
    assert path.read_bytes().startswith(plot.KINDS[suffix])
    plot.draw_runs([folder], path)  # over a picture of the same kind
    path.write_text("my notes", encoding="utf-8")
    with pytest.raises(UserError, match="no .* picture; give another name"):
        plot.draw_runs([folder], path)
    assert path.read_text(encoding="utf-8") == "my notes" and len(list(tmp_path.iterdir())) == 2


def test_curves_that_cannot_be_written_end_a_run_with_a_message(tmp_path, monkeypatch):
    """Bug: hours of training ended in a traceback, since a folder stood in the picture's place, or
    the disk was full. `draw_curves` comes after the last checkpoint, which stays as it is."""
    folder = write_run(tmp_path / "ppo", rows_of(4, kl=float))
    (folder / "ckpt.pt").write_text("whole", encoding="utf-8")
    (folder / "curves.png" / "kept").mkdir(parents=True)
    with pytest.raises(UserError, match="curves.png is a folder"):
        plot.draw_curves(folder)
    shutil.rmtree(folder / "curves.png")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", full)
        with pytest.raises(UserError, match="curves.png cannot be written .No space left"):
            plot.draw_curves(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt", "metrics.jsonl"]
    plot.draw_curves(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_text_with_dollars_is_no_formula(tmp_path):
    """Bug: a token such as `$x^$` was set as mathematics, and ended in a traceback."""
    assert "$" not in plot.plain("$a^$").replace(r"\$", "")
    folders = [write_run(tmp_path / name, rows_of(4, kl=float)) for name in ("$a^$", "$_$")]
    plot.draw_runs(folders, tmp_path / "x.png")
    assert plot.plain("a$b") == r"a\$b"
    run = malformed.looking.recorded(tmp_path)
    record = json.loads((run / "ledger" / "step_000001.json").read_text(encoding="utf-8"))
    record["pieces"] = [["", "", "", "$x^$", "$\\frac$"]] * 2
    (run / "ledger" / "step_000001.json").write_text(json.dumps(record), encoding="utf-8")
    plot.draw_sequence(run.rename(tmp_path / "$^$"), tmp_path / "y.png")


def test_a_long_or_broken_sequence_is_drawn_as_far_as_it_can_be(drawn, monkeypatch):
    """Bugs: a picture wider than any may be; one NaN takes the colours from all of its line."""
    n = 250
    rows = {"response_mask": np.ones((1, n), dtype=bool), "kl": np.full((1, n), 0.5),
            "values": np.full((1, n), 0.25)}
    rows["kl"][0, 3], rows["kl"][0, 4], rows["kl"][0, 5] = math.nan, math.inf, -1.0
    monkeypatch.setattr(plot, "recorded_steps", lambda folder: [1])
    monkeypatch.setattr(plot, "load", lambda *_: {"rows": rows, "pieces": [["x"] * (n + 1)]})
    monkeypatch.setattr(plot, "find_row", lambda record, row: row)
    plot.draw_sequence("out/ppo", "x.png")
    ax = drawn[0][0].axes[0]
    shade = np.ma.filled(ax.images[0].get_array(), math.nan)
    assert shade.shape == (2, 100) and "the first 100 of 250 tokens" in ax.get_title()
    assert shade[0, 0] == 0.5 and shade[0, 5] == -1.0 and not np.isfinite(shade[0, 3:5]).any()


# ---------------------------------------------------------------- one sequence

def test_a_sequences_heat_map_by_hand(drawn, monkeypatch):
    """Each tensor by its own scale, the ratio around 1; a column for each response token."""
    mask = np.array([[False] * 4, [False, True, True, False]])
    rows = {"response_mask": mask, "kl": np.array([[9.0] * 4, [7.0, 0.5, -0.25, 7.0]]),
            "ratio": np.array([[9.0] * 4, [7.0, 1.0, 1.2, 7.0]]),
            "values": np.array([[9.0] * 4, [7.0, 0.0, 0.0, 7.0]])}
    pieces = [["?"] * 5, ["<|begin|>", "a", " moo", "!", ""]]
    asked = []
    monkeypatch.setattr(plot, "recorded_steps", lambda folder: [1, 20, 40])
    monkeypatch.setattr(plot, "load", lambda folder, step: asked.append(step) or {
        "rows": rows, "pieces": pieces})
    monkeypatch.setattr(plot, "find_row", lambda record, row: row)
    plot.draw_sequence("out/ppo", "x.png", row=1)
    plot.draw_sequence("out/ppo", "x.png", step=20, row=1)
    assert asked == [40, 20]
    ax = drawn[0][0].axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["kl", "values", "ratio"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["·moo", "!"]
    np.testing.assert_allclose(ax.images[0].get_array(), [[1.0, -0.5], [0.0, 0.0], [0.0, 1.0]])
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "0.50", (1, 0): "-0.25", (0, 1): "0.00", (1, 1): "0.00", (0, 2): "1.00",
        (1, 2): "1.20"}
    assert "ppo, step 40, row 1" in ax.get_title()


def test_the_first_sequence_is_drawn_unless_another_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(plot, "draw_sequence", lambda *args: calls.append(args))
    monkeypatch.setattr(plot, "draw_runs", lambda *args: calls.append(args))
    for words in (["a", "--step", "3"], ["a", "--row", "0"], ["a", "--row", "2", "--save", "s"],
                  ["a", "b"], ["a", "--save", "s"]):
        plot.main(words)
    assert calls == [("a", "sequence.png", 3, 0), ("a", "sequence.png", None, 0),
                     ("a", "s", None, 2), (["a", "b"], "runs.png"), (["a"], "s")]


# ---------------------------------------------------------------- a road's end

@pytest.mark.parametrize("ceiling", [None, 0.8])
def test_a_roads_picture_shows_each_stage_with_what_it_should_reach(ceiling, drawn, tmp_path):
    keys = {"pretrain": ["val_loss"], "sft": ["val_loss"], "rm": ["accuracy"],
            "ppo": ["gold", "score", "kl"], "dpo": ["accuracy"]}
    for n, (stage, names) in enumerate(keys.items()):
        write_run(tmp_path / stage, rows_of(3, **{
            name: lambda i, n=n, k=k: i + 10 * n + 100 * k for k, name in enumerate(names)}))
    plot.draw_road(tmp_path, "x.png", ceiling)
    axes = drawn[0][0].axes
    assert [ax.get_title().split(":")[0].split()[0] for ax in axes] == [
        "Pretraining", "SFT", "Reward", "PPO", "PPO", "DPO"]
    curves = [[ys for _, _, ys in lines_of(ax) if len(ys) == 3] for ax in axes]
    assert curves == [[[1, 2, 3]], [[11, 12, 13]], [[21, 22, 23]],
                      [[31, 32, 33], [131, 132, 133]], [[231, 232, 233]], [[41, 42, 43]]]
    assert [ax.get_xlabel() for ax in axes] == ["step"] * 3 + ["iteration"] * 2 + ["step"]
    assert [name for name, *_ in lines_of(axes[3])] == [
        "gold score (never trained on)", "reward model's score (normalised)"]
    assert axes[3].lines[0].get_color() != axes[3].lines[1].get_color()
    assert level(axes[2], "guessing") == level(axes[5], "guessing") == 0.5
    assert [ax.get_legend() is not None for ax in axes] == [False, False, True, True, False, True]
    limits = [[ys[0] for name, _, ys in lines_of(ax) if name.startswith("ceiling")] for ax in axes]
    assert limits == [[], [], [0.8] if ceiling else [], [], [], []]


def test_gold_by_stage_shows_means_as_bars_and_seeds_as_dots(drawn):
    players = {"base": [-1.0, -2.0], "sft": [0.5, 0.7], "ppo": [1.0, 1.2]}
    plot.draw_gold_by_stage(players, "x.png")
    ax = drawn[0][0].axes[0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([-1.5, 0.6, 1.1])
    dots = [(xs, ys) for _, xs, ys in lines_of(ax)][:3]
    assert dots == [([i, i], players[name]) for i, name in enumerate(players)]
    assert [text.get_text() for text in ax.texts] == ["-1.50", "0.60", "1.10", "perfect"]
    assert [text.xy for text in ax.texts[:3]] == [(0, 0), (1, 0.7), (2, 1.2)]  # above all dots
    assert ax.lines[-1].get_ydata()[0] == 1.5 == ax.texts[-1].xy[1]
    assert ax.get_ylim() == pytest.approx((-1.6, 1.7))
    assert [label.get_text() for label in ax.get_xticklabels()] == list(players)
    plot.draw_gold_by_stage({"ppo": [1.0]}, "x.png", best=3.0)
    assert drawn[1][0].axes[0].get_ylim() == pytest.approx((-0.1, 3.2))  # bars begin at 0


def test_reward_is_drawn_against_the_root_of_the_kl(drawn, tmp_path):
    """Gao et al.'s axis; an estimate of the KL may fall below 0, its root may not."""
    kl = [-0.5, 4.0, 9.0, 16.0, 25.0, 36.0]
    folders = {name: write_run(tmp_path / name, [
        {"step": i, "kl": value, "score": float(i + shift), "gold": -i}
        for i, value in enumerate(kl)])
        for name, shift in (("a", 0), ("b", 5))}
    plot.draw_reward_against_kl(folders, "x.png")
    fig = drawn[0][0]
    assert [ax.get_title() for ax in fig.axes] == ["a", "b"]
    for ax, shift in zip(fig.axes, (0, 5)):
        score, raw_score, gold, raw_gold = lines_of(ax)
        assert raw_score[1:] == ([0, 2, 3, 4, 5, 6], [i + shift for i in range(6)])
        assert raw_gold[1:] == ([0, 2, 3, 4, 5, 6], [-i for i in range(6)])
        assert score[1] == gold[1] == plot.smooth([0, 2, 3, 4, 5, 6])
        assert score[2] == plot.smooth([i + shift for i in range(6)])
        assert gold[2] == plot.smooth([-i for i in range(6)])
        assert (score[0], gold[0]) == ("reward model's score (normalised)", "gold score")
        assert ax.get_legend() is not None
