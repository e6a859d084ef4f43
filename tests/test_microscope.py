"""The microscope: what its JSON holds, its locks against hostile text, the page in a browser."""

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from minirlhf.losses import (dpo_loss, ppo_policy_loss, ppo_value_loss, reward_model_loss,
                             sft_loss, surrogate_losses)
from minirlhf.plumbing.errors import UserError
from minirlhf.look import ledger, microscope

ATTACK = "</script><script>window.hacked = 1; alert(1)</script>"
HOSTILE = [ATTACK, "<img src=x onerror='window.hacked = 1'>", "<!--", "<!--<script>", "-->", "]]>",
           "</style>", "&lt;&#60;", "\"'`\\", "${alert(1)}", "\\u003cb\\u003e",
           "javascript:alert(1)", "\u2028 \u2029", "\u202eright to left", "\x00\x07\x1b[31m",
           "\r\n\t ", "\ud800", "NaN",
           "@data@", "@script-hash@", "👩‍💻", "x" * 5000, "", " ", "<|end|>", "__proto__"]
AROUND = microscope.page("the data alone").split('"the data alone"')  # the page before and after
# A large step, so that ratios and values leave their ranges; nothing here is meant to learn.
WILD = dict(num_steps=3, num_epochs=4, lr=3e-3, critic_lr=1e-2, stop_kl=0.0)
SHORT = dict(WILD, num_steps=2, rollout_size=4)
RUNS = {
    "ppo": ("ppo", WILD),
    "ppo_k2": ("ppo", {**SHORT, "kl_kind": "k2", "kl_target": 0.1, "gamma": 0.9, "lam": 0.5}),
    "ppo_k3": ("ppo", {**SHORT, "kl_kind": "k3", "whiten": False, "value_clip": 0.0,
                       "clip_range": 0.1}),
    "dpo": ("dpo", dict(lr=3e-3, batch_size=16)),
    "dpo_smooth": ("dpo", dict(lr=3e-3, label_smoothing=0.2, beta=0.7, batch_size=16)),
    "rm": ("rm", dict(lr=3e-3, batch_size=16, micro_batch_size=4)),
    "rm_margin": ("rm", dict(lr=3e-3, margin=1.0, batch_size=16)),
    "sft": ("sft", dict(lr=3e-3, batch_size=16)),
}


@pytest.fixture(scope="module")
def runs(road, tmp_path_factory):
    """{name: folder} of short runs of all four stages, each step of which is recorded."""
    out = tmp_path_factory.mktemp("microscope")
    for name, (stage, options) in RUNS.items():
        road.run(stage, out / name, dtype="float32", ledger_every=1, **options)
    return {name: out / name for name in RUNS}


def hostile_data(folder):
    """A run's data whose every text is hostile: the run's name, and the tokens."""
    data = microscope.run_data(folder)
    data["run"] = ATTACK + "\u202e&amp;\x00"
    for step in data["steps"]:
        for row, pieces in enumerate(step["pieces"]):
            places = range(5 * row, 5 * row + len(pieces))
            step["pieces"][row] = [HOSTILE[i % len(HOSTILE)] for i in places]
    return data


