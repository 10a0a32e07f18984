"""What ``convert`` refuses whatever weights and images are: found from shapes, so that ``prepare`` says it before training."""

from __future__ import annotations

from torch import fx, nn

from lowprec.graph.movement import is_movement
from lowprec.graph.nodes import constant_nodes, number_nodes
from lowprec.graph.shapes import BATCHES, ShapeError, Shapes
from lowprec.graph.tracing import describe
from lowprec.integer.convert_movement import convert_movement
from lowprec.integer.operators import Grid
from lowprec.layers import QuantizedAveragePool, QuantizedConcatenation, QuantizedFloatOperator

# Movements are the same on any grid.
_GRID = Grid(0, -128, 127)
# Key of a node's meta: how a user knows the call in whose place it stands.
DESCRIPTION = "lowprec_description"


def unconvertible(qmodel: fx.GraphModule, image_shape: tuple[int, int, int]) -> list[str]:
    """The operations of a prepared graph that move, average or join codes in ways without an integer form, and why.

    qmodel: computes in full precision. The reasons are those that an exception of :func:`convert_movement` gives.
    """
    modules = dict(qmodel.named_modules())
    try:
        shapes = Shapes(qmodel, image_shape)
    except ShapeError as error:
        return [str(error)]
    skipped = number_nodes(qmodel.graph) | constant_nodes(qmodel.graph)
    faults = []
    for node in qmodel.graph.nodes:
        if not node.op.startswith("call") or node in skipped:
            continue
        try:
            _check(node, modules.get(str(node.target)) if node.op == "call_module" else None, shapes)
        except ValueError as error:
            # What prepare has put in the place of a call is known by the call.
            faults.append(f"{node.meta.get(DESCRIPTION) or describe(node, modules)}: {error}")
    return faults or _output_faults(qmodel, shapes)


def averaged_axes(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of an average, counted from the front; ``shape`` has -1 for the axis of the batch.

    Raises:
        ValueError: the batch is averaged over.
    """
    counted = tuple(sorted(axis % len(shape) for axis in axes))
    if any(shape[axis] == -1 for axis in counted):
        raise ValueError("an average over the images of a batch has no integer form")
    return counted


def _check(node: fx.Node, module: nn.Module | None, shapes: Shapes) -> None:
    """Raises ValueError, with the reason, for a node that has no integer form."""
    if isinstance(module, QuantizedAveragePool):
        if module.kernel_size is None:
            averaged_axes(shapes.shape(node.all_input_nodes[0]), module.axes)
    elif isinstance(module, QuantizedConcatenation):
        if shapes.shape(node)[module.axis] == -1:
            raise ValueError("images of the batch are joined: an image's result may not depend on others")
    elif isinstance(module, QuantizedFloatOperator):
        function = module.function
        if isinstance(function, nn.Softmax) and shapes.shape(node)[int(function.dim or 0)] == -1:
            raise ValueError("a softmax over the images of a batch: an image's result may not depend on others")
    elif is_movement(node, module) and not isinstance(module, nn.Flatten):
        convert_movement(node, module, _GRID, shapes)


def _output_faults(qmodel: fx.GraphModule, shapes: Shapes) -> list[str]:
    """An output must hold each image's result in the batch's order."""
    (output,) = (node.args[0] for node in qmodel.graph.nodes if node.op == "output")
    assert isinstance(output, fx.Node)
    sizes = [found[output][:1] for found in shapes.results]
    if [tuple(size) for size in sizes] == [(batch,) for batch in BATCHES]:
        return []
    return [
        f"an output of the shape {list(shapes.results[0][output])} for {BATCHES[0]} images: its first axis is not theirs"
    ]
