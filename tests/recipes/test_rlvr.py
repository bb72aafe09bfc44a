"""Training on verifiable rewards: plain GRPO bit for bit, rollouts that record what was sampled, bad input, memory."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import rlvr_problems as problems
import steering_cases as cases
import torch
from gloo_ranks import launch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from litropy.losses import linear_head_stats
from litropy.recipes import RLVR, TaskDataModule
from litropy.recipes import steering as s
from litropy.recipes.rlvr_judging import distinct_correct_at_k, judge, majority_at_k, pass_at_k
from litropy.recipes.rlvr_policy import Wanted, response_stats
from litropy.recipes.rlvr_rollouts import mini_batches
from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample
from litropy.recipes.rlvr_sampling import HuggingFaceEngine, RolloutEngine, RolloutRequest
from litropy.recipes.rlvr_update import batch_stats
from litropy.recipes.rlvr_warm_start import solution_batch
from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.objective import Methods, objective


def make(**options):
    settings = {
        "config": problems.CONFIG, "pad_vocab_to": 1, "learning_rate": 1e-3, "max_new_tokens": 4, "group_size": 4,
        "val_samples": 2,
    }  # fmt: skip
    torch.manual_seed(2)
    return RLVR(**settings | options)


def fit(module, data=None, ckpt_path=None, stop=None, **options):
    metrics = problems.Metrics(stop)
    trainer = problems.trainer(callbacks=[metrics], **options)
    trainer.fit(module, datamodule=data or problems.Sums(), ckpt_path=ckpt_path)
    return trainer, metrics.rows


class Generous(Reward):
    """Longer answers are better, so that every group has something to tell apart."""

    def __call__(self, samples, responses):
        return [RewardResult(len(r) + 0.1 * sum(map(ord, r)), len(r) > 2, r or None) for r in responses]


# the update


def test_nothing_switched_on_is_grpo_bit_for_bit():
    """Written the ordinary way: one graph from the weights to the loss of the whole mini-batch."""
    policy = problems.policy()
    rollouts = cases.near_policy(policy, problems.rollouts(3, 3), Methods())
    ours, found, _ = cases.gradients(policy, Methods(), rollouts, 64)
    policy.zero_grad()
    logp = response_stats(policy, rollouts, Wanted(("logprob",))).logprob
    rewards = rollouts.reward.view(3, 3)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    ratio = torch.exp(logp - rollouts.stats.logprob)
    token = torch.maximum(-ratio * advantage, -ratio.clamp(1 - 0.2, 1 + 0.2) * advantage)
    per_token = rollouts.mask / (rollouts.mask.sum(-1, keepdim=True).clamp(min=1) * len(rollouts))
    loss = torch.where(rollouts.mask, per_token * token, 0).sum()
    loss.backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert torch.equal(found.loss, loss)
    assert torch.equal(ours, theirs)


def test_statistics_of_the_old_policy_serve_the_first_update():
    policy = problems.policy()
    rollouts = problems.rollouts(3, 3)
    rollouts = replace(rollouts, stats=batch_stats(policy, rollouts, Wanted(), 64))
    methods = cases.methods("bonus")
    again, _, _ = cases.gradients(policy, methods, rollouts, 4)
    reused, _, _ = cases.gradients(policy, methods, rollouts, 4, unchanged=True)
    torch.testing.assert_close(reused, again, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["forking_tokens", "bonus"])
def test_the_head_sees_only_tokens_with_a_gradient(name, monkeypatch):
    """Against one graph over all tokens."""
    policy, methods = problems.policy(), cases.methods(name)
    rollouts = problems.rollouts(3, 3)
    rollouts = replace(rollouts, stats=batch_stats(policy, rollouts, cases.wanted(methods), 64))
    seen = []

    def spy(input, weight, target, **options):
        seen.append(int((target >= 0).sum()))
        return linear_head_stats(input, weight, target, **options)

    monkeypatch.setattr("litropy.recipes.rlvr_policy.linear_head_stats", spy)
    ours, found, _ = cases.gradients(policy, methods, rollouts, 64, unchanged=True)
    assert seen == [int(found.kept.sum()) if name == "forking_tokens" else int(rollouts.mask.sum())]
    policy.zero_grad()
    stats = response_stats(policy, rollouts, cases.wanted(methods))
    objective(methods, UpdateBatch(rollouts, methods.advantages(rollouts), stats)).loss.backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_model_sees_only_responses_with_a_gradient(monkeypatch):
    """A group of equal rewards, and then two others, in one micro-batch."""
    policy, rollouts, seen = problems.policy(), problems.rollouts(3, 3), []
    stats = batch_stats(policy, rollouts, Wanted(), 64)
    rollouts = replace(rollouts, reward=torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0, 1]), stats=stats)
    policy.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    cases.gradients(policy, Methods(), rollouts, 64, unchanged=True)
    assert seen == [6]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_statistics_are_those_of_the_logits(model_type):
    policy = problems.policy(model_type=model_type)
    rollouts = problems.rollouts(3, 3)
    found = response_stats(policy, rollouts, Wanted(("logprob", "entropy", "nucleus_entropy"), 0.8))
    for row in range(len(rollouts)):  # one at a time, without padding
        prompt = rollouts.prompts[row][rollouts.prompt_mask[row]]
        response = rollouts.responses[row][rollouts.mask[row]]
        logits = policy.causal_lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        if len(response):
            logits = logits / rollouts.temperature[row][rollouts.mask[row]][:, None]
            p = torch.distributions.Categorical(logits=logits)
            torch.testing.assert_close(
                found.logprob[row][rollouts.mask[row]], p.log_prob(response), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(found.entropy[row][rollouts.mask[row]], p.entropy(), rtol=1e-4, atol=1e-5)
        assert not found.logprob[row][~rollouts.mask[row]].any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("name", ["bonus", "siren", "steer_exact"])
def test_an_update_never_stores_logits(name):
    vocabulary, width = 5000, 31
    policy = problems.policy(vocab_size=vocabulary)
    rollouts = problems.rollouts(16, 8, width=width, vocabulary=vocabulary)
    logits = int(rollouts.mask.numel()) * vocabulary
    methods = cases.methods(name)
    rollouts = cases.near_policy(policy, rollouts, methods)
    with Largest() as largest:
        cases.gradients(policy, methods, rollouts, 128)
    assert policy.head.weight.numel() <= largest.elements
    assert logits * 4 > 64 * 2**20, "smaller logits would fit into the workspace"
    assert largest.elements < logits


def test_mini_batches_are_whole_groups():
    rollouts = problems.rollouts(5, 3)
    rows = mini_batches(rollouts, 2)
    assert [len(part) for part in rows] == [6, 6, 3]
    assert torch.cat(rows).tolist() == list(range(15))
    assert [len(part) for part in mini_batches(rollouts, None)] == [15]
    assert mini_batches(rollouts[torch.tensor([], dtype=torch.int64)], 2) == []


# rollouts


def request(prompts, group_size=3, seed=1, max_new_tokens=6):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return RolloutRequest(ids, mask, group_size, max_new_tokens, [1], 0, seed)


SAMPLERS = {"fixed": s.Sampler(1.3), "top_p": s.TopP(0.7, 0.9), "min_p": s.MinP(0.3)}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_engine_records_what_was_sampled_from(sampler):
    policy = problems.policy()
    asked = request([[5, 6, 7], [8], [9, 10]])
    found = HuggingFaceEngine().generate(policy, asked, sampler)
    assert found.responses.shape[0] == 9
    for row in range(9):
        prompt = asked.prompts[row // 3][asked.prompt_mask[row // 3].bool()]
        response = found.responses[row][found.mask[row]]
        assert (response[:-1] != 1).all()
        assert bool(found.truncated[row]) == (response[-1] != 1)
        with torch.no_grad():
            logits = policy.causal_lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        p = (logits.double() / sampler.temperature).softmax(-1).numpy()
        for place, token in enumerate(response.tolist()):
            order = sorted(range(16), key=lambda v: -p[place][v])
            if isinstance(sampler, s.TopP):
                kept, mass = [], 0.0
                for v in order:
                    kept.append(v)
                    mass += p[place][v]
                    if mass >= 0.7:
                        break
            elif isinstance(sampler, s.MinP):
                kept = [v for v in order if p[place][v] >= 0.3 * p[place][order[0]]]
            else:
                kept = order
            assert token in kept
            expected = math.log(p[place][token] / sum(p[place][v] for v in kept))
            assert float(found.behaviour[row, place]) == pytest.approx(expected, abs=2e-5)


def test_prompts_read_once_a_group_and_rows_in_parts_change_no_distribution():
    """Greedy in effect, so that the random draws do not matter."""
    policy, sampler = problems.policy(), s.Sampler(1e-3)
    asked = request([[5, 6, 7], [8, 9], [9, 10], [4]])
    whole = HuggingFaceEngine().generate(policy, asked, sampler)
    parts = HuggingFaceEngine(max_rows=3).generate(policy, asked, sampler)
    assert torch.equal(torch.where(whole.mask, whole.responses, 0), torch.where(parts.mask, parts.responses, 0))
    assert torch.equal(whole.mask, parts.mask)


def test_a_seed_settles_the_responses():
    policy = problems.policy()
    found = [
        HuggingFaceEngine().generate(policy, request([[5, 6]], 8, seed), s.Sampler()).responses for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


def test_settings_of_the_checkpoint_do_not_reach_the_sampling():
    policy = problems.policy()
    plain = HuggingFaceEngine().generate(policy, request([[5, 6]], 8), s.Sampler())
    own = policy.causal_lm.generation_config
    own.repetition_penalty, own.top_k, own.suppress_tokens = 5.0, 1, list(range(3, 14))
    again = HuggingFaceEngine().generate(policy, request([[5, 6]], 8), s.Sampler())
    assert torch.equal(plain.responses, again.responses)
    assert policy.causal_lm.generation_config is own


def test_engine_and_trainer_agree_on_their_samples():
    module = make(sampler=s.Sampler(0.8), group_size=16)
    _, rows = fit(module, max_steps=2)
    assert rows[-1]["rollout/engine_gap"] < 1e-5
    assert abs(rows[-1]["rollout/on_policy_z"]) < 4


class Hot(s.Sampler):
    """Says one temperature and draws at another."""

    def truncate(self, logits):
        return logits * 0.05

    truncates = False


def test_an_engine_that_draws_from_something_else_is_noticed():
    torch.manual_seed(0)
    module = make(config=problems.CONFIG | {"initializer_range": 0.5}, sampler=Hot(), group_size=32, max_new_tokens=8)
    with pytest.warns(UserWarning, match=r"Engine and trainer disagree: on-policy z is"):
        fit(module, limit_train_batches=1)


# training


def test_a_run_learns_and_says_so():
    module = make(warm_start_steps=60, warm_start_learning_rate=1e-2, max_new_tokens=5, reference="frozen",
                  penalties=[s.ReferenceKL(0.01)], mini_batch_size=10, epochs=2)  # fmt: skip
    trainer, rows = fit(module, problems.Sums(batches=61, size=19), limit_val_batches=3)
    first, last = rows[0], rows[-1]
    assert last["reward/correct"] > 0.2
    assert rows[59]["train/loss"] < 0.6 * first["train/loss"]
    assert trainer.global_step == 60 + 2 * 2
    assert {"train/penalty", "train/clipped_share", "train/grad_norm", "entropy/output"} <= set(last)
    val = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert 0.2 < val["val/pass_at_1"] <= val["val/pass_at_k"] <= 1
    assert val["val/distinct_correct_at_k"] >= val["val/pass_at_k"]


def test_the_reference_is_what_the_warm_start_has_left():
    module = make(warm_start_steps=1, reference="frozen", reward=Generous())
    fit(module, max_steps=1)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    trainer, _ = fit(make(warm_start_steps=1, reference="frozen", reward=Generous()), max_steps=3)
    kept = trainer.lightning_module.reference.copy.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert any(
        not torch.equal(kept[name], value) for name, value in trainer.lightning_module.model.state_dict().items()
    )


def test_adapters_switched_off_are_the_reference():
    pytest.importorskip("peft")
    module = make(lora={"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}, reference="adapter_off",
                  penalties=[s.ReferenceKL(0.1)], reward=Generous(), learning_rate=0.05)  # fmt: skip
    _, rows = fit(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert rows[0]["train/penalty"] == pytest.approx(0, abs=1e-7)
    assert rows[-1]["train/penalty"] > 1e-6


class Same(Reward):
    def __call__(self, samples, responses):
        return [RewardResult(1.0, True, r) for r in responses]


@pytest.mark.parametrize("options", [{}, {"data": s.DynamicSampling(groups=2)}], ids=["skipped", "waiting"])
def test_groups_of_equal_rewards_leave_the_weights_alone(options):
    module = make(reward=Same(), config=problems.CONFIG | {"vocab_size": 16}, **options)
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    _, rows = fit(module, limit_train_batches=2, limit_val_batches=0)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert rows[-1]["rollout/equal_reward_groups"] == 1
    assert "train/grad_norm" not in rows[-1]


def test_the_number_of_steps_is_kept_within_a_batch():
    module = make(reward=Generous(), mini_batch_size=1, epochs=3)
    trainer, _ = fit(module, max_steps=5)
    assert trainer.global_step == 5


def steered():
    """Something with a state in every slot that has one."""
    return make(
        reward=Generous(), data=s.DynamicSampling(groups=3), masks=[s.ClipCov(0.2, -1.0, 5.0)], warm_start_steps=1,
        regularisers=[s.EntropyBonus(controller=s.PIController(None, 0.5, 0.1))], reference="frozen",
        penalties=[s.ReferenceKL(0.05)], mini_batch_size=2, epochs=2, schedule="cosine", warmup_steps=2,
    )  # fmt: skip


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    options = {"max_steps": 30, "limit_val_batches": 0}

    def data():
        return TaskDataModule(num_train=28, batch_size=4, num_val=2)

    whole, rows = fit(steered(), data(), max_epochs=2, **options)
    assert whole.global_step > 5
    fit(steered(), data(), max_epochs=2, stop=tmp_path / "last.ckpt", **options)
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["rlvr"]
    assert set(state["states"]) == {"data:DynamicSampling", "masks.0:ClipCov", "regularisers.0:EntropyBonus"}
    resumed, later = fit(steered(), data(), tmp_path / "last.ckpt", max_epochs=2, **options)
    assert resumed.global_step == whole.global_step
    assert later[-1] == rows[-1]
    ours, theirs = (run.lightning_module.state_dict() for run in (resumed, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_checkpoint_holds_no_objects_and_loads_alone(tmp_path):
    trainer, _ = fit(steered(), limit_train_batches=1, limit_val_batches=0, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    names = set(torch.load(tmp_path / "last.ckpt", weights_only=False)["hyper_parameters"])
    assert not names & {"masks", "data", "sampler", "reward"}
    loaded = RLVR.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    expected = trainer.lightning_module.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


WORKER = Path(problems.__file__).with_name("rlvr_worker.py")


def test_two_ranks_train_as_one_process(tmp_path):
    launch(WORKER, tmp_path)
    ours = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    alone = problems.scripted_run(RLVR, problems.Sums(batches=3, size=4), "auto", 1)
    assert ours[0]["logged"] == ours[1]["logged"]
    for name, value in alone["weights"].items():
        assert torch.equal(ours[0]["weights"][name], ours[1]["weights"][name])
        torch.testing.assert_close(ours[0]["weights"][name], value, rtol=1e-4, atol=1e-6)
    for name, value in alone["logged"].items():
        assert ours[0]["logged"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# bad input


class Bad(Reward):
    def __init__(self, value):
        self.value = value

    def __call__(self, samples, responses):
        if callable(self.value):
            if any(sample.sample_id == 3 for sample in samples):
                self.value()
            return [RewardResult(1.0, True, r) for r in responses]
        return [RewardResult(self.value if sample.sample_id == 3 else 1.0, True, "a") for sample in samples]


def boom():
    raise KeyError("no such key")


SAMPLES = [Sample(f"{n}=", n, "sum", n) for n in range(5)]


@pytest.mark.parametrize(("value", "said"), [(math.nan, "gave nan"), (math.inf, "gave inf"), (boom, "raised KeyError")])
def test_bad_rewards_name_their_sample(value, said):
    with pytest.raises(ValueError, match=rf"{said}.*sample 3 of task 'sum', prompt '3='"):
        judge(Bad(value), SAMPLES, ["x"] * 5)
    with pytest.warns(UserWarning, match="counts as wrong"):
        results = judge(Bad(value), SAMPLES, ["x"] * 5, "wrong")
    assert [result.correct for result in results] == [True, True, True, False, True]
    assert results[3] == RewardResult(0.0, False, None)


def test_a_reward_with_too_few_results_is_refused():
    class Short(Reward):
        def __call__(self, samples, responses):
            return []

    with pytest.raises(ValueError, match="0 results for 5 responses"):
        judge(Short(), SAMPLES, [""] * 5)


class Dying(RolloutEngine):
    def generate(self, policy, request, sampler):
        raise ConnectionError("lost the server")


def test_an_engine_that_dies_says_how_to_go_on():
    with pytest.raises(
        RuntimeError, match=r"Dying failed on 4 prompts \(ConnectionError: lost the server\).*--ckpt_path last"
    ):
        fit(make(engine=Dying()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "`group_size` is 1, but GRPO compares"),
        ({"penalties": [s.ReferenceKL()]}, "needs a reference model"),
        ({"reference": "both"}, "`reference` is 'both'"),
        ({"micro_batch_size": 0}, "`micro_batch_size` is 0"),
        ({"val_k": 3}, "`val_k` is 3"),
        ({"lora": {"rank": 3}}, "`lora` is"),
        ({"reference": "adapter_off"}, "needs adapters"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options).configure_model()


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="precision is '16-true'"):
        fit(make(), precision="16-true")


def test_a_warm_start_without_solutions_names_the_sample():
    with pytest.raises(ValueError, match="sample 2 of task 'sum' has none"):
        solution_batch([SAMPLES[2]], problems.tokenizer(), torch.device("cpu"))


def test_the_warm_start_learns_solutions_and_their_end():
    samples = [Sample("7=", 7, "sum", 0, "3+4"), Sample("10=", 10, "sum", 1, "9+1")]
    batch = solution_batch(samples, problems.tokenizer(), torch.device("cpu"))
    assert batch["labels"].tolist() == [[-100, -100, 6, 13, 7, 1, -100], [-100, -100, -100, 12, 13, 4, 1]]
    assert batch["attention_mask"].sum().item() == 13


def test_the_warm_start_can_smooth_its_labels():
    still = make(warm_start_steps=1, warm_start_label_smoothing=0.3, learning_rate=1e-12)
    _, rows = fit(still, max_steps=1)
    samples = next(iter(problems.Sums().train_dataloader()))
    batch = solution_batch(samples, problems.tokenizer(), torch.device("cpu"))
    logits = still.causal_lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], label_smoothing=0.3)
    assert rows[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_smoothing_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"`label_smoothing` is 1.5"):
        make(warm_start_label_smoothing=1.5)


# evaluation


class ShortLast(problems.Sums):
    def val_dataloader(self):
        return DataLoader([self.samples()[:3], []], batch_size=None)


def test_a_rank_without_a_prompt_left_takes_no_part_in_validation():
    module = make(reward=Same())
    trainer = problems.trainer()
    (found,) = trainer.validate(module, datamodule=ShortLast(), verbose=False)
    assert found["val/pass_at_1"] == found["val/pass_at_k"] == 1


def test_pass_at_k_counts_subsets():
    from itertools import combinations

    answers = ["a", "a", "b", None, "c", "c"]
    right = [True, True, True, False, False, False]
    results = [RewardResult(float(r), r, a) for r, a in zip(right, answers, strict=True)]
    for k in (1, 2, 4):
        subsets = list(combinations(results, k))
        assert pass_at_k(3, 6, k) == pytest.approx(sum(any(r.correct for r in x) for x in subsets) / len(subsets))
        distinct = sum(len({r.answer for r in x if r.correct}) for x in subsets) / len(subsets)
        assert distinct_correct_at_k(results, k) == pytest.approx(distinct)
    assert majority_at_k(results, 6) == 0.5  # "a" and "c" have two votes each
    assert majority_at_k(results, 3) == 0.5  # "a" wins the first three, "c" the others
    assert majority_at_k([RewardResult(0.0, False, None)] * 2, 2) == 0
