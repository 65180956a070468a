"""The search around a launch heuristic finds the fastest neighbor, and leaves the heuristic as it was."""

from __future__ import annotations

from types import SimpleNamespace

from mhc_compile.kernels.gpu.post import PostConfig

from benchmarks import tune


def test_search_returns_the_fastest_neighbor():
    used = []

    def heuristic(width):
        return PostConfig(4, 256, 4, 8)

    module = SimpleNamespace(__name__="post", config=heuristic)

    def seconds(call):
        call()
        if used[-1].warps == 8:
            raise RuntimeError("out of resources")
        return abs(used[-1].block_tokens - 8) + abs(used[-1].block_width - 128) + used[-1].warps

    best, least, base = tune.search(module, "config", lambda: used.append(module.config(17)), seconds)
    assert best == PostConfig(8, 128, 2, 8)
    assert (least, base) == (2, 4 + 128 + 4)
    assert module.config is heuristic
    # The configuration prints as what builds it.
    assert eval(repr(best)) == best
    assert tune.search(module, "config", lambda: None, seconds) is None
