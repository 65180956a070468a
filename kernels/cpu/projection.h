// Products of streams with phi, and what is computed of streams beside them.
//
// phi is repacked into panels of PANEL channels of one stream, [rows, PANEL] each, in the order in which they are met:
// rows that lie a power of two apart would fight for the same lines of the first cache. For anchored streams, stream 0
// has the sum of all streams' columns: phi · X = (Σ phi_i) Y_0 + Σ_{i>0} phi_i Y_i.
#pragma once

#include "tiles.h"

struct Phi {
    float* panels;
    int64_t width;
    int rows;
    int padded;
    bool anchored;

    int64_t panels_per_stream() const { return ceil_div(width, PANEL); }
    int64_t size() const { return N * panels_per_stream() * padded * PANEL; }

    float* panel(Channels channels, int stream, int index) const {
        const int64_t before = N * (channels.begin / PANEL) + stream * ceil_div(channels.count, PANEL) + index;
        return panels + before * padded * PANEL;
    }

    // Pack PANEL channels of every stream.
    void pack(const float* phi, int64_t panel_of_stream) const {
        const int64_t first = panel_of_stream * PANEL;
        const Channels channels(first / BLOCK * BLOCK, width);
        const int index = int((first - channels.begin) / PANEL);
        const int count = int(width - first < PANEL ? width - first : PANEL);
        for (int stream = 0; stream < N; stream++) {
            float* to = panel(channels, stream, index);
            memset(to, 0, sizeof(float) * padded * PANEL);
            for (int row = 0; row < rows; row++, to += PANEL) {
                const float* from = phi + (int64_t(row) * N + stream) * width + first;
                memcpy(to, from, sizeof(float) * count);
                if (anchored && stream == 0)
                    for (int other = 1; other < N; other++)
                        for (int c = 0; c < count; c++) to[c] += from[other * width + c];
            }
        }
    }
};

