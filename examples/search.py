"""Nearest-neighbour search: embed some sentences once, then find the few that mean about the same as a query."""

import numpy as np

from stoker import Client

SENTENCES = [
    "The nurse checked the patient's temperature.",
    "Bread rises because yeast makes gas.",
    "A locomotive burns coal to boil water.",
    "The orchestra tuned before the concert.",
]
QUERY = "a steam engine at work"

with Client() as client:
    vectors = client.embed(SENTENCES).result()
    query = client.embed([QUERY]).result()[0]


def top(vectors: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` vectors most like the query, best first; of unit vectors the product is the cosine."""
    likeness = vectors @ query
    best = np.argpartition(-likeness, min(count, len(likeness)) - 1)[:count]
    return best[np.argsort(-likeness[best])]


likeness = vectors @ query
for index in top(vectors, query, 3):
    print(f"{likeness[index]:.3f}  {SENTENCES[index]}")
