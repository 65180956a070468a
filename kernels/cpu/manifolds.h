// The matrices of the manifolds and their exact derivatives, a token a lane: each step of Sinkhorn is one operation over
// LANES tokens, and the n × n matrix is held in registers.
//
// The mathematics is that of manifolds.py. The compiler is told MHC_STREAMS, n.
#pragma once

#include "vectors.h"

constexpr int N = MHC_STREAMS;
// Logits of a matrix that is made of weighted permutations, and of a Kronecker product: see manifolds.py.
constexpr int PERMUTATIONS = N == 2 ? 2 : N == 3 ? 6 : N == 4 ? 24 : 1;
constexpr int FACTORS = N == 2 ? 1 : N == 4 ? 2 : N == 8 ? 3 : 1;

// What is added where: see epsilons.py.
struct Epsilons {
    float pre;
    float first;
    float matrix;
    float sums;

    bool within() const { return first != 0.0f || matrix != 0.0f || sums != 0.0f; }
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
