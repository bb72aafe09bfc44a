"""Every task: its solutions are right, wrong ones are not, and no text can raise, hang or run anything."""

import itertools
import json
import string
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.recipes.tasks import (
    Arithmetic,
    BlocksWorld,
    CheckerJumping,
    Countdown,
    KolmogorovTest,
    RiverCrossing,
    SumToTarget,
    TowerOfHanoi,
    Verdict,
    task_key,
)
from litropy.recipes.tasks.answer_format import MAX_ANSWER_CHARS, extract_answer, request, wrap_answer
from litropy.recipes.tasks.task import task_class

TASKS = {
    "sums": Arithmetic(2),
    "arithmetic": Arithmetic(3, ["+", "-", "*"]),
    "arithmetic, padded": Arithmetic(3, ["+", "-", "*"], padded=True),
    "sum to target": SumToTarget(),
    "sum of four": SumToTarget(4, 30),
    "countdown": Countdown(),
    "countdown, some": Countdown(5, 50, 200, use_all=False),
    "hanoi": TowerOfHanoi(2, 4),
    "hanoi, first": TowerOfHanoi(3, 3, "first"),
    "checkers": CheckerJumping(),
    "checkers, first": CheckerJumping(2, 2, "first"),
    "river": RiverCrossing(2, 4, 2, 3),
    "river, first": RiverCrossing(3, 3, 2, 2, "first"),
    "blocks": BlocksWorld(),
    "blocks, four stacks": BlocksWorld(3, 3, 4),
    "kolmogorov": KolmogorovTest(),
    "kolmogorov, longer": KolmogorovTest(3, 5, 32, 64),
}
PUZZLES = {name: task for name, task in TASKS.items() if name.split(",")[0] in ("hanoi", "checkers", "river", "blocks")}
HOSTILE = [
    "9**9**9**9",
    "9" * 4000,
    "-" * 4000 + "1",
    "(" * 4096,
    "(" * 2000 + "1" + ")" * 2000,
    "[" * 4096,
    "\0",
    "1\0+2",
    "\ud800",
    "٣+٤",  # digits to Python, but not to a task
    "²",
    "1e309",
    "nan",
    "__import__('os').system('touch hacked')",
    "().__class__.__base__.__subclasses__()",
    "12 " * 1300,
    "ab a " * 800,
    ";".join(["a=fill(1,255)", *["a=concat(a,a)"] * 60]),
    ";".join(["a=up(1,255,1)", *["a=tile(a,255)"] * 60]),
    ";".join(["a=fill(1,255)", *["a=interleave(a,a)"] * 60]),
    "a=up(0,255,0);" * 290,
    "a=a(a)",
    "a=up(999999999999,1,1)",
    "a=every(a,0)",
    "a=fill(1,9);b=every(a,0)",
    "a=fill(1,9);b=mod(a,0)",
    "a=fill(1,9);b=subtract(a,a);c=modulo(a,b)",
    "",
    " ",
    "\n" * 4096,
]


def problems(task, count=20):
    for seed in range(count):
        spec = task.generate(Random(seed))
        yield spec, task.solve(spec, Random(seed))


@pytest.fixture(params=TASKS, ids=str)
def task(request):
    return TASKS[request.param]


def test_the_solution_is_right(task):
    for spec, solution in problems(task):
        verdict = task.check(spec, solution)
        assert verdict.correct, (spec, solution, verdict)
        assert verdict.answer
        assert 0 < verdict.quality <= 1
        assert task.check(spec, verdict.answer).answer == verdict.answer, "canonical is an answer, and stays as it is"
        assert extract_answer(wrap_answer(solution, "tags"), "tags") == solution


