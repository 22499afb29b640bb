"""Grows a tree for every request, by how sure the drafter is of each guess.

The calibrated family says which shape is best on average; the probabilities of one draft say which is best
here. A drafter guesses level by level, and only the likeliest paths are followed further (EAGLE-2, arXiv
2406.16858, section 4: expansion by the product of probabilities, then a choice among all guesses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (level, tokens, origins, num_guesses) -> (guesses, log_probs). tokens, origins: [num_requests, num_paths]
# int64, the last token of each path and which path of the level before it goes on from; guesses int64 and
# log_probs float32, at most 0: [num_requests, num_paths, num_guesses], siblings differ.
Guess = Callable[[int, Tensor, Tensor, int], tuple[Tensor, Tensor]]

_MOST_PATHS = 10  # followed at a level
_MOST_GUESSES = 16  # of one path


@dataclass(frozen=True)
class Chains:
    """Guesses from another source, one run of tokens for each request, which join its tree below the root."""

    token_ids: Tensor  # [num_requests, length] int64, shorter ones filled up with 0
    sure: Tensor  # [num_requests, length] float32, log-probabilities of all up to here; -inf past the end

    @property
    def length(self) -> int:
        """Length of the longest chain."""
        return self.token_ids.shape[1]


def make_chains(
    chains: Sequence[tuple[Sequence[int], Sequence[float]]], longest: int, device: torch.device
) -> Chains:
    """One chain for each request, tokens with falling probabilities, cut after `longest`."""
    length = min(longest, max((len(tokens) for tokens, _ in chains), default=0))
    tokens = [[*t[:length], *[0] * (length - len(t))] for t, _ in chains]
    gains = [[*g[:length], *[0.0] * (length - len(g))] for _, g in chains]
    return Chains(
        _on_device(torch.tensor(tokens, dtype=torch.int64), device),
        _on_device(torch.tensor(gains, dtype=torch.float32).log_(), device),
    )


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting on the host: the device copies from pinned memory by itself."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def grow_trees(
    guess: Guess,
    roots: Tensor,
    num_nodes: Tensor,
    max_nodes: int,
    max_depth: int,
    chains: Chains,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Trees of the likeliest nodes, by the product of probabilities along their paths.

    roots: [num_requests] int64; num_nodes: [num_requests] int64, root included; max_nodes: the largest;
    max_depth: levels that can be guessed; least: [num_requests] float32, the log-probability below which a
    node is left out. Without it no shape depends on what is guessed, and the host waits for nothing.

    Returns tokens and parents, both [num_requests, max_nodes] int64 or as wide as the largest tree, each node
    after its parent, and the number of nodes of each. What lies past them repeats the root.
    """
    num_drafts = max_nodes - 1
    # Offered nodes: the root, its chain (at depth i node i), then level by level what is guessed.
    offered_tokens = torch.cat((roots.unsqueeze(1), chains.token_ids), dim=1)
    offered_parents = torch.arange(-1, chains.length, device=roots.device).clamp_(min=0)
    offered_parents = offered_parents.expand(len(roots), -1)
    offered_sure = torch.nn.functional.pad(chains.sure, (1, 0))
    paths = roots.new_zeros(len(roots), 1)  # offered nodes whose children are guessed next
    tokens, origins, sure = roots.unsqueeze(1), paths, offered_sure[:, :1]
    for level in range(min(max_depth, num_drafts)):
        guesses, log_probs = guess(level, tokens, origins, min(num_drafts, _MOST_GUESSES))
        num_guesses, first = guesses.shape[2], offered_tokens.shape[1]
        children = (sure.unsqueeze(2) + log_probs).flatten(1)
        nodes = torch.arange(first, first + children.shape[1], device=roots.device).expand_as(children)
        parents, guesses = paths.repeat_interleave(num_guesses, dim=1), guesses.flatten(1)
        if level < chains.length:
            # A guess that the chain holds too becomes the chain's node, with the higher probability.
            same = (parents == level) & (guesses == chains.token_ids[:, level : level + 1])
            surer = children.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
            surer = torch.maximum(surer, offered_sure[:, level + 1 : level + 2])
            offered_sure = offered_sure.clone()
            offered_sure[:, level + 1 : level + 2] = surer
            nodes = torch.where(same, level + 1, nodes)
            offered, children = children.masked_fill(same, -torch.inf), torch.where(same, surer, children)
        else:
            offered = children
        offered_tokens = torch.cat((offered_tokens, guesses), dim=1)
        offered_parents = torch.cat((offered_parents, parents), dim=1)
        offered_sure = torch.cat((offered_sure, offered), dim=1)
        num_paths = min(_MOST_PATHS, num_drafts, children.shape[1])
        sure, places = children.topk(num_paths, dim=1)
        if least is not None:
            num_paths = _worth_following(sure, offered_sure, max_nodes, least)
            if num_paths == 0:
                break
            sure, places = sure[:, :num_paths], places[:, :num_paths]
        tokens, origins, paths = guesses.gather(1, places), places // num_guesses, nodes.gather(1, places)
    if least is not None:
        likely = (offered_sure >= least.unsqueeze(1)).sum(dim=1).clamp_(min=1)
        num_nodes = torch.minimum(num_nodes, likely)
        max_nodes = min(max_nodes, offered_sure.shape[1])
    nodes, parents = likeliest_nodes(offered_sure, offered_parents, num_nodes, max_nodes)
    return offered_tokens.gather(1, nodes), parents, num_nodes


