"""Forms of a program on a GPU, the fastest first: each is left, with a line, where it cannot be had or gives other numbers."""

from types import SimpleNamespace

import pytest
import torch

from fastppo.compile import cuda_graph, selector
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.cuda_graph import GraphedProgram
from fastppo.compile.selector import ProgramSelector, ProgramSpec
from fastppo.compile.verification import TOLERANCE, deviation_of_learn
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.seed_axis import Seeds, over_seeds, stack
from support.cpu_graphs import recorded_graphs
from support.processes import PretendedRanks
from support.programs import CATEGORICAL_POLICY, NORMAL_POLICY, assert_same, job
from support.stand_ins import Form, in_use

ON_A_GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture
def gpu(monkeypatch):
    """GraphedProgram stood in for: `broken` has what cannot be made, `deviations` by how much a form differs from eager."""
    found = SimpleNamespace(broken=set(), deviations={}, made=[], notes=[])

    def graphed(program, example, seeds, compiled):
        tier = "compiled-cuda-graph" if compiled else "cuda-graph"
        found.made.append((program, tier))
        if tier in found.broken:
            raise CompileError("it broke")
        return Form(tier, program)

    monkeypatch.setattr(selector, "GraphedProgram", graphed)
    monkeypatch.setattr(selector, "has_loops", lambda program: program == "learn")
    return found


def chosen(gpu, mode, **options):
    """The programs of a run on a GPU."""

    def spec(name):
        def deviation(result, eager, args):
            return gpu.deviations.get(result[0], 0.0)

        return ProgramSpec(Form("eager", name), name, (ON_A_GPU, "normalization", "obs", "noise"), deviation)

    return ProgramSelector(mode, {name: spec(name) for name in ("learn", "act")}, 1, gpu.notes.append, **options)


def test_on_compiles_steps_and_captures_them(gpu):
    """What has no loop is captured alone. Both are compared with eager once."""
    tiers = chosen(gpu, "on")
    assert in_use(tiers) == ("compiled-cuda-graph", "cuda-graph")
    assert (tiers.name, tiers.deviations) == ("compiled-cuda-graph + cuda-graph", {"learn": 0.0, "act": 0.0})
    assert gpu.notes[0] == "programs: compiling the steps of learn for the GPU"
    assert "compiled-cuda-graph + cuda-graph, ready" in gpu.notes[1]
    assert len(gpu.notes) == 2


def test_auto_waits_for_no_compiler(gpu):
    """It captures alone."""
    assert in_use(chosen(gpu, "auto")) == ("cuda-graph", "cuda-graph")
    assert gpu.made == [("learn", "cuda-graph"), ("act", "cuda-graph")]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"compiled-cuda-graph"}, ("cuda-graph", "cuda-graph")),
        ({"cuda-graph"}, ("compiled-cuda-graph", "eager")),
        ({"compiled-cuda-graph", "cuda-graph"}, ("eager", "eager")),
    ],
)
def test_what_cannot_be_made_is_left(gpu, broken, expected):
    """The next form is taken, and a line for each says why."""
    gpu.broken = broken
    tiers = chosen(gpu, "on")
    assert in_use(tiers) == expected
    lines = [note for note in gpu.notes if "it broke" in note]
    left = [("learn", "compiled-cuda-graph")] * ("compiled-cuda-graph" in broken)
    left += [(name, "cuda-graph") for name in ("learn", "act") if "cuda-graph" in broken and (name != "learn" or left)]
    assert lines == [f"programs: {name} is no {tier}: it broke" for name, tier in left]


@pytest.mark.parametrize("wrong", [0.3, float("nan")])
def test_wrong_numbers_are_never_used(gpu, wrong):
    """The eager result is returned in that call. The next form is compared anew in the next one, and so on down to eager."""
    gpu.deviations = {"compiled-cuda-graph": wrong}
    tiers = chosen(gpu, "on")
    assert tiers.learn()[0] == "eager"
    assert gpu.notes[2:] == [
        "programs: learn is cuda-graph and compared with eager again: the compiled-cuda-graph one differs from it by "
        f"{wrong:.2g}; please report this"
    ]
    assert tiers.deviations == {}
    assert [tiers.learn()[0] for _ in range(2)] == ["cuda-graph", "cuda-graph"]
    assert tiers.deviations == {"learn": 0.0}


