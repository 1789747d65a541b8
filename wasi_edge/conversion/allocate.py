"""One budget of parameters, spread over all linears so that the next rank always goes where it helps most.

The singular values s of W C^{1/2} say what each rank of a linear is worth: rank k brings s_k^2 of the output's
variance. Counted relative to the whole of it, and per parameter, (O + I) of them a rank, the ranks with the most are
taken until the budget is spent. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wasi_edge.subspace.ranks import break_even_rank

# a linear of which less is left passes on next to nothing
LOWEST_RANK = 8


def allocate_ranks(
    spectra: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], parameters: int
) -> dict[str, int]:
    """Rank of each linear in `spectra`, which holds s^2 (min(O, I),) of each, descending.

    All factors together have at most `parameters` numbers, unless already the lowest ranks have more; no rank is above
    the one where factors stop being smaller than the weight.
    """
    ranks, worth, names = {}, [], list(spectra)
    spent = 0
    for number, name in enumerate(names):
        out_features, in_features = shapes[name]
        cost = out_features + in_features
        highest = min(len(spectra[name]), break_even_rank(out_features, in_features))
        ranks[name] = min(LOWEST_RANK, highest)
        spent += ranks[name] * cost
        squares = np.maximum(np.asarray(spectra[name], dtype=np.float64), 0.0)
        gains = squares[ranks[name] : highest] / (max(float(squares.sum()), 1e-300) * cost)
        worth.append(np.stack([gains, np.full(len(gains), number), np.full(len(gains), cost)]))
    candidates = np.concatenate(worth, axis=1)
    # of equal ones the earlier first, so that every machine chooses the same
    order = np.argsort(-candidates[0], kind="stable")
    for number, cost in candidates[1:, order].T.astype(int):
        if spent + cost > parameters:
            break
        ranks[names[number]] += 1
        spent += cost
    return ranks