// Add phi · streams to products [rows], of TOKENS tokens whose streams begin at x[…].
static inline void project_tokens(
    const float* const (&x)[TOKENS], int64_t stream_stride, const Phi& phi, Channels channels, int row, float* result
) {
    Vector sums[TOKENS][ROWS] = {};
    for (int stream = 0; stream < N; stream++) {
        for (int begin = 0; begin < channels.padded; begin += PANEL) {
            const float* rows = phi.panel(channels, stream, begin / PANEL) + row * PANEL;
            const int64_t at = stream * stream_stride + begin;
            const int count = channels.padded - begin < PANEL ? channels.padded - begin : PANEL;
            for (int c = 0; c < count; c += LANES) {
                Vector values[TOKENS];
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; t++) values[t] = load(x[t] + at + c);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const Vector factor = load(rows + r * PANEL + c);
#pragma GCC unroll 8
                    for (int t = 0; t < TOKENS; t++) sums[t][r] += values[t] * factor;
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) result[r * CHUNK + t] += total(sums[t][r]);
}

// Add phi · streams of a tile to products [padded rows].
static void project(Source streams, int live, const Phi& phi, Channels channels, Lane* products) {
    for (int token = 0; token < live; token += TOKENS) {
        const float* x[TOKENS];
        // Behind the last token it is computed again: no one reads that.
        for (int t = 0; t < TOKENS; t++) x[t] = streams.row(token + t < live ? token + t : live - 1);
        for (int row = 0; row < phi.padded; row += ROWS)
            project_tokens(x, streams.stream, phi, channels, row, products[row] + token);
    }
}

// Add the sums of squares of the streams that a tile stands for, and with GATES the products of those that it stores
// with `grad` [tokens, channels].
template <bool ANCHORED, bool GATES>
static void measure(Source streams, Source grad, int live, Channels channels, float* squares, Lane* gates) {
    for (int token = 0; token < live; token++) {
        const float* x = streams.row(token);
        const float* g = GATES ? grad.row(token) : nullptr;
        Vector square[N] = {}, gate[N] = {};
        for (int c = 0; c < channels.padded; c += LANES) {
            const Vector first = load(x + c);
            const Vector slope = GATES ? load(g + c) : Vector{};
#pragma GCC unroll 8
            for (int s = 0; s < N; s++) {
                const Vector stored = s ? load(x + s * streams.stream + c) : first;
                const Vector value = ANCHORED && s ? stored + first : stored;
                square[s] += value * value;
                if (GATES) gate[s] += stored * slope;
            }
        }
        for (int s = 1; s < N; s++) square[0] += square[s];
        squares[token] += total(square[0]);
        if (GATES)
            for (int s = 0; s < N; s++) gates[s][token] += total(gate[s]);
    }
}

// Collapse a tile: Σ_i weights_i X_i, [tokens, channels].
static void collapse(Source streams, const Lane* weights, int live, Channels channels, Target result) {
    for (int token = 0; token < live; token++) {
        const float* x = streams.row(token);
        float* to = result.row(token);
        Vector factor[N];
        for (int s = 0; s < N; s++) factor[s] = all(weights[s][token]);
        for (int c = 0; c < channels.padded; c += LANES) {
            Vector sum = factor[0] * load(x + c);
#pragma GCC unroll 8
            for (int s = 1; s < N; s++) sum += factor[s] * load(x + s * streams.stream + c);
            store(to + c, sum);
        }
    }
}

// What the gradient of the streams of a tile is made of.
struct StreamGradient {
    Source streams;
    Source grad;         // of the layer input [tokens, channels]
    const float* rows;   // [tokens, padded]: gradient of the products
    const Slopes* slopes;
    const Source* more;  // added to it, or null
    Target result;
};

// The gradient of VECTORS vectors of channels of one stream, of TOKENS tokens from `token` on:
// phiᵀ · rows + pull · X + weight · grad, on the streams as they are stored.
template <int VECTORS>
static inline void stream_gradient(
    const StreamGradient& of, const Phi& phi, const float* panel, int token, int live, int stream, int channel
) {
    Vector sums[TOKENS][VECTORS] = {};
    const float* g[TOKENS];
    for (int t = 0; t < TOKENS; t++) g[t] = of.rows + int64_t(token + t < live ? token + t : live - 1) * phi.padded;
    for (int row = 0; row < phi.rows; row++) {
        Vector factors[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) factors[v] = load(panel + row * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            const Vector slope = all(g[t][row]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[t][v] += slope * factors[v];
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
        if (token + t >= live) break;
        const float* x = of.streams.row(token + t) + channel;
        const float* grad = of.grad.row(token + t) + channel;
        const Vector pull = all(of.slopes->pull[token + t]), weight = all(of.slopes->weights[stream][token + t]);
        float* to = of.result.row(token + t, stream) + channel;
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            Vector value = load(x + stream * of.streams.stream + v * LANES);
            if (phi.anchored && stream) value += load(x + v * LANES);
            if (phi.anchored && !stream) {
                value *= float(N);
                for (int s = 1; s < N; s++) value += load(x + s * of.streams.stream + v * LANES);
            }
            Vector sum = sums[t][v] + pull * value;
            sum += weight * load(grad + v * LANES);
            if (of.more) sum += load(of.more->row(token + t, stream) + channel + v * LANES);
            store(to + v * LANES, sum);
        }
    }
}

static void stream_gradients(const StreamGradient& of, const Phi& phi, int live, Channels channels) {
    constexpr int WHOLE = LANES == 16 ? 4 : 2;
    for (int stream = 0; stream < N; stream++) {
        for (int begin = 0; begin < channels.padded; begin += PANEL) {
            const float* panel = phi.panel(channels, stream, begin / PANEL);
            const int end = channels.padded - begin < PANEL ? channels.padded - begin : PANEL;
            int c = 0;
            for (; c + WHOLE * LANES <= end; c += WHOLE * LANES)
                for (int token = 0; token < live; token += TOKENS)
                    stream_gradient<WHOLE>(of, phi, panel + c, token, live, stream, begin + c);
            for (; c < end; c += LANES)
                for (int token = 0; token < live; token += TOKENS)
                    stream_gradient<1>(of, phi, panel + c, token, live, stream, begin + c);
        }
    }
}

// Tokens whose products with the streams are added up before they are added to the rest: the error of a long sum
// grows with its terms.
constexpr int RUN = 64;

// phi's gradient, for rows `row` … `row + ROWS - 1` of PANEL channels of one stream as they are stored:
// Σ_t rows_t X_t over all tokens, in an order that does not depend on the threads.
static void phi_gradient(
    const Stored* streams, const float* rows, int64_t tokens, const Phi& phi, int stream, int64_t first, int begin_row,
    int end_row, float* scratch, float* result
) {
    float* values = scratch;
    float* sums = scratch + RUN * PANEL;
    constexpr int VECTORS = PANEL / LANES;
    constexpr int WHOLE = LANES == 16 ? 4 : 2;
    const int count = int(phi.width - first < PANEL ? phi.width - first : PANEL);
    memset(sums, 0, sizeof(float) * phi.padded * PANEL);
    memset(values, 0, sizeof(float) * RUN * PANEL);
    for (int64_t token = 0; token < tokens; token += RUN) {
        const int run = int(tokens - token < RUN ? tokens - token : RUN);
        for (int t = 0; t < run; t++)
            widen(values + t * PANEL, streams + ((token + t) * N + stream) * phi.width + first, count);
        for (int row = begin_row; row < end_row; row += ROWS) {
            for (int v = 0; v < VECTORS; v += WHOLE) {
                Vector run_sums[ROWS][WHOLE] = {};
                for (int t = 0; t < run; t++) {
                    const float* slopes = rows + (token + t) * phi.padded + row;
                    Vector value[WHOLE];
#pragma GCC unroll 8
                    for (int w = 0; w < WHOLE; w++) value[w] = load(values + t * PANEL + (v + w) * LANES);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        const Vector slope = all(slopes[r]);
#pragma GCC unroll 8
                        for (int w = 0; w < WHOLE; w++) run_sums[r][w] += slope * value[w];
                    }
                }
                for (int r = 0; r < ROWS; r++)
                    for (int w = 0; w < WHOLE; w++) {
                        float* to = sums + (row + r) * PANEL + (v + w) * LANES;
                        store(to, load(to) + run_sums[r][w]);
                    }
            }
        }
    }
    for (int row = begin_row; row < end_row && row < phi.rows; row++)
        memcpy(result + (int64_t(row) * N + stream) * phi.width + first, sums + row * PANEL, sizeof(float) * count);
}