def test_problems_are_plain_data_that_follows_from_the_seed(task):
    specs = [spec for spec, _ in problems(task)]
    assert specs == [spec for spec, _ in problems(task)]
    assert json.loads(json.dumps(specs)) == specs
    for spec in specs:
        prompt, rules = task.prompt(spec), task.rules(spec)
        assert prompt.isascii()
        assert len(prompt) < 300
        assert rules.endswith(".")
        assert "{" not in rules
    assert task_class(task_key(type(task))) is type(task)


def test_mutated_solutions_are_judged_like_an_independent_checker(task):
    """One character is changed, left out or added; what still passes must be right in the eyes of a second judge."""
    random, wrong = Random(0), 0
    for spec, solution in problems(task, 12):
        for _ in range(20):
            place = random.randrange(len(solution))
            character = random.choice(solution + "0123456789+")
            cut = random.choice([(place, place), (place, place + 1)])
            mutated = solution[: cut[0]] + random.choice([character, ""]) + solution[cut[1] :]
            correct = task.check(spec, mutated.strip()).correct
            wrong += not correct
            if correct:
                assert JUDGES[type(task)](spec, mutated), (spec, mutated)
    assert wrong > 60


# second judges, written another way; they may trust what has passed the check for its form


def judge_countdown(spec, answer):
    numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in answer).split()]
    left = list(spec["numbers"])
    for number in numbers:
        left.remove(number)
    return abs(eval(answer, {"__builtins__": {}}) - spec["target"]) < 1e-9 and not (left and spec["use_all"])


def judge_stacks(spec, answer, hanoi):
    stacks = [list(stack) for stack in spec["start"].split("|")]
    for source, target in answer.replace(",", " ").split():
        moved = stacks[int(source) - 1].pop()
        onto = stacks[int(target) - 1]
        assert source != target
        assert not (hanoi and onto and onto[-1] < moved)
        onto.append(moved)
    return "|".join("".join(stack) for stack in stacks) == spec["goal"]


