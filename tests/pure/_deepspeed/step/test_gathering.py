"""Buckets: every element is gathered once, in order, in a buffer that is bounded."""

from hypothesis import given, strategies as st

from moe_groups._deepspeed.step.gathering import bucket_bytes, buckets


@given(
    st.lists(st.integers(1, 500), max_size=20),
    st.integers(2, 8),
    st.integers(1, 9000),
    st.booleans(),
)
def test_buckets_cover_each_element_once(
    sizes: list[int], ranks: int, most_bytes: int, copies: bool
) -> None:
    found = list(buckets(list(enumerate(sizes)), ranks, 2, most_bytes, copies))
    pieces = [piece for bucket in found for piece in bucket]
    gathered = [(p.group, element) for p in pieces for element in range(p.start, p.end)]
    assert gathered == [(i, element) for i, size in enumerate(sizes) for element in range(size)]
    for bucket in found:
        elements = sum(piece.end - piece.start for piece in bucket)
        taken = 2 * elements * (1 + ranks * (2 if copies else 1))
        whole = len(bucket) == 1 and not copies  # received into the weights
        assert taken <= most_bytes or whole or elements == 1


def test_a_bucket_takes_what_its_own_groups_have_released() -> None:
    """Ranks that share these groups may differ in others, but must make the same cuts."""
    assert bucket_bytes(100, 0, [(0, 1000)]) == 100
    assert bucket_bytes(100, 2, [(0, 20), (3, 10)]) == 100
    assert bucket_bytes(100, 2, [(0, 70), (3, 30)]) == 200
    assert bucket_bytes(100, 2, [(0, 1000)]) == 400
