// `post` of a tile, forward and backward (Eq. 3): X'_o = Σ_i res[o, i] X_i + post_o · branch.
#pragma once

#include "tiles.h"

static void mix(
    Source streams, Source branch, const float* post, const float* res, int live, Channels channels, Target result
) {
    for (int token = 0; token < live; token++, post += N, res += N * N) {
        const float* x = streams.row(token);
        const float* b = branch.row(token);
        float* to = result.row(token);
        Vector mixing[N][N], writing[N];
        for (int out = 0; out < N; out++) {
            writing[out] = all(post[out]);
            for (int in = 0; in < N; in++) mixing[out][in] = all(res[out * N + in]);
        }
        for (int c = 0; c < channels.padded; c += LANES) {
            Vector value[N];
#pragma GCC unroll 8
            for (int in = 0; in < N; in++) value[in] = load(x + in * streams.stream + c);
            const Vector written = load(b + c);
#pragma GCC unroll 8
            for (int out = 0; out < N; out++) {
                Vector sum = writing[out] * written;
#pragma GCC unroll 8
                for (int in = 0; in < N; in++) sum += mixing[out][in] * value[in];
                store(to + out * result.stream + c, sum);
            }
        }
    }
}

// Gradients of the streams and the branch of a tile.
static void mix_backward(
    Source grad, const float* post, const float* res, int live, Channels channels, Target grad_streams,
    Target grad_branch
) {
    for (int token = 0; token < live; token++, post += N, res += N * N) {
        const float* g = grad.row(token);
        float* to = grad_streams.row(token);
        float* to_branch = grad_branch.row(token);
        Vector mixing[N][N], writing[N];
        for (int out = 0; out < N; out++) {
            writing[out] = all(post[out]);
            for (int in = 0; in < N; in++) mixing[out][in] = all(res[out * N + in]);
        }
        for (int c = 0; c < channels.padded; c += LANES) {
            Vector slope[N];
#pragma GCC unroll 8
            for (int out = 0; out < N; out++) slope[out] = load(g + out * grad.stream + c);
            Vector sum = writing[0] * slope[0];
#pragma GCC unroll 8
            for (int out = 1; out < N; out++) sum += writing[out] * slope[out];
            store(to_branch + c, sum);
#pragma GCC unroll 8
            for (int in = 0; in < N; in++) {
                Vector mixed = mixing[0][in] * slope[0];
#pragma GCC unroll 8
                for (int out = 1; out < N; out++) mixed += mixing[out][in] * slope[out];
                store(to + in * grad_streams.stream + c, mixed);
            }
        }
    }
}

// Add a tile's share to the gradients of post and res, [tokens, n] and [tokens, n, n].
static void mix_products(
    Source grad, Source streams, Source branch, int live, Channels channels, float* post, float* res
) {
    // As many outputs at once as registers hold.
    constexpr int OUTPUTS = LANES < 16 || N > 4 ? (N % 2 ? 1 : 2) : N;
    for (int token = 0; token < live; token++, post += N, res += N * N) {
        const float* x = streams.row(token);
        const float* b = branch.row(token);
        for (int first = 0; first < N; first += OUTPUTS) {
            const float* g = grad.row(token, first);
            Vector mixing[OUTPUTS][N] = {}, writing[OUTPUTS] = {};
            for (int c = 0; c < channels.padded; c += LANES) {
                Vector slope[OUTPUTS];
#pragma GCC unroll 8
                for (int out = 0; out < OUTPUTS; out++) slope[out] = load(g + out * grad.stream + c);
                const Vector written = load(b + c);
#pragma GCC unroll 8
                for (int out = 0; out < OUTPUTS; out++) writing[out] += slope[out] * written;
#pragma GCC unroll 8
                for (int in = 0; in < N; in++) {
                    const Vector value = load(x + in * streams.stream + c);
#pragma GCC unroll 8
                    for (int out = 0; out < OUTPUTS; out++) mixing[out][in] += slope[out] * value;
                }
            }
            add_totals(writing, OUTPUTS, post + first);
            add_totals(&mixing[0][0], OUTPUTS * N, res + first * N);
        }
    }
}
