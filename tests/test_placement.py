"""Bundles on nodes: what fits, what never can, and the arithmetic of a refusal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.autoscaler._private.util import prepare_config

from finished import RECIPES
from overproof.cluster.cluster_yaml import read_cluster_yaml
from overproof.cluster.placement import (
    Capacity,
    NodeShape,
    ResourceRequest,
    require_placeable,
    resource_requests,
    why_unplaceable,
)
from overproof.config import Recipe, load_recipe
from overproof.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "digits.yaml", overrides)


def capacity(*nodes: tuple[float, float, int], head: tuple[float, float] = (0, 0), most: int | None = None) -> Capacity:
    kinds = [NodeShape(f"kind{i}", cpus, gpus, count) for i, (cpus, gpus, count) in enumerate(nodes)]
    return Capacity((NodeShape("head", *head, 1, always=1), *kinds), "the cluster", most)


def test_two_workers_of_eight_cpus_never_start_on_nodes_of_four_although_the_sum_fits() -> None:
    place = Capacity((NodeShape("small", 4, 0, 8, always=8),), "this cluster has 8 nodes of 4 CPUs")
    with pytest.raises(InputError) as refused:
        require_placeable(recipe("train.cpus_per_worker=8"), place)
    text = str(refused.value)
    assert "each bundle of 8 CPUs must fit one node, and 2 are needed beside a reader of 1 CPU" in text
    assert "8 x 0 on small (4 CPUs)" in text
    assert "could never start although the sum would fit" in text


def test_a_reader_needs_a_cpu_beside_the_workers() -> None:
    need = ResourceRequest("train", 2, 4, reader=True)
    assert capacity((4, 0, 2)).fits(need) == 1
    assert capacity((4, 0, 3)).fits(need) == 2
    assert capacity((4, 0, 2), head=(1, 0)).fits(need) == 2
    assert capacity((5, 0, 1), (4, 0, 1)).fits(need) == 2
    assert capacity((0, 1, 4)).fits(need) == -1


def test_a_limit_on_all_nodes_together_counts_no_head() -> None:
    need = ResourceRequest("train", 2, 1, gpus=1)
    assert capacity((16, 1, 8), most=8).fits(need) == 8
    assert capacity((16, 1, 8), most=3).fits(need) == 3
    assert capacity((16, 1, 8), head=(4, 2), most=3).fits(need) == 5
    assert capacity((16, 0, 8), (16, 4, 1), most=1).fits(need) == 4


@settings(max_examples=200)
@given(
    nodes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3),
    head=st.tuples(st.integers(0, 3), st.integers(0, 1)),
    most=st.one_of(st.none(), st.integers(0, 4)),
    cpus=st.integers(1, 3),
    gpus=st.integers(0, 2),
    reader=st.booleans(),
)
def test_it_finds_the_most_bundles_there_can_be(
    nodes: list[tuple[int, int, int]], head: tuple[int, int], most: int | None, cpus: int, gpus: int, reader: bool
) -> None:
    """Against every choice of nodes and every node for the reader."""
    need = ResourceRequest("train", 1, cpus, gpus, reader)
    single = [(c, g) for c, g, count in nodes for _ in range(count)]
    limit = len(single) if most is None else min(most, len(single))
    best = -1 if reader else 0
    for chosen in itertools.chain.from_iterable(itertools.combinations(single, n) for n in range(limit + 1)):
        up = [head, *chosen]
        for host in range(len(up)) if reader else [-1]:
            if reader and up[host][0] < 1:
                continue
            rooms = [(c - (i == host), g) for i, (c, g) in enumerate(up)]
            best = max(best, sum(min(c // cpus, g // gpus if gpus else c) for c, g in rooms))
    assert capacity(*nodes, head=head, most=most).fits(need) == best


def test_what_each_stage_asks_for() -> None:
    requests = {need.stage: need for need in resource_requests(recipe("train.workers=[2,8]", "train.batch_size=64"))}
    assert list(requests) == ["prepare", "train", "cache", "sweep", "evaluate", "serve"]
    train = requests["train"]
    assert (train.bundles, train.wanted, train.why) == (2, 8, "2 to 8 workers + 1 reader")
    assert (train.cpus_of(8), train.gpus_of(8)) == (9, 0)
    assert (requests["sweep"].bundles, requests["sweep"].wanted) == (1, 2)
    assert (requests["serve"].bundles, requests["serve"].wanted) == (1, 2)


@pytest.mark.parametrize(
    "asked",
    [
        "train.gpus_per_worker=1", "cache.gpus_per_actor=1", "sweep.gpus_per_trial=0.5",
        "sweep.group={workers: 1, gpus_per_worker: 1}", "evaluate.gpus=1", "evaluate.gpus_per_task=1",
        "serve.gpus_per_replica=1",
    ],
)  # fmt: skip
def test_a_gpu_that_no_node_has_is_refused_before_anything_starts(asked: str) -> None:
    wanted = recipe(asked)
    with pytest.raises(InputError, match=r"GPUs at the same time; this cluster has .*it could never start"):
        require_placeable(wanted, Capacity((NodeShape("up", 64, 0, 2, always=2),), "this cluster has 2 nodes"))
    require_placeable(wanted, Capacity((NodeShape("up", 64, 2, 2, always=2),), "this cluster has 2 nodes"))


def test_elastic_training_needs_the_fewest_workers_alone() -> None:
    elastic, fixed = (recipe(f"train.workers={workers}", "train.batch_size=64") for workers in ("[2,16]", "16"))
    place = capacity(head=(4, 0))
    require_placeable(elastic, place)
    with pytest.raises(InputError, match=r"16 x 1 \+ 1 = 17 CPUs"):
        require_placeable(fixed, place)


def test_cluster_yaml_may_grow_to_what_ray_makes_of_it(tmp_path: Path) -> None:
    tree = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    del tree["available_node_types"]["gpu"]["max_workers"]
    del tree["available_node_types"]["head"]["max_workers"]
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(tree))
    filled = prepare_config(tree)
    found = {node.name: node for node in read_cluster_yaml(file).nodes}
    for name, kind in filled["available_node_types"].items():
        head = name == filled["head_node_type"]
        assert found[name].count == kind["max_workers"] + head
        assert found[name].always == head
        assert (found[name].cpus, found[name].gpus) == (kind["resources"]["CPU"], kind["resources"].get("GPU", 0))
    assert read_cluster_yaml(file).most_nodes == filled["max_workers"]


def test_gpus_of_cluster_yaml_are_spread_one_a_node() -> None:
    place = read_cluster_yaml(REPOSITORY / "cluster.yaml")
    assert (place.cpus, place.gpus, place.count) == (4 * 16 + 8 * 16 + 2 * 8, 8, 15)
    assert place.fits(ResourceRequest("train", 1, 8, 1, True)) == 8
    text = why_unplaceable(ResourceRequest("train", 2, 8, 2, True, why="2 workers + 1 reader"), place)
    assert text is not None
    assert "8 x 0 on gpu (16 CPUs, 1 GPU)" in text


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("]", "not YAML"),
        ("a", "found str at the top level"),
        ("max_workers: 1", "expected available_node_types"),
        ("{head_node_type: h, available_node_types: {h: {node_config: {InstanceType: m7i}}}}", "no CPU"),
        ("{head_node_type: h, max_workers: many, available_node_types: {h: {resources: {CPU: 1}}}}", "found 'many'"),
        ("{head_node_type: h, available_node_types: {h: {resources: {CPU: -1}}}}", "found -1"),
    ],
)
def test_a_cluster_file_that_says_nothing_is_refused(tmp_path: Path, text: str, refusal: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        read_cluster_yaml(file)
    assert refusal in str(refused.value)
    with pytest.raises(InputError, match="No such file"):
        read_cluster_yaml(tmp_path / "none.yaml")