def judge_checkers(spec, answer):
    row = list(spec["start"])
    for move in answer.replace(",", " ").split():
        source, free = int(move) - 1, row.index("_")
        colour, step = row[source], free - source
        assert (colour == "R") == (step > 0)
        assert abs(step) == 1 or (abs(step) == 2 and row[(source + free) // 2] not in (colour, "_"))
        row[free], row[source] = colour, "_"
    return "".join(row) == spec["goal"]


def judge_river(spec, answer):
    left, right = (set(bank) for bank in spec["start"].split("|"))
    boat = {"*"}
    for crew in answer.replace(",", " ").split():
        here, there = (left, right) if "*" in left else (right, left)
        assert len(set(crew)) == len(crew) <= spec["size"][1]
        assert set(crew) <= here
        here -= set(crew) | boat
        there |= set(crew) | boat
        for place in (left, right, set(crew)):
            for actor in place & set(string.ascii_lowercase):
                agents = place & set(string.ascii_uppercase)
                assert actor.upper() in agents or not agents
    return not left


def judge_program(spec, answer):
    values = {}
    for line in answer.split("\n"):
        name, _, call = line.replace(" ", "").partition("=")
        function, _, arguments = call.rstrip(")").partition("(")
        items = [
            values.get(item) or int(item) if item in values or item.isdigit() else None for item in arguments.split(",")
        ]
        values[name] = MEANINGS[function](*items)
    return values[name] == spec["sequence"]


MEANINGS = {
    "up": lambda k, m, n: [(k + n * i) % 256 for i in range(m)],
    "down": lambda k, m, n: [(k - n * i) % 256 for i in range(m)],
    "fill": lambda k, m: [k] * m,
    "tile": lambda x, k: x * k,
    "reverse": lambda x: list(reversed(x)),
    "replace": lambda x, old, new: [{old: new}.get(v, v) for v in x],
    "every": lambda x, k: [v for i, v in enumerate(x) if i % k == 0],
    "slice": lambda x, k, m: [v for i, v in enumerate(x) if k <= i < m],
    "plus": lambda x, k: [(v + k) % 256 for v in x],
    "minus": lambda x, k: [(v - k) % 256 for v in x],
    "mod": lambda x, k: [v % k for v in x],
    "evens": lambda x: [v for v in x if not v & 1],
    "odds": lambda x: [v for v in x if v & 1],
    "nonzero": lambda x: list(filter(None, x)),
    "scan": lambda x: [v % 256 for v in itertools.accumulate(x)],
    "add": lambda x, y: [(a + b) % 256 for a, b in zip(x, y, strict=False)],
    "subtract": lambda x, y: [(a - b) % 256 for a, b in zip(x, y, strict=False)],
    "modulo": lambda x, y: [a % b for a, b in zip(x, y, strict=False)],
    "concat": lambda x, y: [*x, *y],
    "interleave": lambda x, y: [v for pair in itertools.zip_longest(x, y) for v in pair if v is not None],
}
JUDGES = {
    Arithmetic: lambda spec, answer: eval(f"{spec['left']}{spec['operation']}{spec['right']}") == int(answer),
    SumToTarget: lambda spec, answer: eval(answer) == spec["target"] and answer.count("+") == spec["terms"] - 1,
    Countdown: judge_countdown,
    TowerOfHanoi: lambda spec, answer: judge_stacks(spec, answer, True),
    BlocksWorld: lambda spec, answer: judge_stacks(spec, answer, False),
    CheckerJumping: judge_checkers,
    RiverCrossing: judge_river,
    KolmogorovTest: judge_program,
}


@pytest.mark.parametrize(
    ("left", "operation", "right", "prompt", "value"),
    [
        (5, "+", 34, "05+34=", "039"),
        (5, "-", 34, "05-34=", "-29"),
        (5, "-", 9, "05-09=", "-04"),
        (7, "*", 8, "07*08=", "0056"),
    ],
)
def test_padded_arithmetic_is_as_wide_as_can_be(left, operation, right, prompt, value):
    spec = {"left": left, "operation": operation, "right": right, "digits": 2}
    assert Arithmetic.prompt(spec) == prompt
    assert Arithmetic.solve(spec, Random(0)) == value
    assert Arithmetic.check(spec, value).correct
    wider = f"-0{value[1:]}" if value.startswith("-") else f"0{value}"
    assert Arithmetic.check(spec, wider) == Verdict.wrong("another number", wider)
    other = value[:-1] + str((int(value[-1]) + 1) % 10)
    assert Arithmetic.check(spec, other) == Verdict.wrong("another number", other, (len(value) - 1) / len(value))
    assert Arithmetic.rules(spec).endswith(f"of {len(value)} characters, with leading zeros.")


def test_second_judges_find_the_solutions_right(task):
    for spec, solution in problems(task):
        assert JUDGES[type(task)](spec, solution), (spec, solution)


# puzzles


@pytest.mark.parametrize("name", PUZZLES)
def test_a_shortest_solution_can_lose_no_move(name):
    task = PUZZLES[name]
    for spec, solution in problems(task, 8):
        moves = solution.split()
        assert len(moves) == spec["optimum"]
        for place in range(len(moves)):
            assert not task.check(spec, " ".join(moves[:place] + moves[place + 1 :])).correct
        there_and_back = task.check(spec, f"{solution} {moves[-1]} {moves[-1]}")
        assert not there_and_back.correct or there_and_back.quality < 1


def test_optimal_lengths_are_the_known_ones():
    first = Random(0)
    for disks in range(1, 8):
        assert TowerOfHanoi(disks, disks, "first").generate(first)["optimum"] == 2**disks - 1
    for each in range(1, 5):
        assert CheckerJumping(each, each, "first").generate(first)["optimum"] == (each + 1) ** 2 - 1
    for (pairs, boat), crossings in {(2, 2): 5, (3, 2): 11, (4, 3): 9, (5, 3): 11, (6, 4): 9}.items():
        assert RiverCrossing(pairs, pairs, boat, boat, "first").generate(first)["optimum"] == crossings


@pytest.mark.parametrize(("pairs", "boat"), [(4, 2), (6, 3)])
def test_river_crossings_without_a_solution_are_not_drawn(pairs, boat):
    with pytest.raises(ValueError, match="allow a larger boat"):
        RiverCrossing(pairs, pairs, boat, boat)
    assert (pairs, boat) not in RiverCrossing(2, pairs, 2, boat).sizes


def test_loops_do_not_make_another_solution():
    spec = {"size": [2], "start": "21||", "goal": "||21", "optimum": 3}
    straight, astray = (TowerOfHanoi.check(spec, moves) for moves in ("12 13 23", "12,21,13,31, 12 13 23"))
    assert straight.answer == astray.answer == "12 13 23"
    assert astray.quality == 3 / 7
    assert TowerOfHanoi.check(spec, "12 12") == Verdict.wrong("move 2 (12) is illegal", "12 12", 0.5)
    assert TowerOfHanoi.check(spec, "12") == Verdict.wrong("the goal is not reached", "12", 1.0)


def test_who_sits_where_in_the_boat_does_not_matter():
    spec = {"size": [2, 2], "start": "aAbB*|", "goal": "|*aAbB", "optimum": 5}
    assert RiverCrossing.check(spec, "ba a BA A Aa").answer == "ab a AB A aA"
    assert not RiverCrossing.check(spec, "aa a AB A aA").correct


# expressions and programs


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("(25-7)*3", "3 * (25 - 7)", True),
        ("((3)*((25-7)))", "3*(25-7)", True),
        ("25-(7-3)", "3+25-7", True),
        ("25/(7/3)", "3*25/7", True),
        ("25-7-3", "25-3-7", True),
        ("25-7-3", "25-7+3", False),
        ("3*(25-7)", "3*25-7", False),
        ("3/25*7", "7/25*3", True),
        ("3/(25*7)", "3/25/7", True),
        ("3-(25+7)", "3-25+7", False),
    ],
)
def test_expressions_are_the_same_solution_when_only_order_and_grouping_differ(left, right, same):
    spec = {"numbers": [3, 7, 25], "target": 0, "use_all": True}
    found = [Countdown.check(spec, text).answer for text in (left, right)]
    assert None not in found
    assert (found[0] == found[1]) is same


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("25-7", "not every number is used"),
        ("25-7*3*1", "too many numbers"),
        ("25-7-7", "used too often"),
        ("25/(7-7)", "division by zero"),
        ("25--7", "out of place"),
        ("-7+25", "out of place"),
        ("25 7", "out of place"),
        ("(25-7", "not complete"),
        ("25-7)", "out of place"),
        ("25**7", "out of place"),
        ("25^7", "no part of an expression"),
        ("12345", "no part of an expression"),
        ("()", "out of place"),
        ("25+7+3", "the value is 35"),
        ("25/7/3", "the value is 25/21"),
    ],
)
def test_countdown_says_what_is_wrong(text, reason):
    verdict = Countdown.check({"numbers": [3, 7, 25], "target": 54, "use_all": True}, text)
    assert not verdict.correct
    assert reason in verdict.reason


