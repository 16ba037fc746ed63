"""Rollouts of policies with a memory: acting and learning see the same memory, over episode ends and over rollouts."""

import itertools

import pytest
import torch

from support.programs import column, update
from support.recurrent import EVERY_ENGINE, KINDS, Bench


@EVERY_ENGINE
@pytest.mark.parametrize(("kind", "users", "layers"), [("lstm", 2, 1), ("gru", 1, 2)])
def test_replayed_states_are_those_acted_with(engine, mode, kind, users, layers):
    """Step for step, over episode ends and over ten rollouts; and `episode_start` is true at starts of episodes, nowhere else.

    A rollout ends, and another begins, with every kind of row: one under way, one that has just ended, one that resets.
    """
    bench = Bench(engine, mode, kind=kind, users=users, layers=layers)
    before, starts, borders = None, 0, set()
    for _ in range(10):
        rollout, acted = bench.collect()
        _, _, replayed = bench.unroll(rollout)
        torch.testing.assert_close(replayed[:-1], acted, rtol=1e-5, atol=1e-5)
        if before is not None:
            assert torch.equal(rollout["rnn_state"], before)
        before = acted[-1]
        assert torch.equal(rollout["episode_start"], rollout["obs"][..., 1] == 0.0)  # the walk says how old it is
        episode_start = rollout["episode_start"][:-1]
        torch.testing.assert_close(
            acted[episode_start], bench.from_nothing(rollout["obs"][:-1][episode_start]), rtol=1e-5, atol=1e-5
        )
        starts += int(episode_start.sum())
        borders |= set(zip(rollout["valid"][-1].tolist(), rollout["episode_start"][-1].tolist(), strict=True))
    assert starts > 40
    under_way, begins, resets = (True, False), (True, True), (False, False)
    assert borders == {under_way, begins, resets} - ({resets} if bench.keeps_final_obs else set())
    bench.envs.close()


