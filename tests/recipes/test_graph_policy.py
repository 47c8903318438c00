"""The recipe for torch_geometric learns to cover graphs."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.recipes
graph_policy = pytest.importorskip("graph_policy")


def test_it_learns_to_cover_almost_as_many_nodes_as_the_greedy_rule() -> None:
    uniform, greedy = (
        graph_policy.covered(each()) for each in (graph_policy.Uniform, graph_policy.Greedy)
    )
    learned = graph_policy.main(seed=0)
    assert learned > uniform + 0.85 * (greedy - uniform)


def test_a_choice_covers_the_node_and_its_neighbours() -> None:
    path = graph_policy.Data(
        x=torch.zeros(4, 2), edge_index=torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    )
    graphs = graph_policy.Batch.from_data_list([path, path])
    after, gained = graph_policy.choose(graphs, torch.tensor([0, 2]))
    assert gained.tolist() == [2, 3]
    assert after.x[:, 0].tolist() == [1, 1, 0, 0, 0, 1, 1, 1]
    assert after.x[:, 1].tolist() == [1, 0, 0, 0, 0, 0, 1, 0]


def test_padding_and_chosen_nodes_are_never_chosen() -> None:
    torch.manual_seed(0)
    graphs = graph_policy.random_graphs(20)
    graphs.x[graphs.ptr[:-1], 1] = 1.0
    probabilities = graph_policy.Policy()(graphs).probs
    assert (probabilities[:, 0] == 0).all()
    assert ((probabilities > 0).sum(1) == graphs.ptr.diff() - 1).all()