def test_programs_are_the_same_solution_when_names_and_idle_lines_differ():
    spec = {"sequence": [5, 6, 7] * 8}
    answers = ["a=up(5,3,1)\nb=tile(a,8)", "x = up(5, 3, 1); z=fill(1,2); x=tile(x,8)"]
    verdicts = [KolmogorovTest.check(spec, answer) for answer in answers]
    assert verdicts[0].answer == verdicts[1].answer == answers[0]
    assert verdicts[0].quality > verdicts[1].quality > 0, "idle lines cost bits"
    assert KolmogorovTest.check(spec, "a=up(5,6,1)").progress == 3 / 24


def test_a_program_that_holds_its_output_literally_is_never_right():
    random = Random(0)
    for length in (4, 8, 32, 200):
        sequence = [random.randrange(256) for _ in range(length)]
        verdict = KolmogorovTest.check({"sequence": sequence}, f"a={sequence}")
        assert verdict.reason == "the program is no shorter than the sequence"


# hostile text


@given(
    st.one_of(
        st.text(max_size=300),
        st.text("0123456789+-*/() ", max_size=60),
        st.text("123456 ,", max_size=60),
        st.text("aAbBcC ", max_size=60),
        st.text("ab=updown tilefill(),0123456789;\n[]", max_size=80),
    )
)
@settings(max_examples=60, deadline=None)
def test_no_text_raises(text):
    for task in (Arithmetic(), SumToTarget(), Countdown(), PUZZLES["hanoi"], PUZZLES["river"], KolmogorovTest()):
        spec = task.generate(Random(1))
        verdict = task.check(spec, text)
        assert isinstance(verdict, Verdict)
        assert not verdict.correct or JUDGES[type(task)](spec, text.strip())
        assert (verdict.reason == "") is verdict.correct