class Scripts(HTMLParser):
    """The scripts of a page, [(attributes, text)], and the names of all its elements."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags, self.inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1][1] += text


# ---------------------------------------------------------------- without a browser


def test_hostile_text_stays_inside_the_one_data_block_and_comes_back_unchanged(runs):
    harmless = microscope.run_data(runs["ppo"])
    for data in (harmless, hostile_data(runs["ppo"])):
        text = microscope.page(data)
        parsed = Scripts(text)
        assert [attrs.get("type") for attrs, _ in parsed.scripts] == ["application/json", None]
        block = parsed.scripts[0][1]
        assert json.loads(block) == data
        assert re.search(r"[<>&\u2028\u2029\x00]", block) is None and block.isascii()
        # Outside the block the page is the same, whatever the run is called and says.
        assert text.split(block) == AROUND
        assert parsed.tags == Scripts(microscope.page("harmless")).tags


def test_each_hostile_string_alone_leaves_the_page_around_it_as_it_is():
    assert len(AROUND) == 2
    for piece in HOSTILE:
        text = microscope.page({"run": piece})
        assert text.startswith(AROUND[0]) and text.endswith(AROUND[1]), repr(piece)
        assert json.loads(Scripts(text).scripts[0][1]) == {"run": piece}


def test_the_policy_allows_this_script_and_this_style_and_nothing_else():
    text = microscope.page({})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        inside = text[text.index(f"<{tag}>") + len(tag) + 2 : text.rindex(f"</{tag}>")]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert rules == {}


def test_the_script_never_makes_html_or_code_of_text_and_names_no_address():
    template = microscope.TEMPLATE.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "new Function", "DOMParser", "createContextualFragment", "srcdoc", "@import",
                 "url("):
        assert word not in template, word
    addresses = set(re.findall(r"https?://[^\"']*", template))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches


@pytest.mark.parametrize("name", RUNS)
def test_the_page_holds_the_ledgers_numbers_to_seven_digits(runs, name):
    folder = runs[name]
    data = microscope.run_data(folder)
    assert data["stage"] == RUNS[name][0] and data["run"] == name
    assert [step["step"] for step in data["steps"]] == ledger.recorded_steps(folder)
    for step in data["steps"]:
        record = ledger.load(folder, step["step"])
        assert step["pieces"] == record["pieces"] and step["batch_size"] == record["batch_size"]
        assert step["rows"].keys() == record["rows"].keys()
        for key, values in record["rows"].items():
            for row, pieces in enumerate(step["pieces"]):
                kept = values[row]
                if values.ndim == 2:  # the filler is left out, and nothing but the filler
                    kept = values[row, : len(pieces) - (key != "tokens")]
                    assert key == "tokens" or key == "ratio" or not values[
                        row, len(pieces) - 1 :].any()
                np.testing.assert_allclose(np.array(step["rows"][key][row], dtype=np.float64),
                                           kept.astype(np.float64), rtol=5.1e-7, atol=0)
        for key in ("advantages", "token_losses"):
            if key in record["batch"]:
                assert step["batch"][key] == {"sum": record["batch"][key].sum(),
                                              "squares": record["squares"][key].sum()}
        assert step["batch"]["num_tokens"] == record["batch"]["num_tokens"].sum()


def test_the_betas_are_those_of_the_log_where_beta_adapts(runs):
    rows = [json.loads(line) for line in open(runs["ppo_k2"] / "metrics.jsonl", encoding="utf-8")]
    betas = [step["beta"] for step in microscope.run_data(runs["ppo_k2"])["steps"]]
    assert betas == pytest.approx([row["beta"] for row in rows], rel=5.1e-7, abs=0)
    assert len(set(betas)) == len(betas)  # or this would also hold for the beta of config.json


def test_numbers_that_json_does_not_know_become_names_that_javascript_knows():
    assert [microscope.short(x) for x in (math.nan, math.inf, -math.inf)] == [
        "NaN", "Infinity", "-Infinity"]
    assert microscope.short(True) == 1 and microscope.short(12345678) == 12345678
    assert microscope.short(-0.123456789) == -0.1234568


def test_thinning_is_even_and_keeps_the_first_and_the_last():
    assert microscope.evenly(list(range(7)), 7) == list(range(7))
    for length, count in ((61, 60), (200, 60), (3, 2), (1000, 7)):
        kept = microscope.evenly(list(range(length)), count)
        gaps = np.diff(kept)
        assert len(kept) == count and kept[0] == 0 and kept[-1] == length - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the PPO run, for tests that spoil it."""
    return shutil.copytree(runs["ppo"], tmp_path / "ppo")


def test_a_long_run_is_thinned_in_steps_and_in_size(copied, monkeypatch):
    whole = microscope.run_data(copied)
    monkeypatch.setattr(microscope, "MOST_STEPS", 2)
    data = microscope.run_data(copied)
    assert [step["step"] for step in data["steps"]] == [1, 3] and data["num_recorded"] == 3
    monkeypatch.setattr(microscope, "MOST_STEPS", 60)
    monkeypatch.setattr(microscope, "MOST_BYTES", int(0.8 * len(json.dumps(whole["steps"]))))
    data = microscope.run_data(copied)
    assert [step["step"] for step in data["steps"]] == [1, 3] and data["num_recorded"] == 3


def test_a_step_recorded_but_not_yet_logged_is_left_out(copied):
    log = copied / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    # The third line is being written just now.
    log.write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")
    data = microscope.run_data(copied)
    assert [step["step"] for step in data["steps"]] == [1, 2] and len(data["metrics"]) == 2
    log.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no step that is both recorded and logged"):
        microscope.run_data(copied)


