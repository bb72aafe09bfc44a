"""Rewards from text, and the user's own problems with answers that math-verify compares."""

import json
import time

import pytest

from litropy.recipes import TaskDataModule
from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample
from litropy.recipes.tasks import (
    Arithmetic,
    Correctness,
    Format,
    KolmogorovTest,
    RewardSum,
    SoftOverlong,
    TowerOfHanoi,
    task_key,
)
from litropy.recipes.tasks import math_problem as module
from litropy.recipes.tasks.math_problem import MathProblem
from litropy.recipes.tasks.problem_files import dataset_problems, file_problems, parse_problem


def sum_sample(answer_format="plain"):
    spec = {"left": 12, "operation": "+", "right": 34, "answer_format": answer_format}
    return Sample("12+34=", spec, task_key(Arithmetic), 0)


def math_sample(gold, answer_format="boxed"):
    spec = {"question": "?", "answer": gold, "worked": None, "record": {}, "answer_format": answer_format}
    return Sample("?\n", spec, task_key(MathProblem), 0)


# rewards


def test_correct_answers_get_one_and_all_others_nothing():
    responses = ["46", " 46 \n", "47", "046", "", "forty-six", "12+34=46"]
    results = Correctness()([sum_sample()] * len(responses), responses)
    assert [result.value for result in results] == [1, 1, 0, 0, 0, 0, 0]
    assert [result.correct for result in results] == [True, True] + [False] * 5
    assert [result.answer for result in results] == ["46", "46", "47", None, None, None, None]


def test_tasks_may_be_mixed():
    hanoi = {"size": [2], "start": "21||", "goal": "||21", "optimum": 3, "answer_format": "tags"}
    samples = [sum_sample(), Sample("", hanoi, task_key(TowerOfHanoi), 1), math_sample("1/2"), sum_sample()]
    results = Correctness()(samples, ["46", "<answer>12 13 23</answer>", r"\boxed{0.5}", "1"])
    assert [result.correct for result in results] == [True, True, True, False]
    assert [result.answer for result in results] == ["46", "12 13 23", "1/2", "1"]


def test_quality_and_progress_grade_the_reward():
    hanoi = {"size": [2], "start": "21||", "goal": "||21", "optimum": 3, "answer_format": "plain"}
    samples = [Sample("", hanoi, task_key(TowerOfHanoi), 0)] * 4
    responses = ["12 13 23", "12 23 12 13 13 23", "12 12", "12 21 12 13 23"]
    graded = Correctness(quality=0.5, progress=0.2)(samples, responses)
    assert [result.value for result in graded] == pytest.approx([1.0, 0.2 * 3 / 6, 0.2 * 0.5, 1 - 0.5 * (1 - 3 / 5)])
    program = {"sequence": [7] * 20, "answer_format": "plain"}
    sample = Sample("", program, task_key(KolmogorovTest), 0)
    (result,) = Correctness(quality=1.0)([sample], ["a=fill(7,20)"])
    assert result.value == pytest.approx(1 - (16 + 4.392317) / 160)
    assert result.correct


def test_format_looks_for_any_answer():
    responses = ["<answer>1</answer>", "46", ""]
    results = Format()([sum_sample("tags")] * 3, responses)
    assert results == [RewardResult(1.0, False, "1"), RewardResult(0.0, False), RewardResult(0.0, False)]


def test_overlong_responses_are_punished_softly():
    overlong = SoftOverlong(longest=8, buffer=4)
    results = overlong([sum_sample()] * 6, ["", "1234", "12345", "123456", "12345678", "1" * 100])
    assert [result.value for result in results] == [0, 0, -0.25, -0.5, -1, -1]
    overlong.tokenizer = lambda text, add_special_tokens: {"input_ids": text.split()}
    assert overlong([sum_sample()], ["one long-winded token after-another five six"])[0].value == -0.5
    with pytest.raises(ValueError, match="`buffer` is 9"):
        SoftOverlong(8, 9)


