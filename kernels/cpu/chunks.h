// Chunks of tokens on the threads of a call, and the memory that they work in.
#pragma once

#include "tiles.h"

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

}  // namespace
