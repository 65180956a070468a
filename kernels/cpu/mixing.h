// `post` of a tile, forward and backward (Eq. 3): X'_o = Σ_i res[o, i] X_i + post_o · branch.
#pragma once

#include "chunks.h"

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

namespace {

void mix_chunk(
    Chunk chunk, int64_t width, const Stored* streams, const Stored* branch, const float* post, const float* res,
    Stored* result, float* memory, float* branch_memory, float* result_memory
) {
    for (int64_t begin = 0; begin < width; begin += BLOCK) {
        const Channels channels(begin, width);
        const Source x = read_tile(streams, width, N, chunk.first, chunk.live, channels, memory);
        const Source b = read_tile(branch, width, 1, chunk.first, chunk.live, channels, branch_memory);
        const Target to = open_tile(result, width, N, chunk.first, channels, result_memory);
        mix(x, b, post + chunk.first * N, res + chunk.first * N * N, chunk.live, channels, to);
        write_tile(result, width, N, chunk.first, chunk.live, channels, to);
    }
}

// What `post` is differentiated with respect to, and its inputs.
struct MixGradient {
    int64_t width;
    const Stored* streams;
    const Stored* branch;
    const float* post;
    const float* res;
    Stored* grad_streams;
    Stored* grad_branch;
    float* grad_post;
    float* grad_res;

    static constexpr int64_t SCRATCH = 2 * STREAM_TILE + 2 * VALUE_TILE;

    void begin(Chunk chunk) const {
        memset(grad_post + chunk.first * N, 0, sizeof(float) * chunk.live * N);
        memset(grad_res + chunk.first * N * N, 0, sizeof(float) * chunk.live * N * N);
    }

    void block(Chunk chunk, Channels channels, Source grad, float* memory) const {
        float* result_memory = memory + STREAM_TILE;
        float* branch_memory = result_memory + STREAM_TILE;
        const int64_t first = chunk.first;
        const int live = chunk.live;
        const Source x = read_tile(streams, width, N, first, live, channels, memory);
        const Source b = read_tile(branch, width, 1, first, live, channels, branch_memory);
        const Target to = open_tile(grad_streams, width, N, first, channels, result_memory);
        const Target to_branch = open_tile(grad_branch, width, 1, first, channels, branch_memory + VALUE_TILE);
        // A token at a time: what both read of it is then in the first cache.
        for (int t = 0; t < live; t++) {
            const int64_t at = first + t;
            mix_products(grad.from(t), x.from(t), b.from(t), 1, channels, grad_post + at * N, grad_res + at * N * N);
            mix_backward(
                grad.from(t), post + at * N, res + at * N * N, 1, channels, to.from(t), to_branch.from(t));
        }
        write_tile(grad_streams, width, N, first, live, channels, to);
        write_tile(grad_branch, width, 1, first, live, channels, to_branch);
    }
};

}  // namespace
