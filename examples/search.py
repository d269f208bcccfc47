"""Nearest-neighbour search: embed some sentences once, then find those that mean about the same as a query."""

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

likeness = vectors @ query  # unit vectors: the dot product is the cosine
for place in np.argsort(-likeness):
    print(f"{likeness[place]:.3f}  {SENTENCES[place]}")
