"""Trace a program to the graph for Inductor: ATen operators, with loops as PyTorch's scan operator. Compiles nothing.

make_fx runs the function once on fake tensors and records its operators. Dynamo is not used, so the algorithm needs no code for
the compiler.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.compile import native
from fastppo.compile.decompositions import decompositions
from fastppo.compile.program import Example, Program, execution_of, is_shared, plain
from fastppo.compile.seed_loops import below_seeds, on_whole_tensors
from fastppo.compile.workers import WORKER_FIELDS
from fastppo.core.contracts import Execution
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.seed_axis import over_seeds


def trace(program: Program, example: Example, mapped: bool = False) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The program as a graph of ATen operators from flat tensors to flat tensors, and its fake inputs. mapped: over seeds."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    if "execution" in inspect.signature(program.func).parameters:
        program = functools.partial(program, execution=_as_traced(execution_of(program)))
    if is_shared(program):
        example = (*example, torch.zeros(WORKER_FIELDS, dtype=torch.int64))
    function = over_seeds(program) if mapped else program
    leaves, spec = pytree.tree_flatten(plain(example))
    present = [index for index, leaf in enumerate(leaves) if leaf is not None]

    def flat_program(*tensors: Tensor) -> list[Tensor]:
        filled: list[Tensor | None] = [None] * len(leaves)
        for index, tensor in zip(present, tensors, strict=True):
            filled[index] = tensor
        return _unaliased(pytree.tree_leaves(function(*pytree.tree_unflatten(filled, spec))), tensors)

    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    inputs = [fake_mode.from_tensor(leaves[index]) for index in present]
    with fake_mode:
        return _tidy(make_fx(flat_program, decomposition_table=decompositions())(*inputs)), inputs


def _as_traced(execution: Execution) -> Execution:
    """The execution with the compiled forms of loops, gradient, recurrent cells and all-reduce."""
    return dataclasses.replace(
        execution,
        scan=_traced_scan,
        grad_and_aux=functional_grad_and_aux,
        cells=native.CELLS,
        all_reduce=native.all_reduce,
    )


def trace_step(body: Callable[..., list[Tensor]], inputs: list[Tensor]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """One step of a loop as a graph of ATen operators, and the tensors that it closes over: inputs behind the others.

    inputs: flat tensors, which are not read.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [fake_mode.from_tensor(x) for x in inputs]
    with fake_mode:
        graph = make_fx(lambda *args: _unaliased(body(*args), args))(*fakes)
    closed_over = closures_to_inputs(graph)
    return _tidy(graph), closed_over


def _traced_scan(body: Callable[..., Any], carry: Any, xs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """`core.scan.scan` as PyTorch's scan operator, for tracing.

    The operator requires a flat body that closes over no tensor. The body is therefore traced separately first. Tensors that it
    closes over appear as constants of its graph and become inputs.
    """
    return on_whole_tensors(_scan_operator, body, carry, xs)


def _scan_operator(body: Callable[..., Any], carry: Any, xs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """`_traced_scan` for whole tensors. The operator is called below vmap, if that maps the program."""
    from torch._higher_order_ops.scan import scan_op
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

    leaves, spec = pytree.tree_flatten(carry)

    def flat_body(*args: Tensor) -> list[Tensor]:
        carry, ys = body(pytree.tree_unflatten(args[: len(leaves)], spec), args[len(leaves) :])
        return _unaliased([*pytree.tree_leaves(carry), *ys], args)

    with disable_proxy_modes_tracing():
        inputs = [*(leaf.clone() for leaf in leaves), *(x[0].clone() for x in xs)]
        graph = make_fx(flat_body, decomposition_table=decompositions())(*inputs)
    closed_over = closures_to_inputs(graph)
    _compute_scalars_once(_tidy(graph))
    interpret = torch.fx.Interpreter(graph).run
    # clone turns a real constant (the bounds of actions) into a fake tensor like the others
    outside = tuple(tensor if isinstance(tensor, FakeTensor) else tensor.clone() for tensor in closed_over)
    with below_seeds():
        results = scan_op(lambda *args: interpret(*args), leaves, list(xs), outside)
    return pytree.tree_unflatten(list(results[: len(leaves)]), spec), tuple(results[len(leaves) :])


def closures_to_inputs(graph: Any) -> list[Tensor]:
    """Make each tensor that a traced graph closes over one more input, behind the others. Returns these tensors."""
    inputs = graph.graph.find_nodes(op="placeholder")
    closed_over: list[Tensor] = []
    placeholder = inputs[-1]
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):  # the body of a nested loop
            continue
        known = [index for index, other in enumerate(closed_over) if other is tensor]
        if not known:
            closed_over.append(tensor)
            with graph.graph.inserting_after(placeholder):
                placeholder = graph.graph.placeholder(f"closed_over_{len(closed_over) - 1}")
                placeholder.meta = node.meta.copy()
        index = known[0] if known else len(closed_over) - 1
        node.replace_all_uses_with(graph.graph.find_nodes(op="placeholder")[len(inputs) + index])
        graph.graph.erase_node(node)
    return closed_over


def _unaliased(results: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The results, with a copy of each that is an input. Neither the operator nor a library may return its input."""
    return [result.clone() if any(result is given for given in inputs) else result for result in results]


def _tidy(graph: Any) -> Any:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _compute_scalars_once(graph: Any) -> None:
    """Store every 0-d intermediate that is combined with a larger tensor in memory.

    Inductor repeats 0-d arithmetic inside each loop that uses it. The C++ compiler cannot move it out, as pointers may alias.
    Adam's two expm1 and the sqrt of clipping ran for each vector of parameters: 62 us a minibatch instead of 19 (one thread).
    """
    import torch._inductor.test_operators

    realize = torch.ops._inductor_test.realize.default

    def rank(node: Any) -> int:
        value = node.meta.get("val")
        return value.ndim if isinstance(value, Tensor) else -1

    for node in list(graph.graph.nodes):
        users = [user for user in node.users if rank(user) > 0 and "cat" not in str(user.target)]
        if node.op == "call_function" and rank(node) == 0 and users:
            with graph.graph.inserting_after(node):
                realized = graph.graph.call_function(realize, (node,))
                realized.meta = node.meta.copy()
            for user in users:
                user.replace_input_with(node, realized)
    graph.recompile()
