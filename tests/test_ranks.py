"""Several processes are one: real ranks over gloo on this machine, held against one process with all environments."""

import concurrent.futures
import os
import socket
import sys
import time

import numpy as np
import pytest
import torch

from fastppo.core.minibatches import draw_permutation
from fastppo.errors import UsageError
from fastppo.policy.normalization import init_moments, update_moments
from fastppo.ranks import (
    SILENT_SECONDS,
    Ranks,
    _for_this_start,
    _watch_connections,
    check_shares,
    start_ranks,
    threads_per_rank,
)
from fastppo.system.cpus import machine_cores
from support import rank_worker
from support.processes import Started

TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each of 2, and of 4, ranks found, in their order, and their exit codes."""
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    started = Started(folder, size, [], rank_worker.work, args_of=lambda rank: [str(folder / f"{rank}.pt")])
    assert started.wait() == [0] * (size - 1) + [9], started.said("err")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def leaves(result):
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", rank_worker.CASES)
@pytest.mark.long
def test_ranks_learn_what_one_process_learns(ranks, name):
    """Same minibatches, statistics, gradients, KL stop and metrics; and the same bits on every rank.

    Two environments make no transition, so with 4 ranks one of them has not a single one.
    """
    expected = rank_worker.update(name)
    applied = expected.minibatch_metrics[:, -1]
    assert (0 < applied.sum() < len(applied)) if name == "gae" else applied.all()
    for found in ranks:
        for one, other, of_first in zip(leaves(found[name]), leaves(expected), leaves(ranks[0][name]), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)
            assert torch.equal(one, of_first)


def test_sums_have_the_same_bits_on_every_rank(ranks):
    """Whatever the size, so that parameters cannot drift apart; held against float64."""
    for index, size in enumerate(rank_worker.SIZES):
        terms = torch.stack([rank_worker.numbers(size, rank) for rank in range(len(ranks))]).double()
        for found in ranks:
            total = found["sums"][index]
            assert torch.equal(total, ranks[0]["sums"][index])
            assert ((total - terms.sum(0)).abs() <= 1e-6 * terms.abs().sum(0)).all()


def test_moments_over_ranks_are_those_of_all_rows(ranks):
    """Counts differ by rank, one of four has none; against one process, and numpy. The rows are added twice."""
    x, weight = rank_worker.rows()
    expected = update_moments(update_moments(init_moments((3,)), x, weight), x, weight)
    seen = x[weight > 0].numpy()
    for found in ranks:
        for one, other, of_first in zip(found["moments"], expected, ranks[0]["moments"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
            assert torch.equal(one, of_first)
        np.testing.assert_allclose(found["moments"][1].numpy(), seen.var(0), rtol=1e-8)


def test_shares_come_back_together(ranks):
    """share and gather are each other's inverse, for tensors of every kind and for numpy's; decisions are rank 0's."""
    whole = torch.arange(24).reshape(3, 8)
    for index, found in enumerate(ranks):
        assert (found["rank"], found["is_main"]) == (index, index == 0)
        gathered = found["gathered"]
        assert torch.equal(gathered["int"], whole)
        assert torch.equal(gathered["bool"], whole % 3 == 0)
        assert torch.equal(gathered["float"], whole.double())
        assert (gathered["numpy"] == (whole.numpy() % 5 == 0)).all()
        assert found["agreed"] == {"run_dir": "of 0"}
        assert found["highest"] == [15, 0]
        assert found["threads"] == max(1, machine_cores() // len(ranks))


def test_a_rank_that_dies_is_a_fault_of_the_others(ranks):
    """In the middle of an all-reduce, within seconds and in one line: neither a hang nor gloo's traceback."""
    for index, found in enumerate(ranks[:-1]):
        assert found["fault"].startswith(f"rank {index} of {len(ranks)}: another rank has gone: ")
        assert "\n" not in found["fault"]
        assert "gloo" not in found["fault"]
        assert found["seconds"] < 20.0


@pytest.mark.skipif(sys.platform != "linux", reason="as in Linux")
def test_connections_end_where_a_machine_is_cut_off():
    """Within SILENT_SECONDS, which the kernel does; benchmarks/two_hosts.sh shows it. Files and pipes are left alone."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        before = len(os.listdir("/proc/self/fd"))
        _watch_connections()
        assert len(os.listdir("/proc/self/fd")) == before
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * SILENT_SECONDS
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_a_start_is_not_taken_for_the_one_before_it():
    """torchrun's store outlives a restart: a rank that finds the name of a start that failed waits for the next one.

    One that all had answered to, as one that only some had; a rank that has not come is waited for, but not for ever.
    """
    store = torch.distributed.HashStore()

    def start(size):
        with concurrent.futures.ThreadPoolExecutor(size) as pool:
            others = [pool.submit(_for_this_start, store, rank, size, 20.0) for rank in range(1, size)]
            time.sleep(0.2)  # they find what is there
            first = pool.submit(_for_this_start, store, 0, size, 20.0).result()
            first.set("from", "rank 0")
            assert [other.result().get("from") for other in others] == [b"rank 0"] * (size - 1)
            return store.get("start")

    names = [start(3), start(3)]
    store.set("start", "only rank 0 had come")
    with pytest.raises(RuntimeError, match="rank 0 did not come"):
        _for_this_start(store, 1, 3, 0.2)
    assert len({*names, start(3)}) == 3


# --- one process ---


def test_one_process_alone_pays_nothing():
    """Everything is handed back as it is: no copy, no process group."""
    alone, x = Ranks(), torch.arange(6.0)
    assert alone.is_main
    for same in (alone.gather(x), alone.all_reduce(x), alone.total(x)[0], alone.agree(x)):
        assert same is x
    assert alone.share(x).data_ptr() == x.data_ptr()
    assert torch.equal(alone.share(x), x)
    assert alone.highest(3, 1) == [3, 1]
    assert alone.learn_settings() == {}
    alone.barrier()
    alone.close()
    assert not torch.distributed.is_initialized()


def set_environment(monkeypatch, **given):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_without_torchrun_there_is_one(monkeypatch):
    """No environment of torchrun, or one of a single process."""
    set_environment(monkeypatch)
    assert start_ranks(torch.device("cpu")) == Ranks()
    set_environment(monkeypatch, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
    assert start_ranks(torch.device("cpu")) == Ranks()


@pytest.mark.parametrize(
    ("given", "device", "said"),
    [
        ({"WORLD_SIZE": "4"}, "cpu", "WORLD_SIZE=4 is set but RANK is not: start with torchrun --nproc-per-node 4"),
        ({"WORLD_SIZE": "many"}, "cpu", "WORLD_SIZE is many"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cuda:1", "use --device cuda"),
        ({"WORLD_SIZE": "512", "RANK": "0"}, "cuda", "--nproc-per-node 512: each rank wants a GPU of its own"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "cpu", "did not meet the others"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "cpu", "did not meet the others at MASTER_ADDR=None"),
    ],
)
def test_what_cannot_start_is_one_line(monkeypatch, given, device, said):
    """Each names what is wrong and what to do; nothing is left behind."""
    set_environment(monkeypatch, **given)
    with pytest.raises(UsageError, match=said) as caught:
        start_ranks(torch.device(device), timeout=1.0)
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """The second process of the second machine of two, pretended: rank 3, NCCL, the second GPU there, the timeout asked for."""
    chosen, started = [], {}
    set_environment(monkeypatch, WORLD_SIZE="4", RANK="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous", lambda *_, **__: iter([("store", 3, 4)]))
    monkeypatch.setattr("fastppo.ranks._for_this_start", lambda store, *_: store)
    monkeypatch.setattr("fastppo.ranks._watch_connections", lambda: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **given: started.update(given, name=backend))
    ranks = start_ranks(torch.device("cuda"), timeout=7.0)
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.device) == (3, 4, 1, torch.device("cuda:1"))
    assert chosen == [1]
    assert (started["name"], started["rank"], started["world_size"]) == ("nccl", 3, 4)
    assert (started["device_id"], started["timeout"].total_seconds()) == (torch.device("cuda:1"), 7.0)


def test_threads_are_shared_out(monkeypatch):
    """torchrun's own OMP_NUM_THREADS=1 is nobody's wish; another number is."""
    cores = machine_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_per_rank(1) == cores
    assert threads_per_rank(10 * cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank(1) == torch.get_num_threads()


@pytest.mark.parametrize(
    ("num_envs", "minibatch_size", "num_shards", "num_ranks", "said"),
    [
        (10, 20, 4, 4, "--num-envs 10 does not fall into equal parts for 4 ranks; nearest that do: 8 or 12"),
        (2, 4, 4, 2, "--num-envs 2 does not fall into equal parts for --minibatch-shards 4; nearest that do: 4"),
        (8, 16, 6, 4, "--minibatch-shards 6 is not a multiple of the 4 ranks; nearest that are: 4 or 8"),
        # 8 environments x 9 steps = 72 rows in minibatches of 18: 12 and 24 divide 72 and have four equal parts
        (8, 18, 4, 4, "--minibatch-size 12 or 24, or --num-minibatches 6 or 3"),
    ],
)
def test_unequal_parts_are_refused(num_envs, minibatch_size, num_shards, num_ranks, said):
    """The flag and the nearest values that can be."""
    with pytest.raises(UsageError) as caught:
        check_shares(num_envs, 9, minibatch_size, num_shards, num_ranks)
    assert said in str(caught.value)


def test_equal_parts_are_not_refused():
    check_shares(8, 9, 24, 4, 2)
    check_shares(7, 9, 3, 1, 1)


# --- minibatches ---

T, N, M, E = 6, 8, 16, 3


def draw(num_shards=1, rank=0, num_ranks=1, seed=5):
    """(E, B / K) and the generator behind it."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((E, T * N // num_ranks), -1)
    draw_permutation(out, generator, T, N, M, num_shards, rank, num_ranks)
    return out, generator


def test_one_shard_is_randperm():
    """The bits of a run of one process: torch.randperm of all rows, epoch after epoch, and nothing else from the generator."""
    out, after = draw()
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(out, torch.stack([torch.randperm(T * N, generator=generator) for _ in range(E)]))
    assert torch.equal(after.get_state(), generator.get_state())


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_every_row_once_an_epoch_and_equal_parts_of_every_shard(num_shards):
    """M / G rows of each minibatch are of environments g * N / G and up; not in an order that the row would give away."""
    out, _ = draw(num_shards)
    assert torch.equal(out.sort(1).values, torch.arange(T * N).expand(E, -1))
    group = (out % N) // (N // num_shards)  # of each row, its shard
    for minibatch in group.view(-1, M):
        assert minibatch.bincount(minlength=num_shards).tolist() == [M // num_shards] * num_shards
    assert not torch.equal(out[0], out[1])
    assert len({tuple(step.tolist()) for step in (out // N).view(-1, M)}) == E * T * N // M


@pytest.mark.parametrize(("num_shards", "num_ranks"), [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4)])
def test_minibatches_are_the_same_for_every_number_of_ranks(num_shards, num_ranks):
    """All ranks' rows of a minibatch, numbered as in the whole rollout, are one process's, in its order; generators agree."""
    expected, after = draw(num_shards)
    parts = []
    for rank in range(num_ranks):
        own, generator = draw(num_shards, rank, num_ranks)
        assert torch.equal(generator.get_state(), after.get_state())
        own_envs = N // num_ranks
        parts.append((own // own_envs * N + rank * own_envs + own % own_envs).view(-1, M // num_ranks))
    assert torch.equal(torch.cat(parts, 1), expected.view(-1, M))
