"""Two evaluations compared problem by problem: intervals by hand and by simulation, files that are written by hand."""

import json
import random

import pytest

from nanor1.evaluation.paired import change_line, compare_files, paired_change, paired_difference

# ---- the interval


def test_the_interval_is_that_of_agresti_and_min_for_right_and_wrong():
    # 160 pairs, of which 40 got worse and 20 better: the R package PropCIs, diffpropci.mp(40, 20, 160)
    before = [1] * 40 + [0] * 20 + [1] * 50 + [0] * 50
    after = [0] * 40 + [1] * 20 + [1] * 50 + [0] * 50
    mean, low, high = paired_difference(before, after)
    assert mean == -20 / 160
    assert (low, high) == pytest.approx((-0.21601726, -0.03089632), abs=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # the middle 2/6, the variance (2 + 1)/6 - 1/9 = 7/18, the half 1.96 sqrt(7/18/6)
        ([0, 0, 0, 1], [1, 1, 0, 1], (0.5, -0.165658, 0.832325)),
        # all alike: 0 +- 1.96 sqrt(1/102/102), and not 0 +- 0
        ([0.5] * 100, [0.5] * 100, (0.0, -0.019216, 0.019216)),
        # all better by a half: 50/102 +- 1.96 sqrt(((25 + 1)/102 - (50/102)^2)/102)
        ([0.25] * 100, [0.75] * 100, (0.5, 0.466739, 0.513653)),
        # one problem: 1/3 +- 1.96 sqrt((2/3 - 1/9)/3) ends beyond 1
        ([0], [1], (1.0, -0.510116, 1.0)),
        ([1], [0], (-1.0, -1.0, 0.510116)),
    ],
)
def test_intervals_worked_out_by_hand(before, after, expected):
    assert paired_difference(before, after) == pytest.approx(expected, abs=1e-6)


def test_before_and_after_exchanged_turn_the_interval_round():
    before, after = [0.0, 0.25, 1.0, 0.5, 0.0], [0.5, 0.5, 0.75, 1.0, 0.0]
    mean, low, high = paired_difference(before, after)
    assert paired_difference(after, before) == pytest.approx((-mean, -high, -low))


@pytest.mark.parametrize(("before", "after"), [([], []), ([1], []), ([0, 1], [1])])
def test_other_than_pairs_are_refused(before, after):
    with pytest.raises(AssertionError, match=f"{len(before)} problems before and {len(after)} after"):
        paired_difference(before, after)


@pytest.mark.parametrize(("n_problems", "n_samples"), [(20, 1), (100, 1), (100, 4)])
@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(n_problems, n_samples, shift):
    """Problems of any difficulty p, after training p + shift (1 - p): on average better by shift / 2."""
    rng, n_covered, n_tries = random.Random(1), 0, 400
    for _ in range(n_tries):
        p_P = [rng.random() for _ in range(n_problems)]

        def shares(p_P):
            return [sum(rng.random() < p for _ in range(n_samples)) / n_samples for p in p_P]

        _, low, high = paired_difference(shares(p_P), shares([p + shift * (1 - p) for p in p_P]))
        n_covered += low <= shift / 2 <= high
    assert 0.92 <= n_covered / n_tries  # 0.95 less 2.75 deviations of this many tries
    assert n_covered / n_tries <= 0.98 or n_samples > 1


# ---- files


def answered(*accuracies, form=1.0, **more):
    return [dict(accuracy=accuracy, format=form) | more for accuracy in accuracies]


def line(prompt, answers, run="samples-2", gold="7"):
    return dict(run=run, index=0, prompt=prompt, gold=gold, answers=answers)


def write(folder, name, *rows, task=None):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task is not None:
        (folder / f"{name}.progress.json").write_text(json.dumps({"arguments": {"--task": task}}))
    return folder / name


def numbers(text):
    """What the table says, by the label of the line: problems, before, after, difference, low, high, up, down, same."""
    table = {}
    for row in text.splitlines()[2:]:
        label, colon, rest = row.partition(": ")
        if colon and label[0] != " " and " to " in rest:
            what, *cells = rest.replace(" to ", " ").split()
            table[f"{label}: {what}"] = [float(cell) for cell in cells]
    return table