def test_a_run_without_a_ledger_and_a_ledger_of_another_kind_are_refused(copied, capsys):
    for path in (copied / "ledger").glob("*.npz"):
        with np.load(path) as arrays:
            np.savez(path, **{name: arrays[name] for name in arrays.files
                              if "advantages" not in name})
    with pytest.raises(UserError, match="holds none of advantages"):
        microscope.run_data(copied)
    shutil.rmtree(copied / "ledger")
    with pytest.raises(SystemExit) as stopped:
        microscope.main([str(copied)])
    assert stopped.value.code == 2 and "holds no ledger" in capsys.readouterr().err
    assert not (copied / "microscope.html").exists()


def test_the_command_writes_the_page_and_says_where(copied, capsys):
    microscope.main([str(copied)])
    path = copied / "microscope.html"
    assert capsys.readouterr().out == f"written: {path}\n"
    assert path.read_bytes() == microscope.page(microscope.run_data(copied)).encode()


def test_no_path_of_the_machine_gets_into_the_page(runs):
    for folder in runs.values():
        assert str(folder.parent) not in microscope.page(microscope.run_data(folder))


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by playwright; nothing is downloaded."""
    api = pytest.importorskip("playwright.sync_api", reason=(
        "THE MICROSCOPE'S PAGE IS NOT TESTED: pip install playwright"))
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
    if path is None:
        pytest.skip("THE MICROSCOPE'S PAGE IS NOT TESTED: no chromium here; apt install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(run folder or data) -> its page, opened. At the end: no error, request or dialog."""
    pages, wrong = [], []

    def visit(source, address="", **options):
        data = source if isinstance(source, dict) else microscope.run_data(source)
        path = tmp_path / f"page_{len(pages)}.html"
        path.write_bytes(microscope.page(data).encode())
        page = browser.new_page(**{"viewport": {"width": 1300, "height": 900}, **options})
        page.set_default_timeout(5000)
        pages.append(page)
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda request: request.url.split("#")[0] == path.as_uri()
                or wrong.append(f"request: {request.url}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"),
                                          dialog.dismiss()))
        page.goto(path.as_uri() + address)
        page.wrong = wrong
        return page

    yield visit
    for page in pages:
        page.close()
    assert wrong == []


READ_PANEL = """() => ({
  lines: Object.fromEntries([...document.querySelectorAll("#panel li")].map((li) => [
    li.dataset.what, {value: Number(li.dataset.value), words: li.children[1].textContent,
      inputs: li.children[2].textContent, shown: li.children[3].textContent}])),
  recorded: Object.fromEntries([...document.querySelectorAll("#panel dd")].map((dd) => [
    dd.dataset.name, {value: Number(dd.dataset.value), shown: dd.textContent}])),
  check: document.querySelector("#check").textContent,
})"""
# Every step and token: what the panel says after a click on the token.
READ_ALL = f"""() => {{
  const slider = document.querySelector("#slider"), read = {READ_PANEL}, all = [];
  for (let index = 0; index <= Number(slider.max); index++) {{
    slider.value = index;
    slider.dispatchEvent(new Event("input"));
    for (const node of document.querySelectorAll("#sequences .token")) {{
      node.click();
      all.push({{index, row: Number(node.dataset.row), token: Number(node.dataset.token),
        clipped: node.classList.contains("clipped"), ...read()}});
    }}
  }}
  return all;
}}"""


def number(shown):
    """A number as the page shows it: with a true minus sign."""
    return float(shown.replace("−", "-"))


def columns(folder):
    """[(index, row, token)] of every response token, as the ledger has them."""
    found = []
    for index, step in enumerate(ledger.recorded_steps(folder)):
        record = ledger.load(folder, step)
        for row, pieces in enumerate(record["pieces"]):
            mask = record["rows"]["response_mask"][row]
            found += [(index, row, t) for t in range(1, len(pieces)) if mask[t - 1]]
    return found


