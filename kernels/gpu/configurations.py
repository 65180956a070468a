"""Launch configurations: how each kernel is cut into programs, by the shape of a call alone.

They were fitted to the registers, ahead of time, for sm_80, sm_90, sm_100 and gfx942 (`python -m
benchmarks.compile_ahead`), and have not been timed on a device yet. No Triton here: the cost model counts by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..orientation import ROWS_FIRST, PhiLayout


def next_power_of_2(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def programs_wanted(others: int, most: int) -> int:
    """Return how many programs to split work over, at most `most`, so that with `others` beside it about 1000 run.

    It depends on the shape alone, so that results do not depend on the device.
    """
    return max(1, min(ceil_div(1024, others), most))


def ceil_div(count: int, size: int) -> int:
    """Number of blocks of `size` that cover `count`."""
    return -(-count // size)


@dataclass(frozen=True)
class Geometry:
    """The shape of a call and of its register tiles.

    Attributes:
        tokens: product of the leading dimensions.
        n: streams.
        width: channels of a stream, C.
        rows: rows of phi: n (a head), 2n (pre and post) or n² + 2n (and the matrix).
        anchored: the streams are stored as stream 0 and differences from it (see `anchored`).
        element_size: bytes of a stream's element.
        pieces: parts that products split a float32 factor into: two of bfloat16 beside bfloat16 streams, else one.
        layout: how phi lies in memory.
    """

    tokens: int
    n: int
    width: int
    rows: int
    anchored: bool
    element_size: int
    pieces: int
    layout: PhiLayout = ROWS_FIRST

    @property
    def slots(self) -> int:
        """Rows of phi, padded to a power of two that tensor cores multiply."""
        return max(16, next_power_of_2(self.rows))

    def constants(self) -> dict[str, int]:
        """Return the compile-time constants that describe tiles."""
        return {"n": self.n, "ROWS": self.rows, "ANCHORED": self.anchored}

    @property
    def transposed(self) -> bool:
        """Whether rows of phi and bias, those of an n·n matrix, are ordered [in, out]."""
        return self.layout.transposed and self.rows == self.n * (self.n + 2)

    def phi(self) -> dict[str, bool]:
        """Return the compile-time constants that describe how phi lies in memory."""
        return {"COLUMNS": self.layout.columns, "TRANSPOSED": self.transposed}

    def matrix(self) -> dict[str, int]:
        """Return the compile-time constants that describe the logits of a token's matrix.

        PADDED is the padded length of a row of logits; 0 where they are [n, n], or there are none.
        """
        count = self.rows - 2 * self.n
        in_row = count > 0 and count != self.n**2
        return {"TRANSPOSED": self.transposed, "PADDED": next_power_of_2(count) if in_row else 0}

    def coefficients(self) -> dict[str, int]:
        """Return the compile-time constants that describe a token's coefficients."""
        return {"n": self.n, "N": next_power_of_2(self.n), "ROWS": self.rows, "ANCHORED": self.anchored}


def chunk_width(width: int, splits: int, block_width: int) -> int:
    """Channels of a program when C is split: a whole number of steps."""
    return ceil_div(ceil_div(width, splits), block_width) * block_width


@dataclass(frozen=True)
class ProjectionConfig:
    """Launch configuration.

    Attributes:
        block_tokens: tokens of a tile, at least 16 to feed a matmul.
        block_width: channels of a step.
        warps: warps of a program.
        stages: loads in flight; 1 leaves them unpipelined.
        splits: programs over C.
        prepared: phi is prepared by a launch of its own: many tiles of tokens read it.
    """

    block_tokens: int
    block_width: int
    warps: int
    stages: int
    splits: int
    prepared: bool


