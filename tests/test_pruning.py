"""Which tokens stay, against sorting in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecycle.pruning import kept_count, masked_images, patches_after_blocks, top_patches

quick = settings(max_examples=60, deadline=None)


@quick
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_top_patches_matches_sorting_with_ties(rows, count):
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = [
        sorted(sorted(range(7), key=lambda i, row=row: (-row[i], i))[:count]) for row in rows
    ]
    assert top_patches(scores, count).tolist() == expected


@quick
@given(
    st.integers(1, 600),
    st.dictionaries(st.integers(0, 5), st.floats(0, 1, exclude_max=True), max_size=4),
)
def test_patches_after_blocks_drops_the_floor_of_the_current_share(patches, prune):
    counts = patches_after_blocks(patches, 6, prune)
    left, expected = patches, []
    for block in range(6):
        left = left - math.floor(prune.get(block, 0.0) * left)
        expected.append(left)
    assert counts == tuple(expected)
    assert min(counts) >= 1  # one patch is never dropped


@quick
@given(st.integers(1, 600), st.floats(0, 1, exclude_max=True))
def test_kept_count_is_what_pruning_the_first_block_leaves(patches, sparsity):
    assert kept_count(patches, sparsity) == patches_after_blocks(patches, 1, {0: sparsity})[0]
    assert 1 <= kept_count(patches, sparsity) <= patches


def test_rejects_counts_and_ratios_out_of_range():
    for count in (0, 8, -1):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 7\], got {count}"):
            top_patches(torch.zeros(2, 7), count)
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity: must be in \[0, 1\), got"):
            kept_count(196, sparsity)


def test_masked_images_shows_only_kept_patches():
    images = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6) + 1
    kept = torch.tensor([[0, 5], [8, 4]])
    masked = masked_images(images, kept, 2, fill=-1)
    for b in range(2):
        for row in range(6):
            for column in range(6):
                patch = (row // 2) * 3 + column // 2
                seen = masked[b, :, row, column]
                original = images[b, :, row, column]
                expected = original if patch in kept[b] else torch.full((3,), -1.0)
                assert torch.equal(seen, expected)
