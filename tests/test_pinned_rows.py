"""Environments on the host, the rollout on a GPU: one copy a step in each direction. The GPU's memory is the CPU's here."""

import csv

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo import train
from fastppo.rollout import step_collector
from fastppo.rollout.pinned_rows import PinnedRows
from fastppo.rollout.step_collector import HostCollector
from support.processes import TIMES
from support.runs import tiny

ANY = {"env_id": "environments:AnySpacesVector-v0", "hidden_sizes": (8,)}
RUNS = {
    "vector": {},
    "several keys, mask": {**ANY, "env_kwargs": {"observation": "masked", "action": "multi-discrete"}},
    "structure": {**ANY, "env_kwargs": {"observation": "nested", "action": "box"}, "norm_obs": True},
    "image": {**ANY, "env_kwargs": {"observation": "image (C, H, W)"}, "cnn_size": 8},
    "final observations": {"env_id": "Pendulum-v1", "max_episode_steps": 5, "autoreset": "same-step"},
    "memory": {"rnn": "gru", "num_minibatches": 2},
    "seeds": {"num_seeds": 2},
    "rollouts cut": {"reset_each_rollout": True},
}


class Copies(TorchDispatchMode):
    """Counts copies from or to the memory of the host, and their bytes."""

    def __init__(self, collector):
        super().__init__()
        held = [collector.steps._rows, collector.results._rows, collector.host_actions]
        self.names = {x.untyped_storage().data_ptr(): name for x, name in zip(held, ("up", "up", "down"), strict=True)}
        self.made = {"up": [], "down": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            for x in args[:2]:
                name = self.names.get(x.untyped_storage().data_ptr()) if isinstance(x, torch.Tensor) else None
                if name is not None:
                    self.made[name].append(x.nbytes)
        return func(*args, **(kwargs or {}))


def rows_of(run_dir):
    """metrics.csv of all seeds, without times."""
    rows = []
    for path in sorted(run_dir.rglob("metrics.csv")):
        with path.open(newline="") as file:
            rows += [{name: x for name, x in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    return rows


@pytest.mark.parametrize("case", RUNS)
def test_one_copy_a_step_in_each_direction(case, tmp_path, monkeypatch):
    """Whole runs: the numbers of a run whose rollout is on the host, to the bit. T + 1 rows and results go up, T down."""
    train(tiny(tmp_path / "host", num_iterations=2, check_env=False, device="cpu", **RUNS[case]))
    counted, collect = [], HostCollector.collect

    def counting(self, *args, **kwargs):
        with Copies(self) as copies:
            phases = collect(self, *args, **kwargs)
        counted.append(copies.made)
        return phases

    monkeypatch.setattr(step_collector, "shares_memory", lambda device: False)
    monkeypatch.setattr(HostCollector, "collect", counting)
    train(tiny(tmp_path / "device", num_iterations=2, check_env=False, device="cpu", **RUNS[case]))
    assert rows_of(tmp_path / "device") == rows_of(tmp_path / "host")
    assert [(len(made["up"]), len(made["down"])) for made in counted] == [(16 + 2, 16)] * 2


def test_pictures_go_up_as_bytes():
    """One byte a pixel, and few for the rest."""
    rollout = {"obs": torch.zeros(3, 2, 36, 36, dtype=torch.uint8), "episode_start": torch.zeros(3, 2, dtype=torch.bool)}
    rows = PinnedRows(rollout, ["obs", "episode_start"])
    assert 2 * 36 * 36 + 2 <= rows._staged.nbytes < 2 * 36 * 36 + 32


def test_each_row_goes_to_its_place():
    """Tensors of any dtype and shape; keys that come later are of the row before."""
    shapes = {"byte": (3,), "flag": (), "double": (2, 2), "number": ()}
    dtypes = {"byte": torch.uint8, "flag": torch.bool, "double": torch.float64, "number": torch.int64}
    rollout = {key: torch.zeros(4, 5, *shape, dtype=dtypes[key]) for key, shape in shapes.items()}
    rows = PinnedRows(rollout, ["byte", "double"], ["flag", "number"])
    generator = torch.Generator().manual_seed(0)
    for key, host in rows.host.items():
        assert (host.shape, host.dtype) == (rollout[key].shape, rollout[key].dtype)
        host.copy_(torch.randint(0, 2, host.shape, generator=generator))
    before = {key: host.clone() for key, host in rows.host.items()}
    for t in range(4):
        rows.upload(t)
        for key, x in rollout.items():
            done = t + 1 if key in ("byte", "double") else t
            assert torch.equal(x[:done], before[key][:done])
            assert not x[done:].any()
