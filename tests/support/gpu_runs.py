"""Kinds of runs as they are on a GPU, and which operations their programs would capture there."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.compile import cuda_graph
from support.processes import PretendedRanks

HOST = {"env_id": "CartPole-v1", "vectorization": "sync"}
DEVICE = {"env_id": "CartPole-v1", "backend": "torch"}
CONTINUOUS = {"env_id": "Pendulum-v1", "vectorization": "sync", "norm_obs": True, "norm_reward": True}
ANY = {"env_id": "environments:AnySpacesVector-v0"}
DICT = {**ANY, "env_kwargs": {"observation": "masked", "action": "multi-discrete"}}
IMAGES = {**ANY, "env_kwargs": {"observation": "image (C, H, W)"}}


class Module(nn.Module):
    def __init__(self, inputs, num_outputs):
        super().__init__()
        self.body, self.head = nn.Linear(*inputs, 8), nn.Linear(8, num_outputs + 1)

    def forward(self, obs):
        out = self.head(torch.tanh(self.body(obs)))
        return out[:, :-1], out[:, -1]


def two_processes(device=None, timeout=None):
    """start_ranks, in the second of two processes of a machine."""
    torch.cuda.set_device(1)
    return PretendedRanks(1, 2, 1, torch.device("cuda", 1))


CASES = {
    "one": (HOST, None),
    "continuous": (CONTINUOUS, None),
    "state std": ({**CONTINUOUS, "action_distribution": "normal-state-std"}, None),
    "gsde": ({**CONTINUOUS, "action_distribution": "gsde"}, None),
    "beta": ({**CONTINUOUS, "action_distribution": "beta"}, None),
    "dict": (DICT, None),
    "images": (IMAGES, None),
    "module": (HOST, Module),
    "rnn_state": ({**HOST, "rnn": "lstm"}, None),
    "halves": ({**HOST, "vectorization": "grouped", "env_halves": "on", "rnn": "gru"}, None),
    "device": (DEVICE, None),
    "device, memory": ({**DEVICE, "rnn": "gru"}, None),
    "device, beta": ({**DEVICE, "env_id": "Pendulum-v1", "action_distribution": "beta"}, None),
    "seeds": ({**HOST, "num_seeds": 3}, None),
    "seeds, device": ({**DEVICE, "num_seeds": 3}, None),
    "seeds, images": ({**IMAGES, "num_seeds": 2}, None),
    "seeds, module": ({**HOST, "num_seeds": 2}, Module),
    "seeds, memory": ({**DEVICE, "num_seeds": 2, "rnn": "lstm"}, None),
    "ranks": (HOST, None),
    "ranks, continuous": (CONTINUOUS, None),
    "ranks, device": (DEVICE, None),
    "ranks, memory": ({**HOST, "rnn": "gru"}, None),
}


SYNCHRONISING = {"index by a mask", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "item"}
# torch.func.vmap makes a tensor of the CPU, (), of a Python number. Kernels of these take it as an argument, without a copy.
TAKE_NUMBERS = {"add", "sub", "mul", "div"}
WITHOUT_A_KERNEL = {"detach", "empty", "empty_like", "new_empty", "_unsafe_view"}
# Kernels of a minibatch: 171 for a vector. A policy with memory has some more for each step of its sequences. When `learn` was
# one graph it had 173 for each minibatch: 2,900 for CartPole's preset, 1.77 million for BipedalWalker's.
OF_A_MINIBATCH = 220
OF_A_STEP_OF_MEMORY = 35
OF_BETA = 40  # logarithms of gamma functions and their derivatives


class Watched(TorchDispatchMode):
    """Keeps the name of each operation that has a kernel. Refuses those that wait for the device or read the host's memory."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        results = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, results)) if isinstance(x, Tensor)]
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            name = "index by a mask"
        assert name not in SYNCHRONISING, f"{name} makes the host wait"
        others = [x for x in tensors if x.device != self.device]
        numbers = all(x.device.type == "cpu" and x.ndim == 0 for x in others)
        assert not others or (numbers and (len(others) == len(tensors) or name in TAKE_NUMBERS)), f"{name}: {tensors}"
        if not func.is_view and name not in WITHOUT_A_KERNEL:
            self.names.append(name)
        return results


class WatchedGraph:
    """Stands in for compile.cuda_graph.Graph: which operations would be captured, and on which device."""

    def __init__(self, device):
        self.device, self.names = device, []

    def begin(self):
        self._watched = Watched(self.device)
        self._watched.__enter__()

    def end(self):
        self._watched.__exit__(None, None, None)
        self.names = self._watched.names


@contextlib.contextmanager
def watched_graphs(device):
    """Programs are captured without CUDA. device: a function that says on which. Yields the list of the graphs."""
    made = []

    def graph():
        made.append(WatchedGraph(device()))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "Graph", graph)
        patch.setattr(cuda_graph, "side_stream", contextlib.nullcontext)
        yield made
