"""Says why the forward of a model without an adapter is no chain, as far as tracing it can tell."""

from __future__ import annotations

from torch import fx, nn
from torch.fx.proxy import TraceError

MOST = 3  # findings that are told; the first are enough to understand the model


def why_no_chain(model: nn.Module) -> str | None:
    """The obstacles to cutting the model between its direct submodules, or None if none was found.

    Traces forward symbolically, without running it: skip connections, submodules that are called twice, several
    inputs, and control flow that depends on the data.
    """
    try:
        graph = _BetweenChildren().trace(model)
    except TraceError as error:
        if "control flow" in str(error):
            return "its forward branches or loops on the values of its data"
        return None
    except (
        Exception
    ):  # Tracing runs code of the user's on stand-ins for tensors: whatever fails, nothing is known.
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    findings = []
    if len(inputs) > 1:
        findings.append("it takes several inputs: " + ", ".join(node.name for node in inputs))
    findings += _called_twice(graph) + _skips(graph)
    return "; ".join(findings[:MOST]) or None


class _BetweenChildren(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _called_twice(graph: fx.Graph) -> list[str]:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    return [
        f"{name} is called {calls.count(name)} times"
        for name in dict.fromkeys(calls)
        if calls.count(name) > 1
    ]


def _skips(graph: fx.Graph) -> list[str]:
    """Tensors that are used again after another submodule has run on them or on what comes of them."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    found: list[str] = []
    for node in graph.nodes:
        uses = sorted((place[user], user) for user in node.users if not _asks_for_the_shape(user))
        if not uses:
            continue
        last, user = uses[-1]
        between = [str(call.target) for call in calls if place[node] < place[call] < last]
        if between:
            source = f"the output of {node.target}" if node.op == "call_module" else f"the tensor {node.name}"
            by = str(user.target) if user.op == "call_module" else user.name
            found.append(f"{source} skips {', '.join(between[:MOST])} to {by}")
    return found


def _asks_for_the_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    attribute = node.args[1:] if node.op == "call_function" and node.target is getattr else None
    return attribute in (("shape",), ("device",), ("dtype",))
