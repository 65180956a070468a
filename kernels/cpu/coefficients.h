// A site's coefficients and their exact derivative, a chunk of tokens at a time: tokens lie along the vectors, so that
// each step of Sinkhorn is one operation over LANES tokens, and the n × n matrix is held in registers.
//
// The mathematics is that of reference.py, manifolds.py and anchored.py. The compiler is told MHC_STREAMS, n.
#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int N = MHC_STREAMS;
constexpr int CHUNK = 16;
// Logits of a matrix that is made of weighted permutations, and of a Kronecker product: see manifolds.py.
constexpr int PERMUTATIONS = N == 2 ? 2 : N == 3 ? 6 : N == 4 ? 24 : 1;
constexpr int FACTORS = N == 2 ? 1 : N == 4 ? 2 : N == 8 ? 3 : 1;
constexpr int MOST_ROWS = 2 * N + (PERMUTATIONS > N * N ? PERMUTATIONS : N * N);

typedef float Lane[CHUNK];

// Where a row lies whose matrix is stored [in, out].
static inline int stored_transposed(int row) {
    const int entry = row - 2 * N;
    return entry < 0 ? row : 2 * N + entry % N * N + entry / N;
}

// What is added where: see epsilons.py.
struct Epsilons {
    float pre;
    float first;
    float matrix;
    float sums;

    bool within() const { return first != 0.0f || matrix != 0.0f || sums != 0.0f; }
};

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

// Vectors of Sinkhorn's history: for each normalisation the matrix and the inverse sums.
constexpr int STEP = N * N + N;
static inline int64_t history_size(int iters) { return int64_t(2) * iters * STEP * LANES; }

template <bool COLUMNS>
static inline void normalise(Vector (&matrix)[N][N], float eps, float*& history) {
    Vector inverse[N];
    for (int a = 0; a < N; a++) {
        Vector sum = COLUMNS ? matrix[0][a] : matrix[a][0];
        for (int b = 1; b < N; b++) sum += COLUMNS ? matrix[b][a] : matrix[a][b];
        inverse[a] = 1.0f / (sum + eps);
    }
    for (int out = 0; out < N; out++)
        for (int in = 0; in < N; in++) matrix[out][in] *= inverse[COLUMNS ? in : out];
    if (history) {
        for (int out = 0; out < N; out++)
            for (int in = 0; in < N; in++, history += LANES) store(history, matrix[out][in]);
        for (int a = 0; a < N; a++, history += LANES) store(history, inverse[a]);
    }
}

template <bool COLUMNS>
static inline void normalise_backward(Vector (&grad)[N][N], float*& history) {
    history -= STEP * LANES;
    for (int a = 0; a < N; a++) {
        Vector dot{};
        for (int b = 0; b < N; b++) {
            const int out = COLUMNS ? b : a, in = COLUMNS ? a : b;
            dot += grad[out][in] * load(history + (out * N + in) * LANES);
        }
        const Vector inverse = load(history + (N * N + a) * LANES);
        for (int b = 0; b < N; b++) {
            Vector& entry = COLUMNS ? grad[b][a] : grad[a][b];
            entry = (entry - dot) * inverse;
        }
    }
}

// log_softmax over `out`, in place. `kept` is what an eps in the sums of the exponentials leaves of each column.
static inline void log_columns(Vector (&matrix)[N][N], float first_eps, Vector (&kept)[N]) {
    for (int in = 0; in < N; in++) {
        Vector most = matrix[0][in];
        for (int out = 1; out < N; out++) most = larger(most, matrix[out][in]);
        Vector sum{};
        for (int out = 0; out < N; out++) sum += exponential(matrix[out][in] - most);
        const Vector log = logarithm(sum);
        for (int out = 0; out < N; out++) matrix[out][in] = (matrix[out][in] - most) - log;
        kept[in] = first_eps == 0.0f ? all(1.0f) : sum / (sum + first_eps * exponential(-most));
    }
}

// softmax over `in`, in place.
static inline void soft_rows(Vector (&matrix)[N][N]) {
    for (int out = 0; out < N; out++) {
        Vector most = matrix[out][0];
        for (int in = 1; in < N; in++) most = larger(most, matrix[out][in]);
        Vector sum{};
        for (int in = 0; in < N; in++) sum += matrix[out][in] = exponential(matrix[out][in] - most);
        const Vector inverse = 1.0f / sum;
        for (int in = 0; in < N; in++) matrix[out][in] *= inverse;
    }
}

// `grad` is that of the softmax and becomes that of the logits.
static inline void soft_rows_backward(Vector (&grad)[N][N], const Vector (&matrix)[N][N]) {
    for (int out = 0; out < N; out++) {
        Vector dot{};
        for (int in = 0; in < N; in++) dot += grad[out][in] * matrix[out][in];
        for (int in = 0; in < N; in++) grad[out][in] = matrix[out][in] * (grad[out][in] - dot);
    }
}