def test_problems_are_matched_by_prompt_and_answer_wherever_they_stand(tmp_path):
    before = write(
        tmp_path, "a.jsonl",
        line("p", answered(0.0, 1.0)), line("q", answered(0.0, 0.0)), line("r", answered(1.0, 1.0)),
        line("s", answered(1.0, 1.0)), line("s", answered(0.0, 0.0), gold="8"), line("only a", answered(1.0, 1.0)),
    )  # fmt: skip
    after = write(
        tmp_path, "b.jsonl",
        line("s", answered(1.0, 1.0), gold="8"), line("s", answered(1.0, 1.0)), line("r", answered(0.0, 1.0)),
        line("only b", answered(0.0, 0.0)), line("and b", answered(0.0, 0.0)),
        line("q", answered(1.0, 1.0)), line("p", answered(1.0, 1.0)),
    )  # fmt: skip
    text = compare_files(before, after)
    found = numbers(text)["samples-2: accuracy"]
    # before 0.5 0 1 1 0, after 1 1 0.5 1 1
    mean, low, high = paired_difference([0.5, 0, 1, 1, 0], [1, 1, 0.5, 1, 1])
    assert found == [5, 0.5, 0.9, 0.4, round(low, 3), round(high, 3), 3, 1, 1]
    assert f"left out: 1 in {before} alone\nleft out: 2 in {after} alone\n" in text


def test_a_strict_score_is_of_answers_that_are_right_and_in_form(tmp_path):
    before = write(tmp_path, "a.jsonl", line("p", answered(1.0, 1.0, form=0.0)), line("q", answered(1.0, 1.0)))
    after = write(tmp_path, "b.jsonl", line("p", answered(1.0, 1.0)), line("q", answered(1.0, form=0.0)))
    found = numbers(compare_files(before, after))
    assert found["samples-2: accuracy"][:4] == [2, 1, 1, 0] and found["samples-2: accuracy"][6:] == [0, 0, 2]
    assert found["samples-2: strict"][:4] == [2, 0.5, 0.5, 0] and found["samples-2: strict"][6:] == [1, 1, 0]


def test_what_could_not_be_judged_is_left_out_and_counted(tmp_path):
    before = write(
        tmp_path, "a.jsonl", line("p", answered(None, 1.0)), line("q", answered(None, None)), line("r", answered(0.0))
    )
    after = write(
        tmp_path, "b.jsonl", line("p", answered(0.0, 1.0)), line("q", answered(1.0)), line("r", answered(None))
    )
    text = compare_files(before, after)
    assert numbers(text)["samples-2: accuracy"][:4] == [1, 1, 0.5, -0.5]
    assert "\nleft out: 2 that could not be judged\n" in text


def test_problems_that_are_alike_are_matched_one_by_one(tmp_path):
    before = write(tmp_path, "a.jsonl", *[line("p", answered(x)) for x in (0.0, 1.0, 1.0)])
    after = write(tmp_path, "b.jsonl", *[line("p", answered(x)) for x in (1.0, 1.0)])
    text = compare_files(before, after)
    assert numbers(text)["samples-2: accuracy"][:4] == [2, 0.5, 1, 0.5]
    assert f"left out: 1 in {before} alone" in text


def test_runs_of_both_files_are_compared_and_otherwise_the_only_one_of_each(tmp_path):
    greedy, samples = line("p", answered(1.0), run="greedy-1"), line("p", answered(0.0, 1.0))
    both = write(tmp_path, "both.jsonl", greedy, samples)
    one, other = write(tmp_path, "one.jsonl", greedy), write(tmp_path, "other.jsonl", samples)
    assert list(numbers(compare_files(both, one))) == ["greedy-1: accuracy", "greedy-1: strict"]
    assert len(numbers(compare_files(both, both))) == 4
    more = write(tmp_path, "more.jsonl", greedy, samples, line("q", answered(1.0), run="greedy-1"))
    assert f"left out: 1 in {more} alone (greedy-1)\n" in compare_files(both, more)
    assert numbers(compare_files(other, one))["samples-2, greedy-1: accuracy"][:4] == [1, 0.5, 1, 0.5]
    third = write(tmp_path, "third.jsonl", line("p", answered(1.0), run="beam-4"))
    with pytest.raises(ValueError, match=r"both.jsonl has greedy-1, samples-2 and .*third.jsonl has beam-4: no run"):
        compare_files(both, third)


def votes(*texts, finish="stop"):
    """Answers to a question whose gold answer is 7."""
    return [
        answered(float(text in ("7", "7.0")), answer=text, finish=finish, logprob=-1.0, form=1.0)[0] | {"tokens": 5}
        for text in texts
    ]


