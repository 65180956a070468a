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
    bool transposed;  // rows of res are stored [in, out]
    bool columns;     // phi is stored [n · width, rows]

    // Where a row's factor for a channel of a stream is stored, and how far the next channel's is.
    int64_t place(int row, int64_t channel) const {
        const int stored = transposed ? stored_transposed(row) : row;
        return columns ? channel * rows + stored : stored * N * width + channel;
    }
    int64_t step() const { return columns ? rows : 1; }

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
                const int last = anchored && stream == 0 ? N - 1 : stream;
                for (int of = stream; of <= last; of++) {
                    const float* from = phi + place(row, of * width + first);
                    for (int c = 0; c < count; c++) to[c] += from[c * step()];
                }
            }
        }
    }
};

// Panels whose streams, of TOKENS tokens, stay in the first cache while all rows of phi are multiplied with them.
constexpr int SLICE = 4 * PANEL;

// Add the products of COUNT tokens' channels with ROWS rows of phi to `sums`, vectors of shares.
//
// Alone in a function: between other code its addresses would not all be in registers.
template <int COUNT>
__attribute__((noinline)) static void project_rows(
    const float* x, int64_t token_stride, const float* rows, int64_t panel_size, int channels, Vector* sums
) {
    Vector shares[COUNT][ROWS];
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; t++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) shares[t][r] = sums[r * COUNT + t];
    for (int begin = 0; begin < channels; begin += PANEL, rows += panel_size) {
        const int count = channels - begin < PANEL ? channels - begin : PANEL;
        for (int c = 0; c < count; c += LANES) {
            Vector factor[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) factor[r] = in_register(load(rows + r * PANEL + c));
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; t++) {
                const Vector value = in_register(load(x + t * token_stride + begin + c));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) shares[t][r] += value * factor[r];
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; t++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sums[r * COUNT + t] = shares[t][r];
}

template <int COUNT>
static inline void project_tokens(Source streams, int token, const Phi& phi, Channels channels, Lane* products) {
    Vector sums[MOST_PADDED * COUNT];
    memset(sums, 0, sizeof(Vector) * phi.padded * COUNT);
    for (int stream = 0; stream < N; stream++)
        for (int begin = 0; begin < channels.padded; begin += SLICE) {
            const int count = channels.padded - begin < SLICE ? channels.padded - begin : SLICE;
            const float* x = streams.row(token, stream) + begin;
            const float* panel = phi.panel(channels, stream, begin / PANEL);
            for (int row = 0; row < phi.padded; row += ROWS)
                project_rows<COUNT>(
                    x, streams.token, panel + row * PANEL, phi.padded * PANEL, count, sums + row * COUNT);
        }
    for (int row = 0; row < phi.padded; row++) add_totals(sums + row * COUNT, COUNT, products[row] + token);
}

// Add phi · streams of a tile to products [padded rows].
static void project(Source streams, int live, const Phi& phi, Channels channels, Lane* products) {
    int token = 0;
    for (; token + TOKENS <= live; token += TOKENS) project_tokens<TOKENS>(streams, token, phi, channels, products);
    for (; token < live; token++) project_tokens<1>(streams, token, phi, channels, products);
}

// Add the sums of squares of the streams that a tile stands for.
template <bool ANCHORED>
static void measure_squares(Source streams, int live, Channels channels, float* squares) {
    for (int token = 0; token < live; token++) {
        const float* x = streams.row(token);
        Vector square[N] = {};
        for (int c = 0; c < channels.padded; c += LANES) {
            const Vector first = load(x + c);
#pragma GCC unroll 8
            for (int s = 0; s < N; s++) {
                const Vector stored = s ? load(x + s * streams.stream + c) : first;
                const Vector value = ANCHORED && s ? stored + first : stored;
                square[s] += value * value;
            }
        }
        for (int s = 1; s < N; s++) square[0] += square[s];
        squares[token] += total(square[0]);
    }
}

