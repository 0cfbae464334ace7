"""A plan in words."""

from __future__ import annotations

from sapwood.nesy.elimination import Step
from sapwood.nesy.factors import Graph
from sapwood.nesy.plan import PathPlan, Plan, Query
from sapwood.nesy.trace import Keys

_KINDS = {
    "listed": "listed entries, log_circuit",
    "einsum": "log_einsum",
    "convolution": "log_conv",
}


def text(plan: Plan, keys: Keys) -> str:
    """Variables, factors, elimination order, kernels, cost per row and network calls."""
    lines = []
    several = len(plan.paths) > 1
    for number, path in enumerate(plan.paths, 1):
        if several:
            lines.append(f"path {number} of {len(plan.paths)}")
        lines += _path(path, plan, keys)
    cost = sum(s.kernel.entries for path in plan.paths for s in path.steps)
    operations = f"{len(plan.groups)} grouped operation{'s' if len(plan.groups) != 1 else ''}"
    lines.append(f"total: {cost} terms per row in {operations}")
    lines.append("network calls: " + (_calls(plan, keys) or "none"))
    return "\n".join(lines)


def _path(path: PathPlan, plan: Plan, keys: Keys) -> list[str]:
    graph = path.graph
    if not graph.possible:
        return ["  no mass: a condition cannot hold"]
    lines = ["variables:"]
    for weight in graph.weights:
        variable = weight.scope[-1]
        given = f" given {graph.names[weight.scope[0]]}" if len(weight.scope) > 1 else ""
        lines.append(f"  {graph.names[variable]} in {graph.supports[variable]}{given}")
    if graph.definitions:
        lines.append("where:")
        lines += [f"  {name} = {written}" for name, written in graph.definitions.items()]
    known = [_evidence(graph, variable) for variable in graph.known]
    if known:
        lines.append("evidence:")
        lines += [f"  {line}" for line in known]
    lines.append("steps:")
    for number, step in enumerate(path.steps, 1):
        lines.append(f"  {number}. {_step(step, graph)}")
    if plan.query is Query.VALUES:
        lines.append(f"  result over {graph.names[graph.kept[0]]}")
    return lines


def _evidence(graph: Graph, variable: int) -> str:
    known = graph.known[variable]
    if known.place is not None:
        return f"{graph.names[variable]} = {graph.supports[variable].values[known.place]}"
    return f"{graph.names[variable]} = data[{known.column}]"


def _step(step: Step, graph: Graph) -> str:
    summed = ", ".join(graph.names[v] for v in step.eliminated)
    kept = ", ".join(graph.names[v] for v in step.kept)
    kind = _KINDS[step.kernel.kind]
    action = f"sum out {summed}" if summed else "multiply"
    into = f" -> {kept}" if kept else ""
    return f"{action}{into}: {step.kernel.entries} terms, {kind}"


def _calls(plan: Plan, keys: Keys) -> str:
    calls = []
    for slot in filter(None, plan.slots):
        leaf = keys.leaves[slot[0]]
        if leaf.inputs:
            inputs = f"{len(slot)} input{'s' if len(slot) > 1 else ''} per row"
            calls.append(f"{leaf.source.name} once, {inputs}")
    return "; ".join(calls)