def test_the_vote_of_samples_is_compared_where_the_task_is_known(tmp_path):
    rows = (line("p", votes("7", "7", "3"), "samples-3"), line("q", votes("3", "3.0", "7"), "samples-3"))
    better = (line("p", votes("7", "7", "7"), "samples-3"), line("q", votes("3", "7.0", "7"), "samples-3"))
    before, after = write(tmp_path, "a.jsonl", *rows, task="math"), write(tmp_path, "b.jsonl", *better, task="math")
    found = numbers(compare_files(before, after))
    assert found["samples-3: accuracy"][:3] == [2, 0.5, round((1 + 2 / 3) / 2, 3)]
    assert found["majority of samples-3: accuracy"][:4] == [2, 0.5, 1.0, 0.5]
    assert found["majority of samples-3: accuracy"][6:] == [1, 0, 1]
    for task in (None, "code"):
        alone = write(tmp_path, f"{task}.jsonl", *rows, task=task)
        assert list(numbers(compare_files(alone, after))) == ["samples-3: accuracy", "samples-3: strict"]


def test_of_a_search_the_best_that_has_finished_is_compared(tmp_path):
    cut, right, wrong = votes("7", finish="length"), votes("7"), votes("3")
    cut[0]["accuracy"] = 0.0
    before = write(tmp_path, "a.jsonl", line("p", [*cut, *wrong, *right], "beam-4") | {"sampled": 9}, task="math")
    after = write(tmp_path, "b.jsonl", line("p", [*cut, *right, *wrong], "beam-4") | {"sampled": 9}, task="math")
    assert numbers(compare_files(before, after))["beam-4: accuracy"][:4] == [1, 0, 1, 1]
    lacking = write(tmp_path, "c.jsonl", line("p", answered(1.0), "beam-4"))
    with pytest.raises(ValueError, match="a line of beam-4 has no 'sampled'"):
        compare_files(lacking, after)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.jsonl cannot be read"),
        ("", "a.jsonl is empty"),
        ('{"run": "samples-2", "prompt": ', "a.jsonl, line 2: expected one JSON object"),
        (
            '{"prompt": "p", "completion": "c"}',
            "line 2: expected a line of an evaluation.*found the fields prompt, comp",
        ),
        (json.dumps(line("p", [])), "line 2: expected a line of an evaluation"),
        (json.dumps(line("p", [{"accuracy": 1.0}])), "line 2: expected a line of an evaluation"),
        (json.dumps(line("p", answered("yes"))), "line 2: expected a line of an evaluation"),
        (json.dumps(line("p", answered(1.0), run="chess-2")), "line 2: expected a line of an evaluation"),
        (json.dumps(line("p", answered(1.0), run="samples")), "line 2: expected a line of an evaluation"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused_with_its_line(tmp_path, content, message):
    good = line("p", answered(1.0, 0.0))
    whole, path = write(tmp_path, "whole.jsonl", good), tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content and json.dumps(good) + "\n" + content)
    for files in ((path, whole), (whole, path)):
        with pytest.raises(ValueError, match=message):
            compare_files(*files)


@pytest.mark.parametrize("other", [line("q", answered(1.0)), line("p", answered(None, None))])
def test_files_without_a_problem_that_both_have_judged_are_refused(tmp_path, other):
    before, after = write(tmp_path, "a.jsonl", line("p", answered(1.0))), write(tmp_path, "b.jsonl", other)
    with pytest.raises(ValueError, match="no problem in common that was judged in both"):
        compare_files(before, after)


def test_the_table_names_its_files_and_explains_its_words(tmp_path):
    path = write(tmp_path, "a.jsonl", line("p", answered(1.0, 0.0)))
    first, head, *rest = compare_files(path, path).splitlines()
    assert first == f"before: {path}, after: {path}"
    assert head.split() == ["problems", "before", "after", "difference", "95%", "up", "down", "same"]
    assert {len(row) for row in (head, *rest[:2])} == {len(head)}
    assert "interval" in rest[-1]


# ---- a run's own two evaluations


def test_the_change_of_a_run_is_over_the_problems_that_were_judged_both_times():
    change = paired_change([0.0, None, 0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0, None])
    assert change == pytest.approx({"accuracy": 0.5, "low": -0.165658, "high": 0.832325, "n": 4}, abs=1e-6)
    assert change_line(change) == "accuracy +0.500 (95%: -0.166 to +0.832, paired over 4 problems)"


@pytest.mark.parametrize("before", [None, [], [None, None]])
def test_a_run_that_kept_no_shares_before_has_no_change_to_tell(before):
    assert paired_change(before, [1.0, 0.0]) is None
