"""Aspect-ratio buckets: pictures keep their shape instead of being cropped to squares.

A step takes its whole batch from one bucket, and each bucket goes on with its next samples: none is
dropped, padded, or shown twice in an epoch to fill a batch.
"""

import math
from bisect import bisect
from itertools import accumulate

import torch

from rite_diffusion.seeding import Stream, generator

MAX_RATIO = 2.0  # long side over short side


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (width, height) of at most resolution^2 pixels, sides multiples of `multiple`.

    For each width the largest height that fits, up to a ratio of 2; sorted by width.
    """
    area, sizes = resolution * resolution, []
    for width in range(multiple, 2 * resolution + 1, multiple):
        height = area // width // multiple * multiple
        if height and max(width, height) <= MAX_RATIO * min(width, height):
            sizes.append((width, height))
    return sizes


def bucket_of(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose shape is nearest to a picture's; of equal shapes the largest."""
    wanted = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - wanted), 6), -s[0] * s[1]))


def bucket_of_step(counts: list[int], seed: int, step: int) -> tuple[int, int]:
    """The bucket of a step, and the number of batches taken from it before.

    In every `sum(counts)` steps, bucket b is used `counts[b]` times, in random order.
    """
    if len(counts) == 1:
        return 0, step
    total = sum(counts)
    period, place = divmod(step, total)
    ends = list(accumulate(counts))
    order = torch.randperm(total, generator=generator(seed, period, Stream.BUCKETS)).tolist()
    turns = [bisect(ends, position) for position in order[: place + 1]]
    bucket = turns[-1]
    return bucket, period * counts[bucket] + turns.count(bucket) - 1


def batch_indices(buckets: list[list[int]], batch: int, seed: int, step: int) -> list[int]:
    """Indices of a step's samples; each epoch of a bucket is in a random order of its own.

    A function of (seed, step) only, so a resumed run uses the same batches as an uninterrupted one.
    """
    bucket, turn = bucket_of_step([len(members) for members in buckets], seed, step)
    members = buckets[bucket]
    places = range(turn * batch, (turn + 1) * batch)
    orders = {
        epoch: torch.randperm(
            len(members), generator=generator(seed, epoch, Stream.ORDER, bucket)
        ).tolist()
        for epoch in {place // len(members) for place in places}
    }
    return [members[orders[place // len(members)][place % len(members)]] for place in places]
