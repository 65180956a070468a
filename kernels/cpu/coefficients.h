// A site's coefficients and their exact derivative, a chunk of tokens at a time: tokens lie along the vectors.
//
// The mathematics is that of reference.py and anchored.py.
#pragma once

#include <algorithm>

#include "manifolds.h"

constexpr int CHUNK = 16;
constexpr int MOST_ROWS = 2 * N + (PERMUTATIONS > N * N ? PERMUTATIONS : N * N);

typedef float Lane[CHUNK];

// Where a row lies whose matrix is stored [in, out].
static inline int stored_transposed(int row) {
    const int entry = row - 2 * N;
    return entry < 0 ? row : 2 * N + entry % N * N + entry / N;
}

// How logits become coefficients.
struct Mapping {
    const float* scale;
    const float* bias;
    int64_t width;
    int rows;
    int iters;
    float norm_eps;
    Epsilons eps;
    bool anchored;
    bool gated;
    bool mixes;
    bool sinkhorn;
    bool row;
    bool permutation;
    bool kronecker;
    // Rows of res sum to 1 by construction: column 0 of the anchored matrix is then constant.
    bool exact;
    bool head;
    // The rows of res, of phi and of bias, are stored [in, out].
    bool transposed;

    int group(int row) const { return row < N ? 0 : row < 2 * N ? 1 : 2; }
    int stored(int row) const { return transposed ? stored_transposed(row) : row; }
};

struct Coefficients {
    alignas(64) Lane pre[N];
    alignas(64) Lane post[N];
    alignas(64) Lane res[N][N];
};

static inline Vector inverse_rms(const Mapping& mapping, const float* squares) {
    return 1.0f / square_root(load(squares) / float(N * mapping.width) + mapping.norm_eps);
}

static inline void anchor_reading(Vector (&pre)[N]) {
    for (int stream = 1; stream < N; stream++) pre[0] += pre[stream];
}

// Turn products [rows] and sums of squares of a chunk into its coefficients (Eq. 7, 8).
static void coefficients(const Mapping& mapping, const Lane* products, const float* squares, Coefficients& result) {
    for (int lane = 0; lane < CHUNK; lane += LANES) {
        const Vector inverse = inverse_rms(mapping, squares + lane);
        const auto logit = [&](int row) {
            return load(products[row] + lane) * inverse * mapping.scale[mapping.group(row)] + mapping.bias[mapping.stored(row)];
        };
        Vector pre[N];
        for (int stream = 0; stream < N; stream++)
            pre[stream] = mapping.gated ? sigmoid(logit(stream)) + mapping.eps.pre : logit(stream);
        if (mapping.anchored) anchor_reading(pre);
        for (int stream = 0; stream < N; stream++) store(result.pre[stream] + lane, pre[stream]);
        if (mapping.head) continue;

        Vector post[N];
        for (int stream = 0; stream < N; stream++)
            post[stream] = mapping.gated ? 2.0f * sigmoid(logit(N + stream)) : logit(N + stream);
        for (int stream = 0; stream < N; stream++)
            store(result.post[stream] + lane, mapping.anchored && stream ? post[stream] - post[0] : post[stream]);

        Vector res[N][N];
        if (mapping.permutation) {
            Vector weights[PERMUTATIONS];
            for (int index = 0; index < PERMUTATIONS; index++) weights[index] = logit(2 * N + index);
            permute(weights, res);
        } else if (mapping.kronecker) {
            Vector logits[FACTORS];
            for (int factor = 0; factor < FACTORS; factor++) logits[factor] = logit(2 * N + factor);
            multiply_factors(logits, res);
        } else {
            for (int out = 0; out < N; out++)
                for (int in = 0; in < N; in++)
                    res[out][in] = mapping.mixes ? logit(2 * N + out * N + in) : all(out == in ? 1.0f : 0.0f);
        }
        if (mapping.sinkhorn) sinkhorn(res, mapping.iters, mapping.eps, nullptr);
        if (mapping.row) soft_rows(res);
        if (mapping.anchored) {
            for (int out = 0; out < N; out++) {
                if (mapping.exact) res[out][0] = all(1.0f);
                else
                    for (int in = 1; in < N; in++) res[out][0] += res[out][in];
            }
            for (int out = 1; out < N; out++)
                for (int in = 0; in < N; in++) res[out][in] -= res[0][in];
        }
        for (int out = 0; out < N; out++)
            for (int in = 0; in < N; in++) store(result.res[out][in] + lane, res[out][in]);
    }
}

// What the coefficients' backward leaves for the streams and the mapping, of a chunk.
struct Slopes {
    alignas(64) Lane rows[MOST_ROWS];  // gradient of the products
    alignas(64) Lane pull;             // factor of the streams themselves, through 1/RMS
    alignas(64) Lane weights[N];       // what collapses the streams as they are stored
};

