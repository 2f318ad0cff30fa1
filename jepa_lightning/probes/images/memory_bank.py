"""The memory bank: embeddings of labeled training images, sharded over the processes, and the search among all of them.

Shapes: N images of this process, Q queries, D embedding dimension, k neighbors, P processes.
"""

import torch
from torch import Tensor, distributed
from torch.nn import functional

from jepa_lightning.classifiers import BANK_ROWS, QUERY_ROWS, best_of, directions, majority, nearest


class MemoryBank:
    """Embeddings of this process's share of the training images, and the vote of the most similar ones of all processes.

    The share lies in the host's memory in float32, 4 N D bytes; the device sees a chunk at a time. `close` and `vote` are
    to be called by all processes together.

    Args:
        capacity: Maximum number of images N of this process.
        rank: Rank of this process.
        num_ranks: Number of processes P.
    """

    mean: Tensor
    """Mean of the embeddings of all processes, (D,)."""

    def __init__(self, capacity: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.capacity, self.rank, self.num_ranks = capacity, rank, num_ranks
        self.count = 0
        self._labels = torch.empty(capacity, dtype=torch.int64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add embeddings (B, D) and classes (B,)."""
        if self.count == 0:
            self._features = torch.empty(self.capacity, features.shape[1])
            self._total = torch.zeros(1 + features.shape[1], dtype=torch.float64, device=features.device)
        rows = slice(self.count, self.count + len(features))
        self._features[rows], self._labels[rows] = features, labels
        self._total[0] += len(features)
        self._total[1:] += features.double().sum(dim=0)
        self.count += len(features)

    def close(self) -> int:
        """Turn embeddings into directions from the mean of all, and return the number of images of all processes."""
        if self.num_ranks > 1:
            distributed.all_reduce(self._total)
        self.mean = (self._total[1:] / self._total[0]).float()
        self._features, self._labels = self._features[: self.count], self._labels[: self.count]
        mean = self.mean.to(self._features.device)
        for part in self._features.split(BANK_ROWS):  # in place: there is no room for a second copy
            functional.normalize(part.sub_(mean), dim=1, out=part)
        return int(self._total[0])

    def vote(self, queries: Tensor, num_neighbors: int, temperature: float) -> Tensor:
        """Classes of this process's queries, by the vote of the most similar images of all processes.

        Processes take turns: one sends a chunk of its queries to all, each finds the k best of its share, and the k best of
        those are the k best of all. So it does not matter how many queries each process has.

        Args:
            queries: Embeddings to classify, (Q, D), another Q in each process.
            num_neighbors: Number of neighbors k; all images if there are fewer.
            temperature: Temperature of the weights exp(cosine similarity / temperature).

        Returns:
            (Q,) class indices.
        """
        votes = [self._labels.new_empty(0).to(queries.device)]
        for source, count in enumerate(self._counts(queries)):
            for start in range(0, count, QUERY_ROWS):
                rows = min(QUERY_ROWS, count - start)
                if source == self.rank:
                    asked = directions(queries[start : start + rows].float(), self.mean)
                else:
                    asked = queries.new_empty(rows, queries.shape[1], dtype=torch.float32)
                if self.num_ranks > 1:
                    distributed.broadcast(asked, source)
                found = self._best_of_all(*nearest(self._features, self._labels, asked, num_neighbors), num_neighbors)
                if source == self.rank:
                    votes.append(majority(*found, temperature))
        return torch.cat(votes)

    def _counts(self, queries: Tensor) -> list[int]:
        """Q of all processes."""
        if self.num_ranks == 1:
            return [len(queries)]
        counts = torch.zeros(self.num_ranks, dtype=torch.int64, device=queries.device)
        counts[self.rank] = len(queries)
        distributed.all_reduce(counts)
        return counts.tolist()

    def _best_of_all(self, similarities: Tensor, labels: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
        """The k best of all processes' candidates: (Q, k) twice -> (Q, k) twice."""
        if self.num_ranks == 1:
            return similarities, labels
        missing = num_neighbors - similarities.shape[1]  # in a share of fewer images than k: with zero weight
        padded = functional.pad(similarities, (0, missing), value=-torch.inf), functional.pad(labels, (0, missing))
        gathered = []
        for mine in padded:
            theirs = [torch.empty_like(mine) for _ in range(self.num_ranks)]
            distributed.all_gather(theirs, mine.contiguous())
            gathered.append(torch.cat(theirs, dim=1))  # (Q, P k)
        return best_of(gathered[0], gathered[1], num_neighbors)