def expected_ppo(record, cfg, row, t):
    """The lines of one token: what was recorded, and else what the library's losses make of it."""
    rows = record["rows"]
    at = {name: float(values[row, t]) for name, values in rows.items()
          if values.ndim == 2 and name != "tokens"}
    last = t + 1 == len(record["pieces"][row]) - 1
    following = 0.0 if last else float(rows["advantages"][row, t + 1])
    one = {name: torch.tensor([[x]], dtype=torch.float64) for name, x in at.items()}
    mask = torch.ones(1, 1, dtype=torch.bool)
    unclipped, clipped = surrogate_losses(one["ratio"], one["whitened_advantages"],
                                          cfg["clip_range"])
    policy_loss, _ = ppo_policy_loss(one["new_logprobs"], one["logprobs"],
                                     one["whitened_advantages"], mask, cfg["clip_range"])
    value_loss, _ = ppo_value_loss(one["new_values"], one["values"], one["returns"], mask,
                                   cfg["value_clip"])
    return {"KL": at["kl"], "reward": at["rewards"],
            # the advantage that was recorded, without what came from the next token
            "delta": at["advantages"] - cfg["gamma"] * cfg["lam"] * following,
            "advantage": at["advantages"], "return": at["returns"],
            "whitened": at["whitened_advantages"], "ratio": at["ratio"],
            "unclipped": unclipped.item(), "clipped": clipped.item(),
            "policy loss": policy_loss.item(), "value loss": value_loss.item()}


def rivals(rows, row):
    """[better, worse]: the row against the worst answer to its prompt; the best against the row."""
    answers = [i for i in range(len(rows["rank"])) if rows["example"][i] == rows["example"][row]]
    best = min(answers, key=lambda i: rows["rank"][i])
    worst = max(answers, key=lambda i: rows["rank"][i])
    return [row, worst] if rows["rank"][row] == rows["rank"][best] else [best, row]


def expected_dpo(record, cfg, row, t):
    rows = record["rows"]
    logps = [torch.tensor([rows[name][i][rows["response_mask"][i]].astype(np.float64).sum()])
             for name in ("logprobs", "ref_logprobs") for i in rivals(rows, row)]
    losses, chosen, rejected = dpo_loss(*logps, cfg["beta"], cfg["label_smoothing"])
    margin = (chosen - rejected).item()
    return {"log-ratio": rows["log_ratios"][row, t], "reward": rows["implicit_rewards"][row],
            "margin": margin, "probability": 1 / (1 + math.exp(-margin)), "loss": losses.item()}


def expected_rm(record, cfg, row, t):
    rows = record["rows"]
    scores = torch.tensor([[float(rows["scores"][i]) for i in rivals(rows, row)]],
                          dtype=torch.float64)
    loss = reward_model_loss(scores, torch.tensor([[0, 1]])).item()
    return {"score": rows["scores"][row], "difference": (scores[0, 0] - scores[0, 1]).item(),
            "probability": math.exp(-loss), "pair loss": loss, "loss": rows["losses"][row]}


def expected_sft(record, cfg, row, t):
    rows = record["rows"]
    losses, mask = rows["token_losses"][row].astype(np.float64), rows["response_mask"][row]
    mean = sft_loss(torch.from_numpy(-losses), torch.from_numpy(mask)).item()
    return {"loss": losses[t], "probability": np.exp(-losses[t]), "sequence": mean,
            "batch": ledger.batch_means(record)["token_losses/token"]}


@pytest.mark.parametrize("name", RUNS)
def test_all_arithmetic_on_the_page_gives_what_the_scripts_recorded(runs, visit, name):
    folder = runs[name]
    cfg = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    records = [ledger.load(folder, step) for step in ledger.recorded_steps(folder)]
    expected_of = {"ppo": expected_ppo, "dpo": expected_dpo, "rm": expected_rm,
                   "sft": expected_sft}[RUNS[name][0]]
    panels = visit(folder).evaluate(READ_ALL)
    assert sorted((p["index"], p["row"], p["token"]) for p in panels) == sorted(columns(folder))
    largest = max(np.abs(values).max() for record in records
                  for key, values in record["rows"].items() if values.dtype == np.float32)
    pairs = {}
    for panel in panels:
        record, row, t = records[panel["index"]], panel["row"], panel["token"] - 1
        expected = expected_of(record, cfg, row, t)
        assert panel["lines"].keys() == expected.keys()
        for what, line in panel["lines"].items():
            pairs.setdefault(what, []).append((line["value"], float(expected[what])))
            # What is read is the number, to four decimals or better.
            assert number(line["shown"]) == pytest.approx(line["value"], abs=5.1e-5, rel=6e-3)
        for key, cell in panel["recorded"].items():
            assert cell["value"] == pytest.approx(float(record["rows"][key][row, t]), rel=5.1e-7)
        assert panel["check"].endswith("agrees with the record.")
        if "clipped" in record["rows"]:
            assert panel["clipped"] == record["rows"]["clipped"][row, t]
    # The page's inputs have seven digits, and the scripts computed in float32. In a difference the
    # rounding of its largest input remains; it is far below the numbers themselves.
    tolerance = 2e-6 * max(1.0, largest)
    for what, values in pairs.items():
        got, wanted = np.array(values).T
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=tolerance, err_msg=what)
        assert np.abs(wanted).max() > 100 * tolerance, what