@EVERY_ENGINE
def test_a_reset_between_rollouts_forgets(engine, mode):
    """What was remembered of episodes that were broken off has no part in the next ones, whatever row they broke off in."""
    bench = Bench(engine, mode)
    for number in range(5):
        bench.collect(cut=True)
        bench.collector.reset(None)
        rollout, acted = bench.collect()
        assert rollout["episode_start"][0].all(), number
        assert rollout["valid"][0].all(), number
        torch.testing.assert_close(acted[0], bench.from_nothing(rollout["obs"][0]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bench.unroll(rollout)[2][:-1], acted, rtol=1e-5, atol=1e-5)
    assert rollout["rnn_state"].any()  # and there was something to forget
    bench.envs.close()


@EVERY_ENGINE
@KINDS
def test_a_truncated_episode_is_bootstrapped_with_its_own_memory(engine, mode, kind):
    """Against the policy stepped by hand through that episode alone, from nothing, and judging what the last action led to.

    With gae_lambda 0 the value's target is r + gamma V'; with one row that counts, the loss is (V - r - gamma V')^2. A cut
    episode is one too, and so is one that goes on after the rollout.
    """
    bench = Bench(engine, mode, kind=kind)
    weights, network = bench.policy.weights(bench.params), bench.policy.policy
    alone = torch.zeros(4, bench.policy.rnn_state_size)  # of the episodes under way, by hand
    options = {"gae_lambda": 0.0, "gamma": 0.5, "norm_adv": False, "clip_vloss": False, "minibatch_size": 28}
    kinds = {"terminated": 0, "truncated": 0, "cut": 0, "under way": 0}
    for number in range(4):
        rollout, _ = bench.collect(cut=number == 3)
        ended = rollout["terminated"] | rollout["truncated"]
        for t, n in itertools.product(range(7), range(4)):
            obs = rollout["obs"][t, n : n + 1]
            if obs[0, 1] == 0.0:
                alone[n] = 0.0
            if not rollout["valid"][t, n]:
                continue
            value = network.value_from_state(weights, obs, alone[n : n + 1])
            _, alone[n : n + 1] = network.step(weights, obs, alone[n : n + 1])
            led_to = (rollout["final_obs"] if bench.keeps_final_obs else rollout["obs"].roll(-1, 0))[t, n : n + 1]
            if not (ended[t, n] or t == 6):
                continue
            bootstrap = network.value_from_state(weights, led_to, alone[n : n + 1]).item()
            if rollout["terminated"][t, n]:
                bootstrap, what = 0.0, "terminated"
            elif ended[t, n]:
                what = "cut" if number == 3 and t == 6 else "truncated"
            else:
                what = "under way"
            kinds[what] += 1
            counted = torch.zeros_like(rollout["valid"])
            counted[t, n] = True
            learned = update(network, bench.params, rollout | {"valid": counted}, torch.arange(4)[None], **options)
            expected = (value.item() - rollout["reward"][t, n].item() - 0.5 * bootstrap) ** 2
            assert column(learned, "value_loss")[0] == pytest.approx(expected, rel=1e-4, abs=1e-5), (number, t, n, what)
    assert min(kinds.values()) > 0, kinds
    bench.envs.close()


def transitions(rollouts, n):
    """Of one environment: observation, action, reward and ends of every valid row."""
    return [
        tuple(rollout[key][t, n].tolist() for key in ("obs", "action", "reward", "terminated", "truncated"))
        for rollout in rollouts
        for t in range(len(rollout["valid"]) - 1)
        if rollout["valid"][t, n]
    ]


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
def test_every_mode_gives_the_same_transitions_and_the_same_update(kind, seed):
    """A policy with memory walks the same way however its environments reset, and learns the same from the same 24 steps.

    One environment; those that reset in a step of their own get as many steps more as there are resets.
    """
    rollouts = {}
    for mode in ("SameStep", "Disabled"):
        rollouts[mode], _ = Bench("arrays", mode, 24, 1, kind=kind, seed=seed).collect(greedy=True)
    resets = int((rollouts["SameStep"]["terminated"] | rollouts["SameStep"]["truncated"])[:23].sum())
    assert resets > 2
    bench = Bench("arrays", "NextStep", 24 + resets, 1, kind=kind, seed=seed)
    rollouts["NextStep"], _ = bench.collect(greedy=True)
    same_step, disabled, next_step = (transitions([rollouts[mode]], 0) for mode in ("SameStep", "Disabled", "NextStep"))
    assert same_step == disabled == next_step
    assert len({action for _, action, *_ in same_step}) > 1

    learned, permutation = {}, torch.zeros(3, 1, dtype=torch.int64)
    for mode, rollout in rollouts.items():
        size = len(rollout["valid"]) - 1
        learned[mode] = update(bench.policy.policy, bench.params, rollout, permutation, minibatch_size=size)
    assert (learned["SameStep"].params - bench.params).abs().max() > 1e-3
    for mode in ("Disabled", "NextStep"):
        torch.testing.assert_close(learned[mode].params, learned["SameStep"].params, rtol=0, atol=2e-5)
        metrics = learned[mode].minibatch_metrics, learned["SameStep"].minibatch_metrics
        torch.testing.assert_close(*metrics, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["arrays", "tensors", "device"])
def test_the_ignored_rows_action_changes_nothing(engine):
    """Any action in a row that only resets, and any reward: not one bit of the update changes."""
    bench = Bench(engine)
    bench.collect()
    rollout, _ = bench.collect()
    ignored = ~rollout["valid"]
    assert ignored[:-1].sum() > 2
    other = rollout | {
        "action": torch.where(ignored, (rollout["action"] + 1) % 3, rollout["action"]),
        "reward": torch.where(ignored, 1e6, rollout["reward"]),
    }
    one, two = (
        update(bench.policy.policy, bench.params, x, torch.tensor([[2, 0, 1, 3]] * 2), minibatch_size=14)
        for x in (rollout, other)
    )
    assert torch.equal(one.params, two.params)
    assert torch.equal(one.minibatch_metrics, two.minibatch_metrics)