// The first column normalisation, and without eps the first row one too, are in the log domain: see manifolds.py.
static inline void sinkhorn(Vector (&matrix)[N][N], int iters, const Epsilons& eps, float* history) {
    Vector kept[N];
    log_columns(matrix, eps.first, kept);
    if (!eps.within()) {
        soft_rows(matrix);
    } else {
        for (auto& row : matrix)
            for (int in = 0; in < N; in++) row[in] = exponential(row[in]) * kept[in] + eps.matrix;
        normalise<false>(matrix, eps.sums, history);
    }
    for (int round = 1; round < iters; round++) {
        normalise<true>(matrix, eps.sums, history);
        normalise<false>(matrix, eps.sums, history);
    }
}

// `grad` is that of the result and becomes that of the logits.
static inline void sinkhorn_backward(
    Vector (&grad)[N][N], const Vector (&logits)[N][N], int iters, const Epsilons& eps, float* history
) {
    Vector matrix[N][N];
    memcpy(matrix, logits, sizeof matrix);
    sinkhorn(matrix, iters, eps, history);
    history += int64_t(2 * (iters - 1) + eps.within()) * STEP * LANES;
    for (int round = 1; round < iters; round++) {
        normalise_backward<false>(grad, history);
        normalise_backward<true>(grad, history);
    }
    if (eps.within()) normalise_backward<false>(grad, history);
    memcpy(matrix, logits, sizeof matrix);
    Vector columns[N][N], kept[N];
    log_columns(matrix, eps.first, kept);
    for (int out = 0; out < N; out++)
        for (int in = 0; in < N; in++) columns[out][in] = exponential(matrix[out][in]) * kept[in];
    if (!eps.within()) {
        soft_rows(matrix);
        soft_rows_backward(grad, matrix);
    } else {
        for (int out = 0; out < N; out++)
            for (int in = 0; in < N; in++) grad[out][in] *= columns[out][in];
    }
    for (int in = 0; in < N; in++) {
        Vector sum{};
        for (int out = 0; out < N; out++) sum += grad[out][in];
        for (int out = 0; out < N; out++) grad[out][in] -= columns[out][in] * sum;
    }
}

// All permutations of the streams, in lexicographic order: where each output stream comes from.
struct Orders {
    int in[PERMUTATIONS][N];

    Orders() {
        int order[N];
        for (int out = 0; out < N; out++) order[out] = out;
        for (auto& known : in) {
            for (int out = 0; out < N; out++) known[out] = order[out];
            std::next_permutation(order, order + N);
        }
    }
};
static const Orders orders;

static inline void soft(Vector (&weights)[PERMUTATIONS]) {
    Vector most = weights[0];
    for (const Vector& weight : weights) most = larger(most, weight);
    Vector sum{};
    for (Vector& weight : weights) sum += weight = exponential(weight - most);
    const Vector inverse = 1.0f / sum;
    for (Vector& weight : weights) weight *= inverse;
}

static inline void permute(Vector (&weights)[PERMUTATIONS], Vector (&matrix)[N][N]) {
    soft(weights);
    for (auto& row : matrix)
        for (Vector& entry : row) entry = Vector{};
    for (int index = 0; index < PERMUTATIONS; index++)
        for (int out = 0; out < N; out++) matrix[out][orders.in[index][out]] += weights[index];
}

// `weights` are logits and become their gradient.
static inline void permute_backward(const Vector (&grad)[N][N], Vector (&weights)[PERMUTATIONS]) {
    soft(weights);
    Vector slopes[PERMUTATIONS], dot{};
    for (int index = 0; index < PERMUTATIONS; index++) {
        slopes[index] = grad[0][orders.in[index][0]];
        for (int out = 1; out < N; out++) slopes[index] += grad[out][orders.in[index][out]];
        dot += slopes[index] * weights[index];
    }
    for (int index = 0; index < PERMUTATIONS; index++) weights[index] *= slopes[index] - dot;
}

// Whether streams that the first factor tells apart, or a later one, are told apart by it: its bit is the highest.
static inline bool apart(int out, int in, int factor) { return ((out ^ in) >> (FACTORS - 1 - factor)) & 1; }

static inline void multiply_factors(const Vector (&logits)[FACTORS], Vector (&matrix)[N][N]) {
    Vector stay[FACTORS];
    for (int factor = 0; factor < FACTORS; factor++) stay[factor] = sigmoid(logits[factor]);
    for (int out = 0; out < N; out++)
        for (int in = 0; in < N; in++) {
            matrix[out][in] = all(1.0f);
            for (int factor = 0; factor < FACTORS; factor++)
                matrix[out][in] *= apart(out, in, factor) ? 1.0f - stay[factor] : stay[factor];
        }
}

// `logits` become their gradient.
static inline void multiply_factors_backward(const Vector (&grad)[N][N], Vector (&logits)[FACTORS]) {
    Vector stay[FACTORS], slopes[FACTORS] = {};
    for (int factor = 0; factor < FACTORS; factor++) stay[factor] = sigmoid(logits[factor]);
    for (int out = 0; out < N; out++)
        for (int in = 0; in < N; in++)
            for (int factor = 0; factor < FACTORS; factor++) {
                Vector others = grad[out][in];
                for (int other = 0; other < FACTORS; other++)
                    if (other != factor) others *= apart(out, in, other) ? 1.0f - stay[other] : stay[other];
                slopes[factor] += apart(out, in, factor) ? -others : others;
            }
    for (int factor = 0; factor < FACTORS; factor++)
        logits[factor] = slopes[factor] * stay[factor] * (1.0f - stay[factor]);
}

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
