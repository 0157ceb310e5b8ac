"""What kernels with one program for each row share."""

# Numbers of a row that one thread holds at once, in as many warps as 16 and no fewer than one.
NUMBERS_PER_THREAD = 8
THREADS_PER_WARP = 32
MOST_WARPS = 16


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` numbers, a power of two."""
    return min(MOST_WARPS, max(1, block // (NUMBERS_PER_THREAD * THREADS_PER_WARP)))
