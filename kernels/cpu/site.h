// A site: its coefficients and its layer input from the streams, and what is differentiated of both.
#pragma once

#include "chunks.h"
#include "projection.h"

namespace {

template <int COUNT>
void transpose_in(const float* from, int live, Lane* to) {
    memset(to, 0, sizeof(Lane) * COUNT);
    for (int t = 0; t < live; t++)
        for (int index = 0; index < COUNT; index++) to[index][t] = from[t * COUNT + index];
}

template <int COUNT>
void transpose_out(const Lane* from, int live, float* to) {
    for (int t = 0; t < live; t++)
        for (int index = 0; index < COUNT; index++) to[t * COUNT + index] = from[index][t];
}

// A site's streams, and what is computed of them a chunk at a time.
struct Site {
    const Stored* streams;
    int64_t tokens;
    int64_t width;
    Mapping mapping;
    Phi phi;

    template <class Work>
    void each_block(Work work) const {
        for (int64_t begin = 0; begin < width; begin += BLOCK) work(Channels(begin, width));
    }

    Source tile(Chunk chunk, Channels channels, float* memory) const {
        return read_tile(streams, width, N, chunk.first, chunk.live, channels, memory);
    }

    // A chunk's projection, [live, rows + 1] in memory and as lanes: the products, and the sum of squares behind them.
    void read_projection(Chunk chunk, const float* projection, Lane* products, float* squares) const {
        const float* from = projection + chunk.first * (mapping.rows + 1);
        memset(products, 0, sizeof(Lane) * phi.padded);
        memset(squares, 0, sizeof(Lane));
        for (int t = 0; t < chunk.live; t++, from += mapping.rows + 1) {
            for (int row = 0; row < mapping.rows; row++) products[row][t] = from[row];
            squares[t] = from[mapping.rows];
        }
    }

    // `measure` of a chunk, and what `pre` and `head` do of it.
    void forward(Chunk chunk, Stored* layer_input, float* post, float* res, float* projection) const {
        float* memory = scratch.take(STREAM_TILE);
        alignas(64) Lane products[MOST_PADDED], squares;
        Coefficients found;
        memset(products, 0, sizeof(Lane) * phi.padded);
        memset(squares, 0, sizeof(Lane));
        each_block([&](Channels channels) {
            const Source x = tile(chunk, channels, memory);
            project(x, chunk.live, phi, channels, products);
            (mapping.anchored ? measure_squares<true> : measure_squares<false>)(x, chunk.live, channels, squares);
        });
        coefficients(mapping, products, squares, found);
        float* to = projection + chunk.first * (mapping.rows + 1);
        for (int t = 0; t < chunk.live; t++, to += mapping.rows + 1) {
            for (int row = 0; row < mapping.rows; row++) to[row] = products[row][t];
            to[mapping.rows] = squares[t];
        }
        if (!mapping.head) {
            transpose_out<N>(found.post, chunk.live, post + chunk.first * N);
            transpose_out<N * N>(&found.res[0][0], chunk.live, res + chunk.first * N * N);
        }
        if (layer_input) collapse_chunk(chunk, found, layer_input, memory, true);
    }

    // `collapse` of a chunk: `forward` without a projection, post and res.
    void collapse_measured(Chunk chunk, const float* projection, Stored* layer_input) const {
        float* memory = scratch.take(STREAM_TILE);
        alignas(64) Lane products[MOST_PADDED], squares;
        Coefficients found;
        Mapping gates = mapping;
        gates.head = true;
        read_projection(chunk, projection, products, squares);
        coefficients(gates, products, squares, found);
        collapse_chunk(chunk, found, layer_input, memory, false);
    }