def test_hostile_answers_take_no_time_and_do_nothing(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = task.generate(Random(0))
    begun = time.process_time()
    for text in HOSTILE:
        assert not task.check(spec, text[:MAX_ANSWER_CHARS]).correct, text[:40]
    assert time.process_time() - begun < 3
    assert not list(tmp_path.iterdir())


# where the answer is


@pytest.mark.parametrize(
    ("response", "answer_format", "answer"),
    [
        (" 46\n", "plain", "46"),
        ("", "plain", None),
        (" \n", "plain", None),
        ("x" * (MAX_ANSWER_CHARS + 1), "plain", None),
        ("<think>40+6</think> 46", "plain", "46"),
        ("<answer>1</answer> no, <answer>46</answer>.", "tags", "46"),
        ("46", "tags", None),
        ("<answer>46", "tags", None),
        ("46</answer>", "tags", None),
        ("</answer>46<answer>", "tags", None),
        ("<answer></answer>", "tags", None),
        ("<think><answer>1</answer></think>46", "tags", None),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1", "boxed", None),
        (r"\boxed{" * 1000, "boxed", None),
        ("{" * 10**6, "boxed", None),
        ("<answer>" * 10**5, "tags", None),
    ],
)
def test_answers_are_found_where_the_format_says(response, answer_format, answer):
    assert extract_answer(response, answer_format) == answer


def test_prompts_ask_for_the_format_that_is_read():
    assert request("plain") == ""
    for answer_format in ("tags", "boxed"):
        example = wrap_answer("46", answer_format)
        assert extract_answer(f"Well, {example}", answer_format) == "46"
        assert example.split("46")[0] in request(answer_format)


# options


@pytest.mark.parametrize(
    "make",
    [
        lambda: Arithmetic(0),
        lambda: Arithmetic(2, []),
        lambda: Arithmetic(2, ["**"]),
        lambda: SumToTarget(1),
        lambda: SumToTarget(2, 0),
        lambda: Countdown(1),
        lambda: Countdown(3, 1),
        lambda: Countdown(3, 25, 0),
        lambda: TowerOfHanoi(3, 2),
        lambda: TowerOfHanoi(1, 8),
        lambda: CheckerJumping(0),
        lambda: RiverCrossing(1),
        lambda: RiverCrossing(2, 3, 1),
        lambda: BlocksWorld(3, 6),
        lambda: BlocksWorld(stacks=2),
        lambda: KolmogorovTest(0),
        lambda: KolmogorovTest(1, 2, 3),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|give one"):
        make()


@pytest.mark.parametrize("key", ["", "nothing", "litropy.recipes.tasks.Nothing", "os.path.join", "..x"])
def test_a_task_that_is_none_is_refused(key):
    with pytest.raises(ValueError, match="task"):
        task_class(key)