def test_a_sum_of_rewards_keeps_the_first_judgement():
    reward = RewardSum([Correctness(), Format(), SoftOverlong(4, 2)], [1.0, 0.5, 2.0])
    assert reward([sum_sample()] * 3, ["46", "4", "12345"]) == [
        RewardResult(1.5, True, "46"),
        RewardResult(0.5, False, "4"),
        RewardResult(-1.5, False, "12345"),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Correctness(quality=2),
        lambda: Correctness(progress=1),
        lambda: Correctness(seconds=0),
        lambda: RewardSum([]),
        lambda: RewardSum([Format()], [1.0, 2.0]),
        lambda: RewardSum([Format()], [float("nan")]),
    ],
)
def test_rewards_refuse_options_out_of_range(make):
    with pytest.raises(ValueError, match=r"must be|give at least"):
        make()


# mathematics


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("72", "72", True),
        ("72", "72.", True),
        ("72", "72.0", True),
        ("1234", "1,234", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("x^2+1", "1+x^2", True),
        ("(1,2)", "(1, 2)", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("72", "73", False),
        ("72", "-72", False),
        ("(1,2)", "(2,1)", False),
        ("5", "5, 6, 7", False),
        ("5", "no idea", False),
        ("5", "{" * 12, False),
        ("1", "9" * 400, False),
    ],
)
def test_answers_that_mean_the_same_are_correct(gold, answer, correct):
    (result,) = Correctness(seconds=20)([math_sample(gold, "plain")], [answer])
    assert result == RewardResult(float(correct), correct, gold if correct else answer)


def test_hostile_mathematics_neither_hangs_nor_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}",
        "10^{10}!!!",
        "(" * 500,
        r"\sqrt{" * 80,
        "__import__('os').system('touch hacked')",
        "\0",
        "\ud800",
        "1+" * 250 + "1",
        "x" * 4096,
    ]
    begun = time.monotonic()
    # the process is replaced after each answer that hangs; a right answer after it is still right
    results = Correctness(seconds=1.0)([math_sample("2", "plain")] * (len(hostile) + 1), [*hostile, "2.0"])
    assert [result.correct for result in results] == [False] * len(hostile) + [True]
    assert time.monotonic() - begun < 150
    assert not list(tmp_path.iterdir())


def test_equal_texts_need_no_process_and_equal_pairs_only_one(monkeypatch):
    seen = []

    class Pool:
        def map(self, jobs):
            seen.extend(jobs)
            return [False] * len(jobs)

    monkeypatch.setattr(module, "_pool", lambda limits: Pool())
    Correctness()([math_sample("2")] * 4, [r"\boxed{2}", r"\boxed{3}", r"\boxed{3}", "no answer"])
    assert seen == [("2", "3")]


def test_without_math_verify_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    module._pool.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'litropy\[math\]'"):
        Correctness()([math_sample("2")], [r"\boxed{3}"])


# the user's problems

GSM8K = {"question": "How many?", "answer": "Half is 48/2=<<48/2=24>>24.\nTogether 1,072.\n#### 1,072"}
MATH = {"problem": "What is $x$?", "level": "Level 1", "solution": r"So $x=\boxed{\frac{1}{2}}$."}


def test_fields_of_gsm8k_and_math_are_understood():
    gsm8k, math = parse_problem(GSM8K, "x"), parse_problem(MATH, "x")
    assert gsm8k == {
        "question": "How many?",
        "answer": "1072",
        "worked": "Half is 48/2=24.\nTogether 1,072.",
        "record": GSM8K,
    }
    assert (math["question"], math["answer"], math["worked"]) == ("What is $x$?", r"\frac{1}{2}", MATH["solution"])
    assert parse_problem({"prompt": "1+1", "answer": 2}, "x")["answer"] == "2"
    assert parse_problem({"prompt": "write a poem", "style": "haiku"}, "x")["answer"] is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected an object"),
        ({"text": "x"}, "expected the question"),
        ({"question": " "}, "expected the question"),
        ({"question": "x", "answer": []}, "should be text"),
        ({"question": "x", "answer": "#### "}, "`answer` is empty"),
        ({"question": "x", "solution": "no box"}, "has no .boxed"),
    ],
)
def test_malformed_problems_are_named(record, message):
    with pytest.raises(ValueError, match=f"file, line 3: .*{message}"):
        parse_problem(record, "file, line 3")


