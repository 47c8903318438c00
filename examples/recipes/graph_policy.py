"""A torch_geometric policy chooses nodes of random graphs, by one step on each batch of graphs.

Run `python examples/recipes/graph_policy.py`. After 30 updates, three choices covered 12.53,
12.56 and 12.53 nodes in the mean with seeds 0, 1 and 2; uniform choices covered 8.91, greedy
choices 12.70.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv
from torch_geometric.utils import erdos_renyi_graph, to_dense_batch

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, log_prob, mean_kl, sample

STEPS, COPIES = 3, 8
"""Nodes that an episode chooses, and episodes on each graph."""


class Policy(nn.Module):
    """Maps a batch of graphs to a distribution over the nodes of each."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()

        def layer(inputs: int) -> GINConv:
            return GINConv(nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh()))

        self.first, self.second = layer(2), layer(hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, graphs: Batch) -> Categorical:
        """Return a Categorical of shape (graphs, most nodes); chosen nodes and padding are out."""
        nodes = self.second(self.first(graphs.x, graphs.edge_index), graphs.edge_index)
        chosen = graphs.x[:, 1] > 0
        logits = self.head(nodes).squeeze(-1).masked_fill(chosen, -torch.inf)
        dense, _ = to_dense_batch(logits, graphs.batch, fill_value=-torch.inf)
        return Categorical(logits=dense)


def random_graphs(count: int, copies: int = 1) -> Batch:
    """Return graphs of 10 to 20 nodes, each several times, nothing chosen.

    A node's features say whether it is covered and whether it was chosen.
    """
    graphs = []
    for _ in range(count):
        nodes = int(torch.randint(10, 21, ()))
        edges = erdos_renyi_graph(nodes, 0.2)
        graphs += [Data(x=torch.zeros(nodes, 2), edge_index=edges)] * copies
    return Batch.from_data_list(graphs)


def choose(graphs: Batch, actions: Tensor) -> tuple[Batch, Tensor]:
    """Choose a node of each graph.

    Args:
        graphs: The states.
        actions: Each node's number within its graph, of shape (graphs,).

    Returns:
        The next states, and how many nodes of each graph the choice and its neighbours newly cover.
    """
    picked = graphs.ptr[:-1] + actions
    covered, chosen = graphs.x.unbind(-1)
    chosen = chosen.index_fill(0, picked, 1.0)
    source, target = graphs.edge_index
    reached = covered.index_fill(0, picked, 1.0)
    reached = reached.index_fill(0, target[torch.isin(source, picked)], 1.0)
    after = graphs.clone()
    after.x = torch.stack([reached, chosen], -1)
    gained = torch.zeros(len(actions)).index_add(0, graphs.batch, reached - covered)
    return after, gained


@dataclass
class Episodes:
    """All steps of an episode on each graph."""

    states: Batch
    actions: Tensor
    rewards: Tensor
    """(steps, graphs)."""


def play(policy: nn.Module, graphs: Batch) -> Episodes:
    """Choose ``STEPS`` nodes of each graph."""
    states, actions, rewards = [], [], []
    with torch.no_grad():
        for _ in range(STEPS):
            action = sample(policy(graphs))
            states += graphs.to_data_list()
            graphs, reward = choose(graphs, action)
            actions.append(action)
            rewards.append(reward)
    return Episodes(Batch.from_data_list(states), torch.cat(actions), torch.stack(rewards))


class Uniform(nn.Module):
    """Chooses among all nodes alike."""

    def forward(self, graphs: Batch) -> Categorical:
        """Return the distribution."""
        logits = torch.zeros(len(graphs.x)).masked_fill(graphs.x[:, 1] > 0, -torch.inf)
        return Categorical(logits=to_dense_batch(logits, graphs.batch, fill_value=-torch.inf)[0])


class Greedy(Uniform):
    """Chooses a node that covers most at once."""

    def forward(self, graphs: Batch) -> Categorical:
        """Return the distribution."""
        open_nodes = 1 - graphs.x[:, 0]
        source, target = graphs.edge_index
        gain = open_nodes.index_add(0, source, open_nodes[target])
        logits = (1e3 * gain).masked_fill(graphs.x[:, 1] > 0, -torch.inf)
        return Categorical(logits=to_dense_batch(logits, graphs.batch, fill_value=-torch.inf)[0])


def covered(policy: nn.Module, seed: int = 10_000) -> float:
    """Return how many nodes a policy covers per graph, on 500 graphs that no training saw."""
    torch.manual_seed(seed)
    return float(play(policy, random_graphs(500)).rewards.sum(0).mean())


def policy_step(policy: Policy, optimizer: TrustRegionOptimizer, episodes: Episodes) -> StepReport:
    """Take one trust-region step; the baseline is the mean over a graph's episodes."""
    states, actions = episodes.states, episodes.actions
    to_go = episodes.rewards.flip(0).cumsum(0).flip(0).reshape(STEPS, -1, COPIES)
    advantages = (to_go - to_go.mean(-1, keepdim=True)).flatten()
    with torch.no_grad():
        old_dist = frozen(policy(states))
        old_log_prob = log_prob(old_dist, actions)

    def closure() -> tuple[Tensor, Tensor, Categorical]:
        dist = policy(states)
        ratio = (log_prob(dist, actions) - old_log_prob).exp()
        return -(ratio * advantages).mean(), mean_kl(old_dist, dist), dist

    return optimizer.step(closure)


def main(seed: int = 0, updates: int = 30) -> float:
    """Train on new random graphs in every update.

    Args:
        seed: Of network, graphs and actions.
        updates: Batches of 64 graphs, ``COPIES`` episodes on each.

    Returns:
        How many nodes the policy's three choices cover, in the mean.
    """
    torch.manual_seed(seed)
    policy = Policy()
    optimizer = TrustRegionOptimizer(policy.parameters(), max_kl=0.03)
    for _ in range(updates):
        episodes = play(policy, random_graphs(64, COPIES))
        print(policy_step(policy, optimizer, episodes))
    return covered(policy)


if __name__ == "__main__":
    print(f"Nodes covered: {main():.2f}")
    print(f"By uniform choices {covered(Uniform()):.2f}, by greedy ones {covered(Greedy()):.2f}")
