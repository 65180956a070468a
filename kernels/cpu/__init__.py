"""The operators on a CPU: C++, compiled at first use for the machine at hand.

Tokens lie along the vectors where coefficients are computed, so that each step of Sinkhorn and of its derivative is one
instruction for 16 tokens (8 with AVX2); streams are read in tiles that stay in the second cache, once for projection,
norm and collapse. What is compiled is plain C++ behind a C interface: it includes nothing of PyTorch's, so that it
compiles in two or three seconds and outlives a change of PyTorch's version.

`build` compiles and loads, `operators` calls. In C++: `vectors.h` ← `manifolds.h` ← `coefficients.h` ← `tiles.h`
← `chunks.h`, `projection.h` ← `mixing.h`, `site.h` ← `operators.cpp`.
"""
