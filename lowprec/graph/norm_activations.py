"""Taking timm's batch norms with an activation inside apart, so that the graph shows both."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import fx, nn


def split_norm_activations(traced: fx.GraphModule) -> None:
    """Replaces each batch norm with an activation inside by a plain one, then its dropout, then its activation.

    The parameters and statistics are the same, and so are their names.
    """
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, BatchNormAct2d | SyncBatchNormAct):
            continue
        name = str(node.target)
        plain = _plain_norm(module)
        traced.set_submodule(name, plain)
        last = node
        for part in ("drop", "act"):
            child = getattr(module, part)
            if isinstance(child, nn.Identity):
                continue
            plain.add_module(part, child)
            with traced.graph.inserting_after(last):
                last = traced.graph.call_module(f"{name}.{part}", (last,))
            last.meta = dict(node.meta)
        if last is not node:
            followers = [user for user in node.users if user.target not in (f"{name}.drop", f"{name}.act")]
            for user in followers:
                user.replace_input_with(node, last)
    traced.graph.lint()
    traced.recompile()


def _plain_norm(norm: BatchNormAct2d | SyncBatchNormAct) -> nn.BatchNorm2d | nn.SyncBatchNorm:
    kind = nn.SyncBatchNorm if isinstance(norm, SyncBatchNormAct) else nn.BatchNorm2d
    plain = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(plain, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(plain, name, buffer)
    return plain.train(norm.training)
