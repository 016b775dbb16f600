"""Clusters of texts, over which the partition by clusters draws from Dirichlet distributions as it else does over labels.

Lin et al., "FedNLP", 2022, https://arxiv.org/abs/2104.08815 (there sentence embeddings; here TF-IDF, which needs no model).
"""

import warnings
from collections.abc import Sequence
from random import Random
from typing import Any

from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits


class Clusters:
    """K-means clusters of texts (TF-IDF, at most 50 singular directions), fitted once; other texts go to the nearest cluster.

    Fitted on one thread: with more, sums are added in another order and a text on a border may change its cluster.
    """

    def __init__(self, texts: Sequence[str], clusters: int, seed: str) -> None:
        state = Random(seed).getrandbits(31)
        self.words = TfidfVectorizer(token_pattern=r"\S+", max_features=20_000, sublinear_tf=True)
        with threadpool_limits(limits=1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct texts than clusters: some stay empty
            word_weights = self.words.fit_transform(texts)
            width = min(50, word_weights.shape[1] - 1, len(texts) - 1)
            self.directions = TruncatedSVD(width, random_state=state).fit(word_weights) if width > 0 else None
            self.means = KMeans(min(clusters, len(texts)), n_init=3, random_state=state).fit(self._embed(word_weights))

    def of(self, texts: Sequence[str]) -> list[int]:
        """The cluster of each text."""
        if not texts:
            return []
        with threadpool_limits(limits=1):
            return [int(cluster) for cluster in self.means.predict(self._embed(self.words.transform(texts)))]

    def _embed(self, word_weights: Any) -> Any:
        return normalize(self.directions.transform(word_weights) if self.directions else word_weights)