def write_problems(tmp_path, style="gsm8k"):
    records = [{"question": f"What is {n}+1?", "answer": f"{n}+1\n#### {n + 1}"} for n in range(40)]
    if style == "math":
        records = [
            {
                "problem": f"What is {n}+1?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": rf"It is $\boxed{{{n + 1}}}$.",
            }
            for n in range(40)
        ]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "problems.json").write_text(json.dumps(records))
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "problems.parquet")
    return records


@pytest.mark.parametrize("style", ["gsm8k", "math"])
def test_files_and_datasets_give_the_same_problems(tmp_path, style):
    write_problems(tmp_path, style)
    found = [file_problems([str(tmp_path / f"problems.{suffix}")]) for suffix in ("jsonl", "json", "parquet")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "problems.parquet").rename(tmp_path / "folder" / "train.parquet")
    found.append(dataset_problems(str(tmp_path / "folder"), None, "train"))
    assert [problem["answer"] for problem in found[0]] == [str(n + 1) for n in range(40)]
    assert all(problems == found[0] for problems in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "x"}\n{', "line 2: not valid JSON"),
        ("a.jsonl", "[" * 100000, "not valid JSON"),
        ("a.json", '[{"question": "x"}, 5]', "record 2: expected an object"),
        ("a.txt", "x", "are read from .jsonl, .json and .parquet"),
        ("a.parquet", "x", "not a readable Parquet file"),
        ("a.jsonl", "", "There are no problems"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        file_problems([str(tmp_path / name)])


def test_own_problems_become_samples_whose_solution_is_right(tmp_path):
    write_problems(tmp_path)
    data = TaskDataModule(source=str(tmp_path / "problems.jsonl"), val_fraction=0.2, batch_size=4)
    data.setup()
    train, val = data.samples("train"), data.samples("val")
    assert len(train) + len(val) == 40
    assert 0 < len(val) < 20
    samples = [*train, *val]
    assert len({sample.prompt for sample in samples}) == 40
    assert "\\boxed{}" in samples[0].prompt
    assert samples[0].solution.endswith(f"\\boxed{{{samples[0].spec['answer']}}}")
    assert all(result.correct for result in data.reward(samples, [sample.solution for sample in samples]))
    assert data.tokenizer.decode(data.tokenizer(samples[0].prompt)["input_ids"]) == samples[0].prompt
    own = TaskDataModule(source=str(tmp_path / "problems.jsonl"), val_source=str(tmp_path / "problems.json"))
    own.setup()
    assert (len(own.samples("train")), len(own.samples("val"))) == (40, 40)


class SaysPlease(Reward):
    """A reward of the user's."""

    def __call__(self, samples, responses):
        """Judge by the record's own fields."""
        return [
            RewardResult(float(sample.spec["record"]["word"] in response), True)
            for sample, response in zip(samples, responses, strict=True)
        ]


def test_problems_without_an_answer_are_for_rewards_of_the_users(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Ask for {n}.", "word": "please"}) for n in range(20)))
    data = TaskDataModule(source=str(path), reward=SaysPlease(), answer_format="plain")
    data.setup()
    sample = data.samples("train")[0]
    assert (sample.prompt[:8], sample.solution) == ("Ask for ", None)
    assert [result.value for result in data.reward([sample] * 2, ["1, please", "1"])] == [1, 0]
    with pytest.raises(ValueError, match=r"The problem 'Ask for \d+\.' has no `answer`"):
        TaskDataModule(source=str(path)).setup()


def test_an_answer_that_cannot_be_read_is_the_users_to_mend(monkeypatch):
    class Pool:
        def map(self, jobs):
            return [module.Failure("LookupError")] * len(jobs)

    monkeypatch.setattr(module, "_pool", lambda limits: Pool())
    with pytest.raises(ValueError, match="The right answer 'green' is no number"):
        Correctness()([math_sample("green")], [r"\boxed{blue}"])