def test_the_wild_run_has_every_case_that_the_arithmetic_tells_apart(runs):
    """Else the test above would say nothing about them."""
    records = [ledger.load(runs["ppo"], step)["rows"] for step in (1, 2, 3)]
    real = [rows["response_mask"] for rows in records]
    assert any(rows["clipped"].any() for rows in records)
    moves = np.concatenate([np.abs(rows["new_values"] - rows["values"])[mask]
                            for rows, mask in zip(records, real)])
    assert (moves > 0.2).any() and (moves < 0.2).any()
    assert any(rows["ended"].any() for rows in records)
    assert any((rows["advantages"][mask] < 0).any() for rows, mask in zip(records, real))
    scores = ledger.load(runs["rm"], 1)["rows"]
    assert len(scores["rank"]) > 2 * len(set(scores["example"]))  # ranked lists, not only pairs


def test_the_batch_mean_of_sft_is_the_loss_that_the_script_logged(runs, visit):
    logged = {row["step"]: row["loss"] for row in map(json.loads, open(
        runs["sft"] / "metrics.jsonl", encoding="utf-8"))}
    page = visit(runs["sft"], "#step=2")
    panel = page.evaluate(READ_PANEL)
    assert panel["lines"]["batch"]["value"] == pytest.approx(logged[2], rel=1e-5)


def test_a_recorded_number_that_the_arithmetic_does_not_give_is_named(runs, visit):
    data = microscope.run_data(runs["ppo"])
    rows = data["steps"][-1]["rows"]
    column = rows["response_mask"][0].index(1)
    rows["advantages"][0][column] += 0.01
    panel = visit(data, f"#row=0&token={column + 1}").evaluate(READ_PANEL)
    assert panel["check"].startswith("Differs from the record: advantage (recorded: ")
    assert "return" in panel["check"] and "KL" not in panel["check"]


def test_the_formula_is_shown_with_its_numbers_put_in(runs, visit):
    page = visit(runs["ppo"])
    for token in page.locator("#sequences article").first.locator(".token").all():
        token.click()
        panel = page.evaluate(READ_PANEL)
        put_in = {what: [number(x) for x in re.findall(r"−?[\d.]+(?:e−\d+)?", line["inputs"])]
                  for what, line in panel["lines"].items()}
        recorded = {key: number(cell["shown"]) for key, cell in panel["recorded"].items()}
        advantage, value = put_in["return"]
        assert (advantage, value) == (recorded["advantages"], recorded["values"])
        assert put_in["KL"][-1] == recorded["ref_logprobs"]
        reward, gamma, following, value = put_in["delta"]
        assert (reward, gamma) == (recorded["rewards"], 1)
        # Read off the screen and worked out by hand, the numbers give the number beside them.
        shown = number(panel["lines"]["delta"]["shown"])
        assert reward + following - abs(value) * math.copysign(1, recorded["values"]) == (
            pytest.approx(shown, abs=2.1e-4))
    assert "at the end" in panel["lines"]["delta"]["words"] and following == 0


def test_the_mouse_shows_a_token_while_it_is_there_and_a_click_keeps_it(runs, visit):
    page = visit(runs["ppo"])
    tokens = page.locator("#sequences .token")
    first, other = page.evaluate(READ_PANEL), tokens.nth(3)
    other.hover()
    hovered = page.evaluate(READ_PANEL)
    assert hovered != first
    record = ledger.load(runs["ppo"], 3)
    row, token = (int(other.get_attribute(f"data-{key}")) for key in ("row", "token"))
    for key, cell in hovered["recorded"].items():
        recorded = float(record["rows"][key][row, token - 1])
        assert cell["value"] == pytest.approx(recorded, rel=5.1e-7)
    page.mouse.move(5, 5)
    assert page.evaluate(READ_PANEL) == first
    other.click()
    page.mouse.move(5, 5)
    assert page.evaluate(READ_PANEL) == hovered
    assert page.locator("#sequences [aria-current]").count() == 1


