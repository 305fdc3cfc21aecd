"""What a master in training loses, and how often it is right: encoded walks in batches -> loss, accuracy.

It knows how ids are scored, not where examples come from nor what is done with the loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lmgraph.errors import MissingExtra
from lmgraph.tokens import Vocabulary
from lmgraph.train import examples as data
from lmgraph.train.model import Master

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:  # pragma: no cover - exercised by the test of missing extras in a subprocess
    raise MissingExtra("Training a master", "train") from error


def batches(encoded: Sequence[data.Encoded], budget: int, rng: random.Random) -> list[list[int]]:
    """Indices in batches of at most `budget` padded tokens, similar lengths together, batches in random order."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids) + rng.random() * 4, i))
    out: list[list[int]] = []
    batch: list[int] = []
    for index in order:
        longest = max(len(encoded[index].ids), *(len(encoded[i].ids) for i in batch)) if batch else len(encoded[index].ids)
        if batch and longest * (len(batch) + 1) > budget:
            out.append(batch)
            batch = []
        batch.append(index)
    if batch:
        out.append(batch)
    rng.shuffle(out)
    return out


def _pad(rows: Sequence[data.Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return ids, mask


def loss_of(
    master: Master, rows: Sequence[data.Encoded], vocabulary: Vocabulary, smoothing: float, rewrite_weight: float
) -> tuple[torch.Tensor, float, float]:
    """(loss, choice loss, rewrite loss) of a batch; every choice over the whole vocabulary, smoothed over the graph's nodes."""
    ids, mask = _pad(rows, 0)
    states = master.states(ids, mask)
    each, where = _places(rows)
    logits = F.log_softmax(master.scores(states[each, where - 1]), dim=-1)
    target = ids[each, where]
    known = torch.tensor([vocabulary.first_id + token for token in vocabulary.nodes.values()])
    exact = logits[torch.arange(len(target)), target]
    choice = -((1 - smoothing) * exact + smoothing * logits[:, known].mean(-1)).mean()
    rewrite = torch.zeros(())
    if places := [(row, i) for row, encoded in enumerate(rows) for span in encoded.written for i in span]:
        at = torch.tensor(places)
        rewrite = F.cross_entropy(master.scores(states[at[:, 0], at[:, 1] - 1]), ids[at[:, 0], at[:, 1]])
    return choice + rewrite_weight * rewrite, float(choice.detach()), float(rewrite.detach())


def _places(rows: Sequence[data.Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, index) of every choice in a batch."""
    return (
        torch.tensor([row for row, encoded in enumerate(rows) for _ in encoded.choices]),
        torch.tensor([i for encoded in rows for i in encoded.choices]),
    )


@torch.no_grad()
def validate(master: Master, encoded: Sequence[data.Encoded], vocabulary: Vocabulary, budget: int = 4096) -> dict[str, float]:
    """Choice accuracy and log loss, as serving would choose: first among the nodes, then among the nodes and the end.

    Where walks are longer than one choice: `next`, accuracy of choices after the first when all before them were right, and `whole`,
    the share of walks without a wrong choice.
    """
    master.eval()
    known = torch.tensor([*(vocabulary.first_id + token for token in vocabulary.nodes.values()), vocabulary.end_id])
    shown = [data.Encoded(row.ids[: row.choices[-1] + 1], row.choices, begins=row.begins) for row in encoded]
    first, following, whole = 0, 0, 0
    loss = 0.0
    for batch in batches(shown, budget, random.Random(0)):
        rows = [shown[i] for i in batch]
        ids, mask = _pad(rows, 0)
        each, where = _places(rows)
        scores = master.scores(master.states(ids, mask)[each, where - 1])[:, known]
        opening = where == torch.tensor([row.start if row.begins else -1 for row in rows])[each]
        scores[opening, -1] = -torch.inf  # a walk has at least one step
        logits = F.log_softmax(scores, dim=-1)
        target = (known.unsqueeze(0) == ids[each, where].unsqueeze(1)).int().argmax(1)
        right = logits.argmax(1) == target
        first += int(right[opening].sum())
        following += int(right[~opening].sum())
        whole += len(rows) - len(each[~right].unique())
        loss -= float(logits[torch.arange(len(target)), target][opening].sum())
    master.train()
    found = {"n": float(len(encoded))}
    if begun := sum(row.begins for row in encoded):
        found = {"accuracy": first / begun, "loss": loss / begun, **found}
    if (more := sum(len(row.choices) for row in encoded) - begun) > 0:
        found |= {"next": following / more, "whole": whole / len(encoded)}
    return found
