"""The n-gram hash once more, token by token in Python's unbounded integers, from documents rather than positions."""


def slow_rows(
    documents: list[list[int]],
    *,
    multipliers: list[int],
    primes: list[int],
    orders: list[int],
    pad_id: int,
    cross_documents: bool = False,
) -> list[list[int]]:
    """Rows [T][S] of the tokens of one sequence: its documents, lists of compressed ids, one after another."""
    heads = len(primes) // len(orders)
    rows = []
    for number, document in enumerate(documents):
        for place in range(len(document)):
            before = [token for earlier in documents[:number] for token in earlier] if cross_documents else []
            history = (before + document[: place + 1])[::-1]
            row = []
            for slot, prime in enumerate(primes):
                order = orders[slot // heads]
                ngram = (history + [pad_id] * order)[:order]
                mix = 0
                for token, multiplier in zip(ngram, multipliers, strict=False):
                    assert 0 <= token * multiplier < 2**63
                    mix ^= token * multiplier
                row.append(sum(primes[:slot]) + mix % prime)
            rows.append(row)
    return rows