    void collapse_chunk(
        Chunk chunk, const Coefficients& found, Stored* layer_input, float* memory, bool read_before
    ) const {
        float* result_memory = scratch.take(VALUE_TILE);
        each_block([&](Channels channels) {
            // One block is still there.
            const Source x = !read_before || width > BLOCK || channels.in_place()
                                 ? tile(chunk, channels, memory)
                                 : Source{memory, int64_t(N) * channels.padded, channels.padded};
            const Target to = open_tile(layer_input, width, 1, chunk.first, channels, result_memory);
            collapse(x, found.pre, chunk.live, channels, to);
            write_tile(layer_input, width, 1, chunk.first, chunk.live, channels, to);
        });
    }
};

// Where a mapping's backward leaves its results.
struct MappingGradient {
    float* rows;   // [tokens of whole chunks, padded]
    float* sums;   // [chunks, 2, rows]: shares of the gradients of bias and scale
    float* phi;    // [rows, n · width], as phi is stored
    float* scale;  // one each group
    float* bias;   // [rows]

    static int64_t rows_size(const Site& site) { return chunks_of(site.tokens) * CHUNK * site.phi.padded; }
    static int64_t sums_size(const Site& site) { return chunks_of(site.tokens) * 2 * site.phi.rows; }
};

constexpr int64_t BACKWARD_SCRATCH = 2 * STREAM_TILE + VALUE_TILE;

// The backward of `pre` and `head` of a chunk, up to phi's gradient.
//
// For each block of channels `more` may view what else is added to the streams' gradient. Then, for a few tokens at a
// time, `open` says where it is to be written and `close` takes it on.
template <class More, class Open, class Close>
void backward_chunk(
    const Site& site, Chunk chunk, const Stored* grad_input, const float* grad_post, const float* grad_res,
    const float* projection, const MappingGradient& result, More more, Open open, Close close
) {
    const Mapping& mapping = site.mapping;
    const Phi& phi = site.phi;
    float* memory = scratch.take(STREAM_TILE);
    float* grad_memory = scratch.take(VALUE_TILE);
    float* history = scratch.take(mapping.sinkhorn ? history_size(mapping.iters) : 0);
    alignas(64) Lane products[MOST_PADDED], squares, gates[N];
    Slopes slopes;
    Coefficients grad;
    site.read_projection(chunk, projection, products, squares);
    memset(gates, 0, sizeof gates);
    site.each_block([&](Channels channels) {
        const Source x = site.tile(chunk, channels, memory);
        const Source g = read_tile(grad_input, site.width, 1, chunk.first, chunk.live, channels, grad_memory);
        measure_gates(x, g, chunk.live, channels, gates);
    });
    if (!mapping.head) {
        transpose_in<N>(grad_post + chunk.first * N, chunk.live, grad.post);
        if (mapping.mixes) transpose_in<N * N>(grad_res + chunk.first * N * N, chunk.live, &grad.res[0][0]);
    }
    float* sums = result.sums + chunk.first / CHUNK * 2 * phi.rows;
    coefficient_gradients(
        mapping, products, squares, gates, grad, chunk.live, history, slopes, sums, sums + phi.rows);
    float* rows = result.rows + chunk.first * phi.padded;
    memset(rows, 0, sizeof(float) * CHUNK * phi.padded);
    for (int t = 0; t < chunk.live; t++)
        for (int row = 0; row < phi.rows; row++) rows[t * phi.padded + row] = slopes.rows[row][t];
    site.each_block([&](Channels channels) {
        const bool kept = site.width <= BLOCK && !channels.in_place();
        const Target held = scratch_tile(memory, channels, N), held_grad = scratch_tile(grad_memory, channels, 1);
        const Source x = kept ? Source{held.at, held.token, held.stream} : site.tile(chunk, channels, memory);
        const Source g = kept ? Source{held_grad.at, held_grad.token, held_grad.stream}
                              : read_tile(grad_input, site.width, 1, chunk.first, chunk.live, channels, grad_memory);
        const StreamGradient of{x, g, rows, &slopes, more(channels)};
        for (int token = 0; token < chunk.live; token += QUAD) {
            const Chunk part = chunk.part(token, QUAD);
            const Target to = open(part, channels);
            stream_gradients(of, phi, token, part.live, channels, to);
            close(part, channels, to);
        }
    });
}

// phi's gradient from the products' one, and the gradients of scale and bias from their shares.
bool finish_backward(const Site& site, const MappingGradient& result, int threads) {
    const Phi& phi = site.phi;
    const int64_t panels = N * phi.panels_per_stream();
    // A task each row group where there are few panels: the order of the sums is the same.
    const int parts = panels < 4 * threads ? phi.padded / ROWS : 1;
    const int rows = phi.padded / parts;
    bool done = in_parallel(panels * parts, threads, (RUN + phi.padded) * PANEL, [&](int64_t index) {
        const int64_t panel = index / parts;
        const int begin = int(index % parts) * rows;
        float* memory = scratch.take((RUN + phi.padded) * PANEL);
        phi_gradient(
            site.streams, result.rows, site.tokens, phi, int(panel % N), panel / N * PANEL, begin, begin + rows, memory,
            result.phi);
    });
    if (phi.anchored) {
        // X_i = Y_i + Y_0.
        done &= in_parallel(phi.rows, threads, 0, [&](int64_t row) {
            float* first = result.phi + phi.place(int(row), 0);
            for (int stream = 1; stream < N; stream++)
                for (int64_t c = 0; c < site.width; c++)
                    first[(stream * site.width + c) * phi.step()] += first[c * phi.step()];
        });
    }
    double scales[3] = {};
    for (int row = 0; row < phi.rows; row++) {
        double bias = 0.0, scale = 0.0;
        for (int64_t chunk = 0; chunk < chunks_of(site.tokens); chunk++) {
            const float* sums = result.sums + chunk * 2 * phi.rows;
            bias += sums[row];
            scale += sums[phi.rows + row];
        }
        result.bias[site.mapping.stored(row)] = float(bias);
        scales[site.mapping.group(row)] += scale;
    }
    const int groups = site.mapping.head ? 1 : site.mapping.mixes ? 3 : 2;
    for (int group = 0; group < groups; group++) result.scale[group] = float(scales[group]);
    return done;
}

constexpr int ANCHORED = 1, GATED = 2, MIXES = 4, SINKHORN = 8, HEAD = 16, EXACT = 32, ROW = 64, TRANSPOSED = 128, COLUMNS = 256, PERMUTATION = 512,
              KRONECKER = 1024;

Site site_of(
    const Stored* streams, const float* scale, const float* bias, int64_t tokens, int64_t width, int iters,
    float norm_eps, Epsilons eps, int flags
) {
    Site site{};
    site.streams = streams;
    site.tokens = tokens;
    site.width = width;
    const bool head = flags & HEAD, mixes = (flags & MIXES) && !head;
    const bool permutation = (flags & PERMUTATION) && mixes, kronecker = (flags & KRONECKER) && mixes;
    const int entries = permutation ? PERMUTATIONS : kronecker ? FACTORS : N * N;
    const int rows = head ? N : mixes ? 2 * N + entries : 2 * N;
    const bool anchored = flags & ANCHORED, transposed = (flags & TRANSPOSED) && mixes;
    site.mapping = {scale,    bias,     width, rows, iters, norm_eps, eps, anchored, bool(flags & GATED),
                    mixes,    (flags & SINKHORN) && mixes, (flags & ROW) && mixes, permutation, kronecker, bool(flags & EXACT), head,
                    transposed};
    site.phi = {nullptr, width, rows, int(ceil_div(rows, ROWS)) * ROWS, anchored, transposed, bool(flags & COLUMNS)};
    return site;
}

bool pack(Site& site, const float* phi, float* panels, int threads) {
    site.phi.panels = panels;
    return in_parallel(
        site.phi.panels_per_stream(), threads, 0, [&](int64_t panel) { site.phi.pack(phi, panel); });
}

}  // namespace
