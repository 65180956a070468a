// The operators on a CPU, forward and backward, for MHC_STREAMS streams stored as MHC_DTYPE.
//
// Everything is dense and row-major, but for phi and its gradient, which may be columns first: streams [tokens, n,
// width], branch and layer_input [tokens, width], post [tokens, n], res [tokens, n, n], phi [rows, n · width].
// Coefficients and parameters are float32. A function returns 0, or 1 where there was no memory. Results do not depend
// on the number of threads: each token, and each panel of phi's gradient, is one thread's work.
#include "mixing.h"
#include "site.h"

extern "C" {

int mhc_sinkhorn(const float* logits, float* res, int64_t tokens, int iters, Epsilons eps, int threads) {
    return !in_parallel(chunks_of(tokens), threads, 0, [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        alignas(64) Lane lanes[N * N];
        transpose_in<N * N>(logits + chunk.first * N * N, chunk.live, lanes);
        for (int lane = 0; lane < CHUNK; lane += LANES) {
            Vector matrix[N][N];
            for (int entry = 0; entry < N * N; entry++) matrix[entry / N][entry % N] = load(lanes[entry] + lane);
            sinkhorn(matrix, iters, eps, nullptr);
            for (int entry = 0; entry < N * N; entry++) store(lanes[entry] + lane, matrix[entry / N][entry % N]);
        }
        transpose_out<N * N>(lanes, chunk.live, res + chunk.first * N * N);
    });
}

int mhc_sinkhorn_backward(
    const float* grad_res, const float* logits, float* grad_logits, int64_t tokens, int iters, Epsilons eps, int threads
) {
    return !in_parallel(chunks_of(tokens), threads, history_size(iters), [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        float* history = scratch.take(history_size(iters));
        alignas(64) Lane lanes[N * N], slopes[N * N];
        transpose_in<N * N>(logits + chunk.first * N * N, chunk.live, lanes);
        transpose_in<N * N>(grad_res + chunk.first * N * N, chunk.live, slopes);
        for (int lane = 0; lane < CHUNK; lane += LANES) {
            Vector matrix[N][N], grad[N][N];
            for (int entry = 0; entry < N * N; entry++) {
                matrix[entry / N][entry % N] = load(lanes[entry] + lane);
                grad[entry / N][entry % N] = load(slopes[entry] + lane);
            }
            sinkhorn_backward(grad, matrix, iters, eps, history);
            for (int entry = 0; entry < N * N; entry++) store(slopes[entry] + lane, grad[entry / N][entry % N]);
        }
        transpose_out<N * N>(slopes, chunk.live, grad_logits + chunk.first * N * N);
    });
}

// Without `layer_input` as far as the coefficients.
int mhc_pre(
    const Stored* streams, const float* phi, const float* scale, const float* bias, Stored* layer_input, float* post,
    float* res, float* projection, int64_t tokens, int64_t width, int iters, float norm_eps, Epsilons eps, int flags,
    int threads
) {
    Site site = site_of(streams, scale, bias, tokens, width, iters, norm_eps, eps, flags);
    const Buffer panels(site.phi.size());
    if (!panels.get() || !pack(site, phi, panels.get(), threads)) return 1;
    return !in_parallel(chunks_of(tokens), threads, STREAM_TILE + VALUE_TILE, [&](int64_t index) {
        site.forward(chunk_at(index, tokens), layer_input, post, res, projection);
    });
}

int mhc_collapse(
    const Stored* streams, const float* scale, const float* bias, const float* projection, Stored* layer_input,
    int64_t tokens, int64_t width, int iters, float norm_eps, Epsilons eps, int flags, int threads
) {
    const Site site = site_of(streams, scale, bias, tokens, width, iters, norm_eps, eps, flags);
    return !in_parallel(chunks_of(tokens), threads, STREAM_TILE + VALUE_TILE, [&](int64_t index) {
        site.collapse_measured(chunk_at(index, tokens), projection, layer_input);
    });
}

int mhc_pre_backward(
    const Stored* grad_layer_input, const float* grad_post, const float* grad_res, const Stored* streams,
    const float* phi, const float* scale, const float* bias, const float* projection, Stored* grad_streams,
    float* grad_phi, float* grad_scale, float* grad_bias, int64_t tokens, int64_t width, int iters, float norm_eps,
    Epsilons eps, int flags, int threads
) {
    Site site = site_of(streams, scale, bias, tokens, width, iters, norm_eps, eps, flags);
    const Buffer panels(site.phi.size()), rows(MappingGradient::rows_size(site)), sums(MappingGradient::sums_size(site));
    if (!panels.get() || !rows.get() || !sums.get() || !pack(site, phi, panels.get(), threads)) return 1;
    const MappingGradient result{rows.get(), sums.get(), grad_phi, grad_scale, grad_bias};
    const int64_t floats = BACKWARD_SCRATCH + history_size(iters);
    const bool done = in_parallel(chunks_of(tokens), threads, floats, [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        float* memory = scratch.take(STREAM_TILE);
        backward_chunk(
            site, chunk, grad_layer_input, grad_post, grad_res, projection, result,
            [](Channels) { return Source{}; },
            [&](Chunk part, Channels channels) {
                return open_tile(grad_streams, width, N, part.first, channels, memory);
            },
            [&](Chunk part, Channels channels, Target to) {
                write_tile(grad_streams, width, N, part.first, part.live, channels, to);
            });
    });
    return !(done && finish_backward(site, result, threads));
}

int mhc_post(
    const Stored* streams, const Stored* branch, const float* post, const float* res, Stored* result, int64_t tokens,
    int64_t width, int threads
) {
    return !in_parallel(chunks_of(tokens), threads, 2 * STREAM_TILE + VALUE_TILE, [&](int64_t index) {
        float* memory = scratch.take(STREAM_TILE);
        float* result_memory = scratch.take(STREAM_TILE);
        float* branch_memory = scratch.take(VALUE_TILE);
        mix_chunk(
            chunk_at(index, tokens), width, streams, branch, post, res, result, memory, branch_memory, result_memory);
    });
}

int mhc_post_backward(
    const Stored* grad, const Stored* streams, const Stored* branch, const float* post, const float* res,
    Stored* grad_streams, Stored* grad_branch, float* grad_post, float* grad_res, int64_t tokens, int64_t width,
    int threads
) {
    const MixGradient mixing{width, streams, branch, post, res, grad_streams, grad_branch, grad_post, grad_res};
    return !in_parallel(chunks_of(tokens), threads, STREAM_TILE + MixGradient::SCRATCH, [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        float* grad_memory = scratch.take(STREAM_TILE);
        float* memory = scratch.take(MixGradient::SCRATCH);
        mixing.begin(chunk);
        for (int64_t begin = 0; begin < width; begin += BLOCK) {
            const Channels channels(begin, width);
            const Source g = read_tile(grad, width, N, chunk.first, chunk.live, channels, grad_memory);
            mixing.block(chunk, channels, g, memory);
        }
    });
}

// Without `layer_input` as far as the coefficients.
int mhc_post_pre(
    const Stored* streams, const Stored* branch, const float* post, const float* res, const float* phi,
    const float* scale, const float* bias, Stored* fresh, Stored* layer_input, float* next_post, float* next_res,
    float* projection, int64_t tokens, int64_t width, int iters, float norm_eps, Epsilons eps, int flags, int threads
) {
    // The next site reads the new streams as they are stored, rounded.
    Site site = site_of(fresh, scale, bias, tokens, width, iters, norm_eps, eps, flags);
    const Buffer panels(site.phi.size());
    if (!panels.get() || !pack(site, phi, panels.get(), threads)) return 1;
    const int64_t floats = 2 * STREAM_TILE + VALUE_TILE;
    return !in_parallel(chunks_of(tokens), threads, floats, [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        float* memory = scratch.take(STREAM_TILE);
        float* result_memory = scratch.take(STREAM_TILE);
        float* branch_memory = scratch.take(VALUE_TILE);
        mix_chunk(chunk, width, streams, branch, post, res, fresh, memory, branch_memory, result_memory);
        scratch.reset(0);
        site.forward(chunk, layer_input, next_post, next_res, projection);
    });
}

int mhc_post_collapse(
    const Stored* streams, const Stored* branch, const float* post, const float* res, const float* scale,
    const float* bias, const float* projection, Stored* fresh, Stored* layer_input, int64_t tokens, int64_t width,
    int iters, float norm_eps, Epsilons eps, int flags, int threads
) {
    const Site site = site_of(fresh, scale, bias, tokens, width, iters, norm_eps, eps, flags);
    return !in_parallel(chunks_of(tokens), threads, 2 * STREAM_TILE + VALUE_TILE, [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        float* memory = scratch.take(STREAM_TILE);
        float* result_memory = scratch.take(STREAM_TILE);
        float* branch_memory = scratch.take(VALUE_TILE);
        mix_chunk(chunk, width, streams, branch, post, res, fresh, memory, branch_memory, result_memory);
        scratch.reset(0);
        site.collapse_measured(chunk, projection, layer_input);
    });
}

// `fresh` [tokens, n, width] is written: the new streams once more.
int mhc_post_pre_backward(
    const Stored* grad_fresh, const Stored* grad_layer_input, const float* grad_next_post, const float* grad_next_res,
    const Stored* streams, const Stored* branch, const float* post, const float* res, const float* phi,
    const float* scale, const float* bias, const float* projection, Stored* fresh, Stored* grad_streams,
    Stored* grad_branch, float* grad_post, float* grad_res, float* grad_phi, float* grad_scale, float* grad_bias, int64_t tokens, int64_t width, int iters,
    float norm_eps, Epsilons eps, int flags, int threads
) {
    Site site = site_of(fresh, scale, bias, tokens, width, iters, norm_eps, eps, flags);
    const Buffer panels(site.phi.size()), rows(MappingGradient::rows_size(site)), sums(MappingGradient::sums_size(site));
    if (!panels.get() || !rows.get() || !sums.get() || !pack(site, phi, panels.get(), threads)) return 1;
    const MappingGradient result{rows.get(), sums.get(), grad_phi, grad_scale, grad_bias};
    const MixGradient mixing{width, streams, branch, post, res, grad_streams, grad_branch, grad_post, grad_res};
    const int64_t floats = 2 * STREAM_TILE + MixGradient::SCRATCH + BACKWARD_SCRATCH + history_size(iters);
    const bool done = in_parallel(chunks_of(tokens), threads, floats, [&](int64_t index) {
        const Chunk chunk = chunk_at(index, tokens);
        float* through = scratch.take(STREAM_TILE);
        float* more_memory = scratch.take(STREAM_TILE);
        float* memory = scratch.take(MixGradient::SCRATCH);
        mix_chunk(
            chunk, width, streams, branch, post, res, fresh, memory, memory + 2 * STREAM_TILE, memory + STREAM_TILE);
        mixing.begin(chunk);
        backward_chunk(
            site, chunk, grad_layer_input, grad_next_post, grad_next_res, projection, result,
            [&](Channels channels) {
                return read_tile(grad_fresh, width, N, chunk.first, chunk.live, channels, more_memory);
            },
            [&](Chunk, Channels channels) { return scratch_tile(through, channels, N); },
            [&](Chunk part, Channels channels, Target to) {
                mixing.block(part, channels, Source{to.at, to.token, to.stream}, memory);
            });
    });
    return !(done && finish_backward(site, result, threads));
}

}  // extern "C"