def test_the_slider_moves_by_keys_and_the_curves_cursor_with_it(runs, visit):
    logged = [json.loads(line) for line in open(runs["ppo"] / "metrics.jsonl", encoding="utf-8")]
    page = visit(runs["ppo"])
    assert page.locator("#step").inner_text() == "3 of 3"
    page.get_by_label("Step", exact=True).focus()
    for row in (logged[1], logged[0], logged[0]):
        page.keyboard.press("ArrowLeft")
        assert page.locator("#step").inner_text() == f"{row['step']} of 3"
        assert page.locator("#slider").get_attribute("aria-valuetext") == f"step {row['step']}"
        for key in ("score", "kl", "length", "entropy"):
            figure = page.locator(f"figure[data-key={key}]")
            assert float(figure.get_attribute("data-value")) == pytest.approx(row[key], rel=5.1e-7)
            shown = figure.locator("figcaption").inner_text().split()[-1]
            assert number(shown) == pytest.approx(row[key], rel=5.1e-3)
    cursors = page.locator(".cursor")
    assert {cursors.nth(i).get_attribute("x1") for i in range(cursors.count())} == {
        str(cursors.first.get_attribute("x1"))}
    box = page.locator("figure svg").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)  # its right end
    assert page.locator("#step").inner_text() == "3 of 3"


def where(page):
    """(step shown, row, token, tensor) of the view."""
    return tuple(page.evaluate("""() => {
      const {row, token} = document.querySelector("#sequences [aria-current]").dataset;
      return [parseInt(document.querySelector("#step").textContent), Number(row), Number(token),
        document.querySelector("#tensor").value];
    }"""))


def test_keys_move_through_tokens_sequences_steps_and_tensors(runs, visit):
    folder = runs["ppo"]
    starts = [int(mask.argmax()) + 1 for mask in ledger.load(folder, 3)["rows"]["response_mask"]]
    page = visit(folder)
    assert where(page) == (3, 0, starts[0], "advantages")
    for key, found in (("ArrowRight", (3, 0, starts[0] + 1)), ("ArrowLeft", (3, 0, starts[0])),
                       ("ArrowLeft", (3, 0, starts[0])), ("ArrowUp", (3, 0, starts[0]))):
        page.keyboard.press(key)
        assert where(page)[:3] == found, key
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    page.keyboard.press("ArrowDown")
    assert where(page)[:2] == (3, 1)
    for key, step in (("[", 2), ("PageUp", 1), ("[", 1), ("]", 2), ("PageDown", 3), ("]", 3)):
        page.keyboard.press(key)
        assert where(page)[0] == step, key
    assert page.evaluate("document.activeElement.className").startswith("token")
    page.keyboard.press("t")
    assert where(page)[3] == "kl"
    page.keyboard.press("4")
    assert where(page)[3] == "rewards"
    page.locator("#panel").focus()
    page.keyboard.press("ArrowDown")  # scrolls the panel
    assert where(page) == (3, 1, where(page)[2], "rewards")
    page.keyboard.press("?")
    assert not page.locator("#keys").is_visible()
    page.keyboard.press("n")
    assert page.locator(".mark span").first.is_visible()
    page.get_by_label("Shaded by").select_option("values")
    assert where(page)[3] == "values"


def until(page, condition):
    """Wait until the condition holds. (Playwright's own way would need `eval`, which is locked.)"""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(30)
    raise AssertionError(f"never: {condition}")


def test_the_address_restores_the_view_and_follows_it(runs, visit):
    folder = runs["dpo"]
    rows = ledger.load(folder, 2)["rows"]
    token = int(rows["response_mask"][2].argmax()) + 3
    page = visit(folder, f"#step=2&row=2&token={token}&tensor=logprobs")
    assert where(page) == (2, 2, token, "logprobs")
    page.keyboard.press("ArrowRight")
    until(page, f"location.hash === '#step=2&row=2&token={token + 1}&tensor=logprobs'")
    page.evaluate("location.hash = '#step=1&row=999&token=0&tensor=<b>'")
    until(page, "document.querySelector('#step').textContent.startsWith('1 ')")
    first = int(ledger.load(folder, 1)["rows"]["response_mask"][0].argmax()) + 1
    assert where(page) == (1, 0, first, "logprobs")  # the nearest that there is