def most_drafts(num_drafts: int, max_depth: int, num_tokens: int) -> int:
    """How many of these draft nodes `grow_trees` can offer, where each guess is one of `num_tokens`."""
    num_guesses = min(num_drafts, _MOST_GUESSES, num_tokens)
    offered, children = 0, 1
    for _ in range(max_depth):
        children = min(_MOST_PATHS, children) * num_guesses
        offered += children
        if offered >= num_drafts:
            return num_drafts
    return offered


def _worth_following(sure: Tensor, offered: Tensor, max_nodes: int, least: Tensor) -> int:
    """How many of these paths could have children among the `max_nodes` likeliest nodes.

    sure: [num_requests, num_paths], falling; offered: [num_requests, num_offered], the paths included.
    """
    bound = least.unsqueeze(1)
    if offered.shape[1] > max_nodes:
        bound = torch.maximum(bound, offered.topk(max_nodes, dim=1).values[:, -1:])
    return int((sure > bound).sum(dim=1).max())


def likeliest_nodes(
    sure: Tensor, parents: Tensor, num_nodes: Tensor, max_nodes: int
) -> tuple[Tensor, Tensor]:
    """Keep the likeliest nodes of larger trees.

    sure: [num_requests, num_offered] float32, log-probabilities of whole paths, none above its parent's, the
    root's 0; parents: [num_requests, num_offered] int64, each node after its parent; num_nodes:
    [num_requests] int64, how many to keep, root included; max_nodes: the largest of them.

    Returns the kept nodes in their old order and each one's parent among them, both [num_requests,
    max_nodes] int64. What lies past num_nodes repeats the root.
    """
    # Ties go to the earlier node: the best n nodes are a tree for every n.
    order = sure.sort(dim=1, descending=True, stable=True).indices[:, :max_nodes]
    kept = torch.arange(max_nodes, device=order.device) < num_nodes.unsqueeze(1)
    offered = sure.shape[1]
    nodes = torch.where(kept, order, offered).sort(dim=1).values
    places = torch.zeros(len(nodes), offered + 1, dtype=torch.int64, device=nodes.device)
    places.scatter_(1, nodes, torch.arange(max_nodes, device=nodes.device).expand_as(nodes))
    nodes = torch.where(kept, nodes, 0)
    return nodes, places.gather(1, parents.gather(1, nodes))
