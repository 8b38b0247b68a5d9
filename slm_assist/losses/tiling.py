"""How many tokens of `blocked` make a tile, and how many tiles share a matmul of the gradients.

For accelerators: each group reads and writes the float32 [D, V] sum of the head's gradient once: 8 D V bytes for
2 N D V FLOPs, N its tokens, so N / 4 FLOPs a byte. A device with F FLOP/s and W bytes/s computes longer
than it moves from N = 4 F / W on: 824 tokens on an H200 (989e12 and 4.8e12), 1180 on an H100 (3.35e12). A tile of n
tokens reads a head for its logits: 2 D V bytes for 2 n D V FLOPs, so n >= F / W: 206 and 295. Logits of n tokens take
4 n V bytes a model; errors in bfloat16 take 2, so those of several tiles are kept for one matmul, as many as fit in
`block_bytes` too. At V 128256 and soft labels, 512 MiB give tiles of 512 tokens in groups of 2048: at 8192 tokens the
sum moves 4 times, 8.4 GB at D 2048, which an H200 does in 1.8 ms and beside 22 ms of matmuls (d_t 4096), with 1.1 GB of
blocks; tiles alone would move it 16 times. XLA, compiling for an H100, adds to the sum as part of the matmul, and needs
1.7 GB beside arguments and results (0.5 of them the head in bfloat16); with 1 GiB it would be 2.8 GB, for 0.9 ms less.
Larger vocabularies get at least `TILE_TOKENS`, for a tile's matmul to be bound by its FLOPs.

A CPU's tile stays in its caches, and there a tile makes a group: its errors are float32 and used at once. But the sum
is moved by the same count: two cores at 80 GFLOP/s and 10 GB/s want some 32 tokens at least; at V 262144 (D 256, 512
tokens) tiles of 8, 16, 32, 64 and 128 took 6.9, 4.5, 3.7, 3.5 and 3.4 s with soft labels.
"""

import jax

BLOCK_BYTES, TILE_TOKENS = 512 * 2**20, 512
BLOCK_BYTES_CPU, TILE_TOKENS_CPU = 32 * 2**20, 64


def default_block_bytes(token_bytes: int = 0, platform: str = "") -> int:
    """What `block_bytes=None` stands for on a platform (this machine's), where a token's logits take `token_bytes`."""
    if (platform or jax.default_backend()) == "cpu":
        return max(BLOCK_BYTES_CPU, TILE_TOKENS_CPU * token_bytes)
    return max(BLOCK_BYTES, TILE_TOKENS * token_bytes)


def tiling(tokens: int, vocab: int, models: int, error_size: int, block_bytes: int) -> tuple[int, int, int]:
    """(tokens in a tile, tiles in a group, groups): one tile, or as even a division as multiples of 8 allow.

    Float32 errors are used tile by tile: CPUs, whose dtype that is, have them in their caches.

    Args:
      models: how many have logits of the `vocab` entries.
      error_size: bytes of one entry's error.
    """
    most = max(1, block_bytes // (4 * vocab * models))
    if tokens <= most:
        return max(1, tokens), 1, 1
    step = 8 if most >= 8 else 1
    tiles = -(-tokens // (most // step * step))
    groups = -(-tiles // (4 * models // error_size)) if error_size < 4 else tiles
    tiles = -(-tiles // groups)
    return -(-tokens // (groups * tiles * step)) * step, tiles, groups
