"""Whether what a stage asks for can ever be placed: equal bundles, each within one node, on the nodes there may be.

Ray reserves a bundle on one node or not at all, so a sum that fits says nothing: two workers of 8 CPUs never start
on nodes of 4, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from overproof.config import Recipe, Served, Sweep
from overproof.errors import InputError
from overproof.units import format_count

Resources = Mapping[str, float]  # by name, as Ray has them


@dataclass(frozen=True)
class ResourceRequest:
    """What one stage asks for at the same time: equal bundles, and a reader's CPU beside them."""

    stage: str
    bundles: int  # it cannot start without
    cpus: float  # of a bundle
    gpus: float = 0
    reader: bool = False  # a Ray Data task of one CPU, while the bundles are held
    most: int = 0  # bundles it uses where they fit; 0: no more than it needs
    why: str = ""

    @property
    def wanted(self) -> int:
        return max(self.bundles, self.most)

    def cpus_of(self, bundles: int) -> float:
        return bundles * self.cpus + self.reader

    def gpus_of(self, bundles: int) -> float:
        return bundles * self.gpus


@dataclass(frozen=True)
class NodeShape:
    """Nodes of one shape, and how many there may be at most."""

    name: str
    cpus: float
    gpus: float
    count: int
    always: int = 0  # of these, up whatever happens, and outside the limit on the others

    def slots(self, request: ResourceRequest, taken_cpus: float = 0) -> int:
        """Bundles that fit one node of which some CPUs are taken."""
        rooms = [(self.cpus - taken_cpus) / request.cpus] if request.cpus else []
        rooms += [self.gpus / request.gpus] if request.gpus else []
        return max(0, int(min(rooms) + 1e-9))


@dataclass(frozen=True)
class Capacity:
    """The nodes a cluster can ever have."""

    nodes: tuple[NodeShape, ...]
    where: str  # begins a sentence: "this cluster has 2 nodes ..."
    most_nodes: int | None = None  # beside those that are always up; None: no limit on all kinds together

    @property
    def count(self) -> int:
        """Nodes at most."""
        optional = sum(node.count - node.always for node in self.nodes)
        return sum(node.always for node in self.nodes) + min(
            optional, optional if self.most_nodes is None else self.most_nodes
        )

    @property
    def cpus(self) -> float:
        """CPUs at most."""
        return self._most(lambda node: node.cpus)

    @property
    def gpus(self) -> float:
        """GPUs at most."""
        return self._most(lambda node: node.gpus)

    def fits(self, request: ResourceRequest) -> int:
        """Bundles of a need that can be held at the same time, its reader beside them; -1 if not even the reader."""
        best = -1
        if not request.reader:
            return int(self._most(lambda node: node.slots(request)))
        for index, host in enumerate(self.nodes):
            if host.cpus < 1 or host.count == 0:
                continue
            taken = NodeShape(host.name, host.cpus - 1, host.gpus, 1, min(1, host.always))
            rest = replace(host, count=host.count - 1, always=max(0, host.always - 1))
            others = [node for i, node in enumerate(self.nodes) if i != index]
            limit = self.most_nodes
            if limit is not None and not host.always:
                if limit == 0:
                    continue
                limit -= 1
            room = replace(self, nodes=(rest, *others), most_nodes=limit)
            best = max(best, taken.slots(request) + int(room._most(lambda node: node.slots(request))))
        return best

    def nodes_for(self, request: ResourceRequest, bundles: int) -> int:
        """The fewest nodes that hold so many bundles; the reader may need one more."""
        left, nodes = bundles, 0
        for slots, count in sorted(((node.slots(request), node.count) for node in self.nodes), reverse=True):
            while left > 0 and count > 0 and slots > 0:
                left, count, nodes = left - slots, count - 1, nodes + 1
        return max(nodes, 1)

    def _most(self, size: Callable[[NodeShape], float]) -> float:
        """The largest sum of a size over nodes that may be up together."""
        certain = sum(size(node) * node.always for node in self.nodes)
        optional = sorted(((size(node), node.count - node.always) for node in self.nodes), reverse=True)
        left = sum(count for _, count in optional) if self.most_nodes is None else self.most_nodes
        total = float(certain)
        for each, count in optional:
            total += each * min(count, left)
            left -= min(count, left)
        return total


def count_fitting(nodes: Iterable[Resources], each: Resources) -> int:
    """How many equal bundles find room, each whole on one node."""
    wanted = {name: amount for name, amount in each.items() if amount > 0}
    return sum(min(int(node.get(name, 0) / amount) for name, amount in wanted.items()) for node in nodes)


