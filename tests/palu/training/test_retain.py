"""Which retain rows go beside which forget batch."""

from palu.training.batching import retain_rows


def test_retain_rows_of_like_length_go_together():
    lengths = [(37 * n) % 101 for n in range(230)]

    def batches(**more):
        places = [range(8 * step, 8 * step + 8) for step in range(28)]
        return [retain_rows(230, at, seed=3, **more) for at in places]

    grouped = batches(lengths=lengths, group=8)
    assert grouped == batches(lengths=lengths, group=8)  # a resumed run sees the same
    seen = [row for batch in grouped for row in batch]
    assert len(set(seen)) == len(seen) == 224  # one permutation: every row once

    def padding(found):
        spread = [sum(max(lengths[r] for r in b) - lengths[r] for r in b) for b in found]
        return sum(spread)

    assert padding(grouped) < 0.2 * padding(batches())
    firsts = [lengths[batch[0]] for batch in grouped]
    assert firsts != sorted(firsts)  # not from short to long
