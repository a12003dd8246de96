#!/bin/bash
# faiss-cpu 1.15.1: IndexFlatIP orders rows of equal similarity backwards among the first k of them: which row is called the nearest
# depends on how many were asked for. Of equal rows 0, 1, 2, ... the first answer is 0 with k = 1, 19 with k = 20 and 199 with k = 200,
# so that I[:, 0] of a search with k = 20 is no search with k = 1. IndexFlatL2 answers 0, 1, 2, ... on the same rows. Duplicates in a
# bank, features that were saturated or kept in few bits, and a collapsed network give equal rows.
# The guess was: the lowest index first, whatever k is, and the same order from both indexes.
# Output seen: first answers of k = 1, 20, 200: inner product 0, 19, 199, L2 0, 0, 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import faiss
import numpy as np

rows = np.zeros((1000, 8), np.float32)
rows[:, 0] = 1
first = {}
for index in (faiss.IndexFlatIP(8), faiss.IndexFlatL2(8)):
    index.add(rows)
    found = []
    for k in (1, 20, 200):
        for queries in (1, 100):  # other code runs from 20 queries on
            indices = index.search(rows[:queries], k)[1]
            assert (np.sort(indices, 1) == np.arange(k)).all() and (indices == indices[0]).all()
        found.append(int(indices[0, 0]))
    first[type(index).__name__] = found
shown = {name: ", ".join(map(str, found)) for name, found in first.items()}
print(f"first answers of k = 1, 20, 200: inner product {shown['IndexFlatIP']}, L2 {shown['IndexFlatL2']}")
assert first == {"IndexFlatIP": [0, 19, 199], "IndexFlatL2": [0, 0, 0]}, first
PY
"$dir/env/bin/python" case.py