def resource_requests(recipe: Recipe) -> tuple[ResourceRequest, ...]:
    """What each stage asks for, in the order of the stages."""
    train, sweep, serve, evaluate = recipe.train, recipe.sweep, recipe.serve, recipe.evaluate
    pools = ("generate", recipe.generate), ("cache", recipe.cache if recipe.reads_cache else None)
    workers = f"{train.fewest}" if train.fewest == train.most else f"{train.fewest} to {train.most}"
    trained = ResourceRequest("train", train.fewest, train.cpus_per_worker, train.gpus_per_worker, True, train.most,
                              f"{format_count(workers, 'worker')} + 1 reader")  # fmt: skip
    replicas = (
        f"{serve.min_replicas}"
        if serve.min_replicas == serve.max_replicas
        else (f"{serve.min_replicas} to {serve.max_replicas}")
    )
    trials, together = min(sweep.concurrent_trials, recipe.tune.trials(sweep)), recipe.tune.min_concurrent(sweep)
    each, trial_cpus, trial_gpus = sweep.bundles
    of = f" of {format_count(each, 'worker')}" if sweep.group else ""
    return (
        ResourceRequest("prepare", 1, 1, why="1 reader"),
        *(() if isinstance(train.model, Served) else (trained,)),
        *(ResourceRequest(name, pool.actors, pool.cpus_per_actor, pool.gpus_per_actor, True,
               why=f"{format_count(pool.actors, 'actor')} + 1 reader") for name, pool in pools if pool),
        ResourceRequest("sweep", together * each, trial_cpus, trial_gpus, most=trials * each,
             why=format_count(f"{together} to {trials}" if trials > together else trials, "trial") + of),
        *_teachers(sweep, together),
        ResourceRequest("evaluate", 1, 1, evaluate.gpus_per_task, most=evaluate.concurrent_tasks,
             why=format_count(f"1 to {evaluate.concurrent_tasks}" if evaluate.concurrent_tasks > 1 else 1, "task")),
        *((ResourceRequest("engine", 1, 1, evaluate.gpus, why="1 engine that is measured"),) if evaluate.gpus else ()),
        ResourceRequest("serve", serve.min_replicas, serve.cpus_per_replica, serve.gpus_per_replica,
                        most=serve.max_replicas,
             why=format_count(replicas, "replica")),
    )  # fmt: skip


def _teachers(sweep: Sweep, trials: int) -> Iterator[ResourceRequest]:
    """The pool that judges what students write, and room for trials beside it where both take the same units."""
    pool = sweep.teacher_pool
    if pool is None:
        return
    why = f"{format_count(pool.actors, 'teacher')} of the sweep's pool"
    _, trial_cpus, trial_gpus = sweep.bundles
    if (pool.gpus_per_actor > 0) != (trial_gpus > 0):
        yield ResourceRequest("teachers", pool.actors, pool.cpus_per_actor, pool.gpus_per_actor, why=why)
        return
    cpus, gpus = max(pool.cpus_per_actor, trial_cpus), max(pool.gpus_per_actor, trial_gpus)
    yield ResourceRequest("teachers", pool.actors + trials, cpus, gpus, why=f"{why} + {format_count(trials, 'trial')}")


def require_placeable(recipe: Recipe, capacity: Capacity) -> None:
    """Refuse a recipe that would wait for ever.

    Raises:
        InputError: a stage needs more than the cluster can ever give, with the arithmetic.
    """
    for request in resource_requests(recipe):
        refusal = why_unplaceable(request, capacity)
        if refusal:
            raise InputError(refusal)


def why_unplaceable(request: ResourceRequest, capacity: Capacity) -> str | None:
    """Why a stage could never start there, or None if it can."""
    found = capacity.fits(request)
    if found >= request.bundles:
        return None
    for unit, wanted, given, each in (
        ("CPUs", request.cpus_of(request.bundles), capacity.cpus, request.cpus),
        ("GPUs", request.gpus_of(request.bundles), capacity.gpus, request.gpus),
    ):
        if wanted > given:
            beside = " + 1" if unit == "CPUs" and request.reader else ""
            sum_ = f"{request.bundles} x {each:g}{beside} = {wanted:g} {unit}"
            return (
                f"{request.stage}: {request.why} need {sum_} at the same time; {capacity.where}; it could never start. "
                "Ask for less, or give the cluster more"
            )
    bundle = f"{request.cpus:g} CPUs" + (f" and {request.gpus:g} GPUs" if request.gpus else "")
    return (
        f"{request.stage}: {request.why}: each bundle of {bundle} must fit one node, and {request.bundles} are needed"
        f"{' beside a reader of 1 CPU' if request.reader else ''}; {capacity.where}: "
        f"{_room(request, capacity)} = {max(found, 0)} at most; it could never start although the sum would fit. "
        "Ask for smaller bundles, or give the cluster larger nodes"
    )


def _room(request: ResourceRequest, capacity: Capacity) -> str:
    parts = [
        f"{node.count} x {node.slots(request)} on {node.name} ({describe_node(node)})"
        for node in capacity.nodes
        if node.count
    ]
    limit = (
        f", of them {capacity.most_nodes} nodes beside the head at a time" if capacity.most_nodes is not None else ""
    )
    return " + ".join(parts) + limit + (", less the reader's place" if request.reader else "")


def describe_node(node: NodeShape) -> str:
    """``4 CPUs``, or ``16 CPUs, 1 GPU``."""
    gpus = f", {node.gpus:g} GPU{'s' if node.gpus != 1 else ''}" if node.gpus else ""
    return f"{node.cpus:g} CPU{'s' if node.cpus != 1 else ''}{gpus}"


def describe(nodes: Iterable[NodeShape]) -> str:
    """``2 nodes of 4 CPUs``, or several such joined by ``and``."""
    return (
        " and ".join(f"{format_count(node.count, 'node')} of {describe_node(node)}" for node in nodes if node.count)
        or "no nodes"
    )