// Add the products of the streams as a tile stores them with `grad` [tokens, channels].
static void measure_gates(Source streams, Source grad, int live, Channels channels, Lane* gates) {
    for (int token = 0; token < live; token++) {
        const float* x = streams.row(token);
        const float* g = grad.row(token);
        Vector gate[N] = {};
        for (int c = 0; c < channels.padded; c += LANES) {
            const Vector slope = load(g + c);
#pragma GCC unroll 8
            for (int s = 0; s < N; s++) gate[s] += load(x + s * streams.stream + c) * slope;
        }
        float sums[N] = {};
        add_totals(gate, N, sums);
        for (int s = 0; s < N; s++) gates[s][token] += sums[s];
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

// Tokens whose gradients are computed at once.
constexpr int QUAD = 4;

// What the gradient of the streams of a tile is made of.
struct StreamGradient {
    Source streams;
    Source grad;         // of the layer input [tokens, channels]
    const float* rows;   // [tokens, padded], readable for CHUNK tokens: gradient of the products
    const Slopes* slopes;
    Source more;         // added to it, or none
};

// phiᵀ · rows: VECTORS vectors of channels of one stream, of QUAD tokens whose gradients lie `padded` apart.
template <int VECTORS>
__attribute__((noinline)) static void lift_rows(
    const float* rows, int64_t padded, const float* panel, int count, float* result, int64_t result_stride
) {
    Vector sums[QUAD][VECTORS] = {};
    for (const float* end = rows + count; rows < end; rows++, panel += PANEL) {
        Vector factor[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) factor[v] = in_register(load(panel + v * LANES));
#pragma GCC unroll 8
        for (int t = 0; t < QUAD; t++) {
            const Vector slope = all(rows[t * padded]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[t][v] += slope * factor[v];
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < QUAD; t++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store(result + t * result_stride + v * LANES, sums[t][v]);
}

// The gradient of a panel's channels of one token: lifted + pull · X + weight · grad, on the streams as they are stored.
template <bool ANCHORED, bool MORE>
static void finish_panel(
    const float* x, int64_t stream_stride, const float* grad, const float* more, int64_t more_stride, float pull,
    const float* weights, const float* lifted, int count, float* result, int64_t result_stride
) {
    Vector weight[N];
    for (int s = 0; s < N; s++) weight[s] = all(weights[s * CHUNK]);
    for (int c = 0; c < count; c += LANES) {
        Vector value[N];
        for (int s = 0; s < N; s++) value[s] = load(x + s * stream_stride + c);
        if (ANCHORED) {
            // The anchor's gradient is the sum of all streams' gradients.
            const Vector anchor = value[0];
            for (int s = 1; s < N; s++) {
                value[s] += anchor;
                value[0] += value[s];
            }
        }
        const Vector slope = load(grad + c);
        for (int s = 0; s < N; s++) {
            value[s] = load(lifted + s * PANEL + c) + pull * value[s];
            value[s] += weight[s] * slope;
            if (MORE) value[s] += load(more + s * more_stride + c);
        }
        for (int s = 0; s < N; s++) store(result + s * result_stride + c, value[s]);
    }
}

// Of `live` tokens from `token` on, at most QUAD, into `result`, whose first token is `token`.
static void stream_gradients(
    const StreamGradient& of, const Phi& phi, int token, int live, Channels channels, Target result
) {
    constexpr int WHOLE = LANES == 16 ? 4 : 2;
    alignas(64) float lifted[QUAD * N * PANEL];
    const float* rows = of.rows + int64_t(token) * phi.padded;
    const auto finish = phi.anchored ? (of.more.at ? finish_panel<true, true> : finish_panel<true, false>)
                                     : (of.more.at ? finish_panel<false, true> : finish_panel<false, false>);
    for (int begin = 0; begin < channels.padded; begin += PANEL) {
        const int count = channels.padded - begin < PANEL ? channels.padded - begin : PANEL;
        for (int stream = 0; stream < N; stream++) {
            const float* panel = phi.panel(channels, stream, begin / PANEL);
            float* to = lifted + stream * PANEL;
            int c = 0;
            for (; c + WHOLE * LANES <= count; c += WHOLE * LANES)
                lift_rows<WHOLE>(rows, phi.padded, panel + c, phi.rows, to + c, N * PANEL);
            for (; c < count; c += LANES) lift_rows<1>(rows, phi.padded, panel + c, phi.rows, to + c, N * PANEL);
        }
        for (int t = 0; t < live; t++)
            finish(
                of.streams.row(token + t) + begin, of.streams.stream, of.grad.row(token + t) + begin,
                of.more.at ? of.more.row(token + t) + begin : nullptr, of.more.stream, of.slopes->pull[token + t],
                &of.slopes->weights[0][token + t], lifted + t * N * PANEL, count, result.row(t) + begin, result.stream);
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
    for (int row = begin_row; row < end_row && row < phi.rows; row++) {
        float* to = result + phi.place(row, stream * phi.width + first);
        for (int c = 0; c < count; c++) to[c * phi.step()] = sums[row * PANEL + c];
    }
}