def test_down_to_eager(gpu):
    """Both forms give wrong numbers: eager until the end, and the deviation is kept for summary.json."""
    gpu.deviations = {"compiled-cuda-graph": 0.5, "cuda-graph": 0.25}
    tiers = chosen(gpu, "on")
    assert [tiers.learn()[0] for _ in range(4)] == ["eager"] * 4
    assert tiers.tiers["learn"] == "eager"
    assert tiers.deviations == {"learn": 0.25}
    assert gpu.made.count(("learn", "cuda-graph")) == 1
    assert gpu.notes[-1].startswith("programs: learn stays eager: the cuda-graph one differs from it by 0.25")


def test_several_processes_take_the_same_form(gpu):
    """What fails in another process, or differs there, is left in this one too. Exchanges are not compiled."""

    class Other(PretendedRanks):
        """The other process has found `worst`."""

        worst = [-100.0]  # noqa: RUF012 (set by the test)

        def highest(self, *numbers):
            return [max(number, self.worst[0]) for number in numbers]

        def barrier(self):
            pass

    ranks = Other(1, 2, 1, "cpu")
    tiers = chosen(gpu, "on", ranks=ranks)
    assert tiers.tiers == {"learn": "cuda-graph", "act": "cuda-graph"}
    ranks.worst[0] = 0.5
    assert tiers.learn()[0] == "eager"
    assert tiers.tiers["learn"] == "eager"


def run_as_traced(graph, inputs):
    """A compiler that changes nothing."""
    return graph


@pytest.mark.parametrize(
    ("policy", "settings"),
    [(CATEGORICAL_POLICY, {}), (NORMAL_POLICY, {"microbatch_size": 5, "target_kl": 0.001})],
    ids=["categorical", "normal, in parts, KL stop"],
)
@pytest.mark.long
def test_compiled_steps_are_the_steps(policy, settings, monkeypatch):
    """What is handed to the compiler is a step with all that it reads as inputs: with other data the eager numbers."""
    monkeypatch.setattr(cuda_graph, "compile_step", run_as_traced)
    learn, example = job(policy, normalized=True, **settings)
    with recorded_graphs():
        captured = GraphedProgram(learn, example, compiled=True)
        for seed in (0, 9):
            arguments = job(policy, seed=seed, normalized=True, **settings)[1]
            assert_same(captured(*arguments), learn(*arguments))


@pytest.mark.long
def test_compiled_steps_of_seeds(monkeypatch):
    """One graph for all seeds, below vmap."""
    monkeypatch.setattr(cuda_graph, "compile_step", run_as_traced)
    learn, _ = job(NORMAL_POLICY, grad_and_aux=functional_grad_and_aux)
    of_seeds = [stack([job(NORMAL_POLICY, seed=seed)[1] for seed in seeds]) for seeds in ((0, 1), (4, 5))]
    with recorded_graphs():
        captured = GraphedProgram(learn, of_seeds[0], Seeds(2, 2, 1), compiled=True)
        torch.testing.assert_close(captured(*of_seeds[1]).params, over_seeds(learn)(*of_seeds[1]).params)


def test_a_compiler_with_wrong_numbers_is_seen(monkeypatch):
    """A step that learns half as fast: above the tolerance of the comparison."""

    def wrong(graph, inputs):
        def step(params, *others):
            new, *rest = graph(params, *others)
            return [params + 0.5 * (new - params), *rest]

        return step

    monkeypatch.setattr(cuda_graph, "compile_step", wrong)
    learn, example = job(CATEGORICAL_POLICY)
    with recorded_graphs():
        captured = GraphedProgram(learn, example, compiled=True)
        assert deviation_of_learn(captured(*example), learn(*example), example) > TOLERANCE


def test_a_compiler_that_fails_says_so(monkeypatch):
    """Whatever it raises: one line."""

    def fail(*_, **__):
        raise AssertionError("no Triton\nand more")

    monkeypatch.setattr("torch._inductor.compile", fail)
    learn, example = job(CATEGORICAL_POLICY)
    with recorded_graphs(), pytest.raises(CompileError, match=r"^a step could not be compiled: AssertionError: no Triton$"):
        GraphedProgram(learn, example, compiled=True)


def test_a_failed_capture_says_so():
    """The card is out of memory: one line, and the selector goes on with what is next."""

    class Full(cuda_graph.Graph):
        def __init__(self):
            pass

        def begin(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    learn, example = job(CATEGORICAL_POLICY)
    with recorded_graphs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "Graph", Full)
        with pytest.raises(CompileError, match=r"^the CUDA graph could not be captured: CUDA out of memory\. .*GiB\.$"):
            GraphedProgram(learn, example)