// Differentiate a chunk's coefficients, computing them again.
//
// `gates` are products of the stored streams with the layer input's gradient; `grad` holds the gradients of post and
// res. All three are of the chunk's `live` tokens, zeros behind them. Adds up `bias` and `scale`, [rows] each.
static void coefficient_gradients(
    const Mapping& mapping, const Lane* products, const float* squares, const Lane* gates, const Coefficients& grad,
    int live, float* history, Slopes& slopes, float* bias, float* scale
) {
    for (int row = 0; row < mapping.rows; row++) bias[row] = scale[row] = 0.0f;
    for (int lane = 0; lane < CHUNK; lane += LANES) {
        Integers alive;
        for (int index = 0; index < LANES; index++) alive[index] = lane + index < live ? -1 : 0;
        const Vector inverse = inverse_rms(mapping, squares + lane);
        Vector through{};
        const auto logit = [&](int row) {
            return load(products[row] + lane) * inverse * mapping.scale[mapping.group(row)] + mapping.bias[mapping.stored(row)];
        };
        const auto leave = [&](int row, Vector grad_logit) {
            const Vector product = load(products[row] + lane);
            const Vector normed = grad_logit * mapping.scale[mapping.group(row)];
            through += normed * product;
            store(slopes.rows[row] + lane, normed * inverse);
            bias[row] += total(alive ? grad_logit : Vector{});
            scale[row] += total(alive ? grad_logit * product * inverse : Vector{});
        };

        Vector pre[N];
        const Vector first = load(gates[0] + lane);
        for (int stream = 0; stream < N; stream++) {
            const Vector opened = mapping.gated ? sigmoid(logit(stream)) : logit(stream);
            Vector slope = load(gates[stream] + lane);
            if (mapping.anchored && stream) slope += first;
            leave(stream, mapping.gated ? slope * opened * (1.0f - opened) : slope);
            pre[stream] = mapping.gated ? opened + mapping.eps.pre : opened;
        }
        if (mapping.anchored) anchor_reading(pre);
        for (int stream = 0; stream < N; stream++) store(slopes.weights[stream] + lane, pre[stream]);

        if (!mapping.head) {
            Vector post[N];
            for (int stream = 0; stream < N; stream++) post[stream] = load(grad.post[stream] + lane);
            if (mapping.anchored)
                for (int stream = 1; stream < N; stream++) post[0] -= post[stream];
            for (int stream = 0; stream < N; stream++) {
                const Vector opened = mapping.gated ? sigmoid(logit(N + stream)) : all(0.0f);
                leave(N + stream, mapping.gated ? 2.0f * post[stream] * opened * (1.0f - opened) : post[stream]);
            }
        }
        if (!mapping.head && mapping.mixes) {
            Vector res[N][N];
            for (int out = 0; out < N; out++)
                for (int in = 0; in < N; in++) res[out][in] = load(grad.res[out][in] + lane);
            if (mapping.anchored) {
                for (int out = 1; out < N; out++)
                    for (int in = 0; in < N; in++) res[0][in] -= res[out][in];
                for (int out = 0; out < N; out++) {
                    if (mapping.exact) res[out][0] = Vector{};
                    for (int in = 1; in < N; in++) res[out][in] += res[out][0];
                }
            }
            if (mapping.permutation) {
                Vector weights[PERMUTATIONS];
                for (int index = 0; index < PERMUTATIONS; index++) weights[index] = logit(2 * N + index);
                permute_backward(res, weights);
                for (int index = 0; index < PERMUTATIONS; index++) leave(2 * N + index, weights[index]);
            } else if (mapping.kronecker) {
                Vector slopes[FACTORS];
                for (int factor = 0; factor < FACTORS; factor++) slopes[factor] = logit(2 * N + factor);
                multiply_factors_backward(res, slopes);
                for (int factor = 0; factor < FACTORS; factor++) leave(2 * N + factor, slopes[factor]);
            } else {
                Vector logits[N][N];
                for (int out = 0; out < N; out++)
                    for (int in = 0; in < N; in++) logits[out][in] = logit(2 * N + out * N + in);
                if (mapping.sinkhorn) sinkhorn_backward(res, logits, mapping.iters, mapping.eps, history);
                if (mapping.row) {
                    soft_rows(logits);
                    soft_rows_backward(res, logits);
                }
                for (int out = 0; out < N; out++)
                    for (int in = 0; in < N; in++) leave(2 * N + out * N + in, res[out][in]);
            }
        }
        store(slopes.pull + lane, -through * inverse * inverse * inverse / float(N * mapping.width));
    }
}
