// The operators on a CPU, forward and backward, for MHC_STREAMS streams stored as MHC_DTYPE.
//
// Everything is dense and row-major, but for phi and its gradient, which may be columns first: streams [tokens, n, width], branch and layer_input [tokens, width], post
// [tokens, n], res [tokens, n, n], phi [rows, n · width]. Coefficients and parameters are float32. A function returns
// 0, or 1 where there was no memory. Results do not depend on the number of threads: each token, and each panel of
// phi's gradient, is one thread's work.
#include "mixing.h"
#include "projection.h"

namespace {

thread_local Scratch scratch;

// A buffer of a call, shared by its threads.
class Buffer {
  public:
    explicit Buffer(int64_t floats) : memory_(static_cast<float*>(std::aligned_alloc(64, ceil_div(floats + 1, 16) * 64))) {}
    ~Buffer() { std::free(memory_); }
    Buffer(const Buffer&) = delete;
    float* get() const { return memory_; }

  private:
    float* memory_;
};

// Run `work(index)` for each index, on `threads` threads; `floats` of scratch each.
template <class Work>
bool in_parallel(int64_t count, int threads, int64_t floats, Work work) {
    if (count == 0) return true;
    bool failed = false;
    if (threads > count) threads = int(count);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const bool room = scratch.reset(floats);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < count; index++) {
            if (!room) {
#pragma omp atomic write
                failed = true;
                continue;
            }
            scratch.reset(0);
            work(index);
        }
    }
    return !failed;
}

// Consecutive tokens, at most CHUNK.
struct Chunk {
    int64_t first;
    int live;

    Chunk part(int begin, int most) const { return {first + begin, live - begin < most ? live - begin : most}; }
};

Chunk chunk_at(int64_t index, int64_t tokens) {
    const int64_t first = index * CHUNK;
    return {first, int(tokens - first < CHUNK ? tokens - first : CHUNK)};
}

int64_t chunks_of(int64_t tokens) { return ceil_div(tokens, CHUNK); }

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
