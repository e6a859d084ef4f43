"""Bugs to plant into evaluate.py."""

from bugs import Bug

FILE = "evaluate.py"
BUGS = [
    Bug("Evaluator.kl", "reference(tokens)[:, :-1]", "reference(tokens)[:, :-1] / 0.7",
        "test_check_35", "the evaluation's reference is scored at another temperature"),
    Bug("Evaluator.rewards", 'prompt + s["ids"]',
        'prompt + tokenizer.encode(tokenizer.decode_response(s["ids"])) + '
        "[tokenizer.end_id]",
        "test_check_36", "the evaluation scores text that was encoded again"),
    Bug("Evaluator.verdicts", "zip(self.rows,", "zip(self.rows[1:] + self.rows[:1],",
        "test_a_judge_sees_the_row", "an answer is judged by the next prompt's row"),
    Bug("measure_reward_model", "len(differing) == 1 and gap > 1e-6", "len(differing) == 1",
        "test_a_tie_of_gold", "where gold ties, the second answer counts as the better one"),
    Bug("measure_reward_model", "for name in parts[i] if parts[i]",
        'for name in parts[i] if name != "form" and parts[i]', "test_only_means_only",
        "pairs that differ in form, too, count as differing in one part only"),
    Bug("measure_reward_model", 'right.setdefault(json.dumps(row["messages"]), [])',
        "right.setdefault(len(longer), [])", "test_the_accuracys_interval",
        "the interval of the reward model's accuracy takes each pair for a prompt"),
    Bug("collect_players", 'retold({"ended": True}, cfg.refusal, tokenizer)] for _ in prompts',
        'retold(s, cfg.refusal, tokenizer)] for [s] in players[name_of(cfg.against)]["answers"]',
        "test_a_fixed_refusal", "the fixed refusal ends only where the SFT model's answer had"),
    Bug("collect_players", "player = players[name] = {\"answers\": answers, **more}\n"
        "        keep(name, player)\n", "player = players[name] = {\"answers\": answers, **more}\n",
        "test_answers_are_kept", "answers are written only after they are judged"),
    Bug("summary", "f\"the judge's {name}\" if name in OWN_NAMES else name", "name",
        "test_a_judges_own_numbers", "a judge's number replaces the evaluation's own of that name"),
    Bug("Evaluator.answer", "torch.Generator(self.device)", "torch.Generator()",
        "test_an_evaluation_on_a_gpu", "evaluation's generator is left on the CPU"),
    Bug("Evaluator.kl", ", device=self.device)", ")", "test_an_evaluation_on_a_gpu",
        "the KL's prompt lengths are left on the CPU"),
    Bug("score_sequences", ", ev.device)", ")", "test_an_evaluation_on_a_gpu",
        "sequences to score are left on the CPU"),
    Bug("", 'prompts: str = "data/toy/heldout.jsonl"', 'prompts: str = "data/toy/prompts.jsonl"',
        "test_the_first_road_evaluates", "evaluate.py defaults to training prompts"),
]