def projection_config(geometry: Geometry, mixes: bool) -> ProjectionConfig:
    """Choose tiles whose streams and factors fit the registers, at least two steps a program."""
    wide = geometry.pieces == 1
    block_tokens = 16 if geometry.tokens <= 16 else 32
    tiles = ceil_div(geometry.tokens, block_tokens)
    prepared = tiles > 4
    crowded = geometry.slots > 64 or (wide and geometry.slots > 16)
    narrow = crowded or (geometry.n > 6 and not prepared) or (geometry.n > 7 and mixes)
    # A row of logits of 24 permutations fills phi's tile: 64 channels of it do not fit beside the streams.
    halved = wide or mixes or geometry.n > 4 or not prepared or geometry.rows > 24
    block_width = 16 if narrow else 32 if halved else 64
    splits = programs_wanted(tiles, ceil_div(geometry.width, 2 * block_width))
    return ProjectionConfig(block_tokens, block_width, 8 if crowded else 4, 1, splits, prepared)


@dataclass(frozen=True)
class CoefficientsConfig:
    """Launch configuration: tokens of a tile, and warps."""

    block_tokens: int
    warps: int


def coefficients_config(geometry: Geometry) -> CoefficientsConfig:
    """Choose a token a thread; from 5 streams on several threads share a token's matrix, which is larger."""
    return CoefficientsConfig(128, 4) if geometry.n <= 4 else CoefficientsConfig(32, 4)


@dataclass(frozen=True)
class CollapseConfig:
    """Launch configuration: tokens and channels of a tile, warps."""

    block_tokens: int
    block_width: int
    warps: int


def collapse_config(geometry: Geometry) -> CollapseConfig:
    """Choose a tile of one 16-byte load a thread for each stream; narrow streams share a tile."""
    vector = 16 // geometry.element_size
    block_width = min(next_power_of_2(geometry.width), 128 * vector)
    return CollapseConfig(128 * vector // block_width, block_width, 4)


@dataclass(frozen=True)
class CollapseNormConfig:
    """Launch configuration: tokens of a program and channels of a step, warps; `held` where a step is a whole row."""

    block_tokens: int
    block_width: int
    warps: int
    held: bool


def collapse_norm_config(geometry: Geometry) -> CollapseNormConfig:
    """Choose whole rows of up to 16 KB a stream, 16 channels a thread; narrow rows share a tile, wide ones are cut."""
    longest = 16384 // geometry.element_size
    row = next_power_of_2(geometry.width)
    block_width = row if row <= longest else longest // 2
    block_tokens = max(1, 2048 // block_width)
    return CollapseNormConfig(block_tokens, block_width, block_tokens * block_width // 512, row <= longest)


@dataclass(frozen=True)
class GatesConfig:
    """Launch configuration: tokens and channels of a step, warps, programs over C, channels a thread adds up."""

    block_tokens: int
    block_width: int
    warps: int
    splits: int
    vector: int


def gates_config(geometry: Geometry) -> GatesConfig:
    """Choose a tile of one 16-byte load a thread for each stream, and a step or more a program."""
    vector = 16 // geometry.element_size if geometry.n <= 4 else 8 // geometry.element_size
    block_width = min(max(vector, next_power_of_2(geometry.width)), 16 * vector)
    tiles = ceil_div(geometry.tokens, 8)
    splits = programs_wanted(tiles, ceil_div(geometry.width, block_width))
    return GatesConfig(8, block_width, 4, splits, vector)


@dataclass(frozen=True)
class StreamGradientsConfig:
    """Launch configuration.

    Attributes:
        block_tokens: tokens of a step, at least 16: they are the inner dimension of phi's gradient.
        block_width: channels that a program owns.
        warps: warps of a program.
        splits: shares of the tokens, each with partial sums of phi's gradient of its own.
        streams: streams that a launch differentiates; with more, there are several launches.
    """

    block_tokens: int
    block_width: int
    warps: int
    splits: int
    streams: int


def stream_gradients_config(geometry: Geometry, normed: bool = False) -> StreamGradientsConfig:
    """Choose blocks of C that keep phi's gradient in registers, and splits that fill the device.

    Up to 4 streams are one launch; beyond, phi's factors and gradient of all do not fit. With a norm's backward beside
    them, 2 where a block is narrow.
    """
    roomy = geometry.slots <= 32 and geometry.pieces == 2
    width = 64 if roomy else 16
    splits = programs_wanted(ceil_div(geometry.width, width), min(64, ceil_div(geometry.tokens, 64)))
    return StreamGradientsConfig(16, width, 8, splits, 4 if roomy or not normed else 2)
