// Streams a tile at a time: a chunk of tokens and a block of channels, as float32.
//
// Streams of float32 whose width fills vectors are read and written where they lie; others pass through scratch of one
// tile, which stays in the second cache. Behind the channels scratch is padded with zeros.
#pragma once

#include <cstdlib>
#include <memory>

#include "coefficients.h"

constexpr int PANEL = 64;                                                    // channels of a panel of phi
constexpr int BLOCK = 4096 / N / PANEL * PANEL;                              // most channels of a tile
constexpr int ROWS = 3;                                                      // rows of phi that are multiplied at once
constexpr int TOKENS = LANES == 16 ? 8 : 4;                                  // tokens that are multiplied at once
constexpr int MOST_PADDED = (MOST_ROWS + ROWS - 1) / ROWS * ROWS;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Channels {
    int64_t begin;
    int count;
    int padded;

    Channels(int64_t begin, int64_t width)
        : begin(begin), count(int(width - begin < BLOCK ? width - begin : BLOCK)),
          padded(int(ceil_div(count, 16) * 16)) {}
    bool in_place() const { return MHC_DTYPE == 0 && count == padded; }
};

// Float32 values at [token][stream][channel].
template <class Value>
struct Tile {
    Value* at;
    int64_t token;
    int64_t stream;

    Value* row(int t, int s = 0) const { return at + t * token + s * stream; }
    Tile from(int t) const { return {row(t), token, stream}; }
};
typedef Tile<const float> Source;
typedef Tile<float> Target;

static inline Target scratch_tile(float* scratch, Channels channels, int streams) {
    return {scratch, int64_t(streams) * channels.padded, channels.padded};
}

// View channels of `live` tokens from `first` on of [tokens, streams, width].
static inline Source read_tile(
    const Stored* from, int64_t width, int streams, int64_t first, int live, Channels channels, float* scratch
) {
    const Stored* begin = from + first * streams * width + channels.begin;
    if (channels.in_place()) return {reinterpret_cast<const float*>(begin), streams * width, width};
    const Target tile = scratch_tile(scratch, channels, streams);
    for (int t = 0; t < live; t++)
        for (int s = 0; s < streams; s++) {
            float* row = tile.row(t, s);
            widen(row, begin + (int64_t(t) * streams + s) * width, channels.count);
            for (int c = channels.count; c < channels.padded; c++) row[c] = 0.0f;
        }
    return {tile.at, tile.token, tile.stream};
}

// Where channels of [tokens, streams, width] are to be written; `write_tile` brings them there.
static inline Target open_tile(
    Stored* to, int64_t width, int streams, int64_t first, Channels channels, float* scratch
) {
    if (!channels.in_place()) return scratch_tile(scratch, channels, streams);
    Stored* begin = to + first * streams * width + channels.begin;
    return {reinterpret_cast<float*>(begin), streams * width, width};
}

static inline void write_tile(
    Stored* to, int64_t width, int streams, int64_t first, int live, Channels channels, Target tile
) {
    if (channels.in_place()) return;
    Stored* begin = to + first * streams * width + channels.begin;
    for (int t = 0; t < live; t++)
        for (int s = 0; s < streams; s++)
            narrow(begin + (int64_t(t) * streams + s) * width, tile.row(t, s), channels.count);
}

// Memory of one thread, kept from call to call.
class Scratch {
  public:
    float* take(int64_t floats) {
        float* result = begin_ + used_;
        used_ += ceil_div(floats, 16) * 16;
        return result;
    }

    // Make room for what is taken next; false if there is none.
    bool reset(int64_t floats) {
        used_ = 0;
        floats += 1024;
        if (floats > size_) {
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, ceil_div(floats, 16) * 64)));
            size_ = memory_ ? floats : 0;
            begin_ = memory_.get();
        }
        return begin_ != nullptr;
    }

  private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    float* begin_ = nullptr;
    int64_t size_ = 0;
    int64_t used_ = 0;
};

constexpr int64_t STREAM_TILE = int64_t(CHUNK) * N * BLOCK;
constexpr int64_t VALUE_TILE = int64_t(CHUNK) * BLOCK;