def test_answers_to_a_prompt_stand_side_by_side_from_the_best_to_the_worst(runs, visit):
    for name in ("dpo", "rm"):
        record = ledger.load(runs[name], ledger.recorded_steps(runs[name])[-1])
        groups = visit(runs[name]).evaluate("""() => [...document.querySelectorAll(".answers")].map(
          (box) => [...box.children].map((one) => [Number(one.dataset.row),
            one.getBoundingClientRect().top, one.querySelector("b").textContent]))""")
        rank, example = record["rows"]["rank"], record["rows"]["example"]
        assert len(groups) == len(set(example.tolist()))
        for group in groups:
            rows = [row for row, _, _ in group]
            assert len({example[row] for row in rows}) == 1 and len(rows) >= 2
            assert [rank[row] for row in rows] == sorted(rank[row] for row in rows)
            assert group[0][1] == group[1][1]  # on one line
        if name == "dpo":
            assert [title for _, _, title in groups[0]] == ["Preferred", "Rejected"]


def test_the_text_on_the_page_is_the_ledgers(runs, visit):
    for name in ("ppo", "sft"):
        pieces = ledger.load(runs[name], ledger.recorded_steps(runs[name])[-1])["pieces"]
        page = visit(runs[name])
        shown = page.evaluate("""() => [...document.querySelectorAll("#sequences p")].map(
          (line) => [...line.querySelectorAll(".token > :first-child, p > .dim")].map(
            (one) => one.textContent))""")
        assert [[piece.replace("·", " ") for piece in row] for row in shown] == [
            [re.sub(r"^<\|(\w+)\|>$", r"\1", piece) for piece in row] for row in pieces]


def test_hostile_text_is_shown_as_text_and_runs_nothing(runs, visit):
    for name in ("ppo", "dpo"):
        page = visit(hostile_data(runs[name]))
        assert page.evaluate("window.hacked") is None
        for _ in range(5):
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowRight")
        page.keyboard.press("n")
        page.keyboard.press("[")
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("[...document.querySelectorAll('script, img')].map((x) => x.type)"
                             ) == ["application/json", ""]
        assert ATTACK in page.locator("#title").inner_text()
        shown = page.locator("#sequences").inner_text()
        assert "window.hacked" in shown and "\\u{202e}" in shown and "\u202e" not in shown
        assert "\\u{0}" in shown and "\\u{2028}" in shown and "x" * 200 + "…" in shown
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]


def test_the_second_lock_holds_where_the_first_is_broken(runs, visit):
    page = visit(runs["ppo"])
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.hacked = 1";
      document.body.append(script);
      const box = document.createElement("div");
      box.innerHTML = "<img src='x' onerror='window.hacked = 1'><p style='color: red' id='red'>";
      document.body.append(box);
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("getComputedStyle(document.getElementById('red')).color") != (
        "rgb(255, 0, 0)")
    refused = [text for text in page.wrong if "Content Security Policy" in text]
    assert len(refused) >= 3 and any("script" in text for text in refused)
    page.wrong[:] = [text for text in page.wrong if text not in refused
                     and not text.startswith("request: file:")]


CONTRAST = """() => {
  const channels = (colour) => {
    const numbers = colour.match(/[\\d.]+/g).map(Number);
    return colour.startsWith("rgb") ? numbers.slice(0, 3).map((x) => x / 255) : numbers.slice(0, 3);
  };
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((x) => (
      x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const tokens = [...document.querySelectorAll("#sequences .token")].map((node) => {
    const style = getComputedStyle(node);
    return {contrast: contrast(style.color, style.backgroundColor),
      amount: parseInt(node.style.getPropertyValue("--amount")),
      number: Number(node.getAttribute("aria-label").match(/ (\\S+?)(, clipped)?$/)[1]
        .replace("−", "-")), mark: node.querySelector(".mark").firstChild?.textContent ?? "",
      background: style.backgroundColor, clipped: node.classList.contains("clipped"),
      border: style.borderTopStyle};
  });
  const dim = [...document.querySelectorAll(".dim, .note, dt, figcaption, svg text")].map(
    (node) => contrast(getComputedStyle(node)[node.tagName === "text" ? "fill" : "color"], paper));
  return {tokens, dim};
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_shade_and_signs_survive_without_colour(runs, visit, scheme):
    page = visit(runs["ppo"], color_scheme=scheme)
    for tensor in page.locator("#tensor option").all():
        name = tensor.get_attribute("value")
        page.get_by_label("Shaded by").select_option(name)
        found = page.evaluate(CONTRAST)
        assert min(found["dim"]) >= 4.5
        assert min(token["contrast"] for token in found["tokens"]) >= 4.5, name
        assert max(token["amount"] for token in found["tokens"]) > 20, name
        signed = name in ("advantages", "kl", "values", "rewards", "whitened_advantages", "returns",
                          "new_values", "ratio")
        middle = 1 if name == "ratio" else 0
        for token in found["tokens"]:
            above = np.sign(token["number"] - middle)
            marks = {1: "↑", -1: "↓", 0: ""} if name == "ratio" else {1: "+", -1: "−", 0: ""}
            assert token["mark"] == (marks[above] if signed else ""), name
            assert token["border"] == ("dashed" if token["clipped"] else "solid")
        shades = {np.sign(token["number"] - middle): token["background"]
                  for token in found["tokens"] if token["amount"] > 20}
        if signed and len(shades) > 1:
            assert shades[1] != shades[-1], name


def test_a_phone_shows_all_without_scrolling_sideways_and_a_tap_selects(runs, visit):
    for name in ("ppo", "rm", "sft"):
        page = visit(runs[name], viewport={"width": 380, "height": 740}, has_touch=True,
                     is_mobile=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        before = where(page)
        page.locator("#sequences .token").nth(4).tap()
        assert where(page) != before
        panel = page.locator("#panel").bounding_box()  # in sight, at the bottom edge
        assert panel["y"] + panel["height"] == pytest.approx(740, abs=1)
        assert 150 < panel["height"] < 400
        chosen = page.locator("#sequences [aria-current]").bounding_box()
        assert chosen["y"] + chosen["height"] <= panel["y"] + 1


def test_print_leaves_the_controls_out_and_shows_the_whole_step_on_white(runs, visit):
    page = visit(runs["ppo"], color_scheme="dark")
    page.emulate_media(media="print")
    for hidden in ("#slider", "#tensor", "#keys", "#numbers"):
        assert not page.locator(hidden).is_visible(), hidden
    for seen in ("#title", "#step", "#shaded", "#legend", "figure", "#panel li", "#panel dd"):
        assert page.locator(seen).first.is_visible(), seen
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    rows = ledger.load(runs["ppo"], 3)["rows"]
    tokens = page.locator("#sequences .token").all()
    assert len(tokens) == rows["response_mask"].sum()
    for token in tokens:  # under each token its number
        row, column = (int(token.get_attribute(f"data-{key}")) for key in ("row", "token"))
        shown = token.locator(".mark").inner_text()
        assert number(shown) == pytest.approx(rows["advantages"][row, column - 1], abs=5.1e-3)
    panel = page.evaluate("""() => { const {scrollHeight, clientHeight} =
      document.querySelector("#panel"); return [scrollHeight, clientHeight]; }""")
    assert panel[0] <= panel[1] + 1  # nothing of it is cut off


def test_every_control_has_a_name_and_tokens_say_their_number(runs, visit):
    page = visit(runs["ppo"])
    for name in ("Step", "Shaded by", "numbers"):
        assert page.get_by_label(name, exact=True).count() == 1, name
    token = page.locator("#sequences .token").first
    record = ledger.load(runs["ppo"], 3)
    row, column = (int(token.get_attribute(f"data-{key}")) for key in ("row", "token"))
    label = token.get_attribute("aria-label")
    assert label.startswith(f"{record['pieces'][row][column]}, advantage ")
    assert number(label.split()[2].strip(",")) == pytest.approx(
        float(record["rows"]["advantages"][row, column - 1]), abs=5.1e-5)
    assert page.locator("#sequences .token[tabindex='0']").count() == 1
    page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_run_that_diverged_is_shown_with_its_nans(runs, visit):
    data = microscope.run_data(runs["ppo"])
    rows = data["steps"][-1]["rows"]
    column = rows["response_mask"][0].index(1)
    for name in rows:
        if name in ("new_logprobs", "ratio", "new_values"):
            rows[name][0][column] = "NaN"
    data["metrics"][-1]["kl"] = "Infinity"
    page = visit(data)
    panel = page.evaluate(READ_PANEL)
    assert panel["recorded"]["ratio"]["shown"] == panel["lines"]["ratio"]["shown"] == "NaN"
    assert panel["lines"]["advantage"]["shown"] != "NaN"
    assert panel["check"].endswith("agrees with the record.")


def test_the_page_says_how_it_was_thinned(runs, visit, monkeypatch):
    assert "3 recorded steps. " in visit(runs["ppo"]).locator("#summary").inner_text()
    monkeypatch.setattr(microscope, "MOST_STEPS", 2)
    assert "3 recorded steps, of which this page holds 2, evenly chosen." in (
        visit(runs["ppo"]).locator("#summary").inner_text())
