// Vectors of float32 as wide as the machine's registers, their exp and log, and streams of any dtype to and from them.
//
// GCC's and Clang's vector extensions, so that one text serves every instruction set. The compiler is told
// MHC_DTYPE: 0 float32, 1 bfloat16, 2 float16.
#pragma once

#include <cstdint>
#include <cstring>

#if MHC_DTYPE == 2 && defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4), may_alias));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
static inline Vector all(float value) { return value - Vector{}; }
static inline Vector larger(Vector a, Vector b) { return a < b ? b : a; }

// A value that several operations use is loaded once: compilers would fold the load into each.
static inline Vector in_register(Vector value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX__)
    asm("" : "+x"(value));
#endif
    return value;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Integers){__VA_ARGS__})
#endif

// Add the sums of four vectors' lanes to four floats: each step adds halves and packs two vectors into one.
static inline void add_four_totals(Vector a, Vector b, Vector c, Vector d, float* to) {
#if defined(__AVX512F__)
    const Vector ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                      SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const Vector cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                      SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Vector abcd = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    abcd += SHUFFLE(abcd, abcd, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    abcd += SHUFFLE(abcd, abcd, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    const Vector sums = SHUFFLE(abcd, abcd, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#elif defined(__AVX__)
    Vector ab = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    Vector cd = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    ab += SHUFFLE(ab, ab, 2, 3, 0, 1, 6, 7, 4, 5);
    cd += SHUFFLE(cd, cd, 2, 3, 0, 1, 6, 7, 4, 5);
    ab += SHUFFLE(ab, ab, 1, 0, 3, 2, 5, 4, 7, 6);
    cd += SHUFFLE(cd, cd, 1, 0, 3, 2, 5, 4, 7, 6);
    const Vector sums = SHUFFLE(ab, cd, 0, 4, 8, 12, 0, 4, 8, 12);
#else
    const Vector ab = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
    const Vector cd = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
    const Vector sums = SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
#endif
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    Four four;
    memcpy(&four, &sums, sizeof four);
    *reinterpret_cast<Four*>(to) += four;
}

static inline float total(Vector value) {
    float four[4] = {};
    add_four_totals(value, Vector{}, Vector{}, Vector{}, four);
    return four[0];
}

// Add the sums of `count` vectors' lanes to as many floats.
static inline void add_totals(const Vector* values, int count, float* to) {
    int index = 0;
    for (; index + 4 <= count; index += 4)
        add_four_totals(values[index], values[index + 1], values[index + 2], values[index + 3], to + index);
    for (; index < count; index++) to[index] += total(values[index]);
}

static inline Vector square_root(Vector value) {
    for (int lane = 0; lane < LANES; lane++) value[lane] = __builtin_sqrtf(value[lane]);
    return value;
}

// exp within an ulp; 0 below the normal range, infinity above it.
static inline Vector exponential(Vector x) {
    const float least = -87.33654f, most = 88.72283f, magic = 12582912.0f;
    Vector inside = x < least ? all(least) : x;
    inside = inside > most ? all(most) : inside;
    // Adding and taking away 1.5 · 2²³ rounds to an integer.
    const Vector count = (inside * 1.44269504f + magic) - magic;
    Vector rest = inside - count * 0.693359375f;
    rest = rest + count * 2.12194440e-4f;
    Vector sum = all(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.0f;
    // Two factors: 2^128 alone is no float.
    const Integers exponent = __builtin_convertvector(count, Integers);
    const Integers half = exponent >> 1;
    const Vector first = (Vector)((half + 127) << 23), second = (Vector)((exponent - half + 127) << 23);
    const Vector result = sum * first * second;
    return x < least ? Vector{} : x > most ? all(__builtin_inff()) : result;
}

// Natural logarithm within an ulp, of positive normal numbers.
static inline Vector logarithm(Vector x) {
    // x = m · 2^e with m in [√½, √2).
    const Integers bits = (Integers)x - 0x3f3504f3;
    const Integers exponent = bits >> 23;
    const Vector mantissa = (Vector)((bits & 0x007fffff) + 0x3f3504f3);
    const Vector rest = mantissa - 1.0f, square = rest * rest;
    Vector sum = all(7.0376836292e-2f);
    sum = sum * rest - 1.1514610310e-1f;
    sum = sum * rest + 1.1676998740e-1f;
    sum = sum * rest - 1.2420140846e-1f;
    sum = sum * rest + 1.4249322787e-1f;
    sum = sum * rest - 1.6668057665e-1f;
    sum = sum * rest + 2.0000714765e-1f;
    sum = sum * rest - 2.4999993993e-1f;
    sum = sum * rest + 3.3333331174e-1f;
    const Vector count = __builtin_convertvector(exponent, Vector);
    Vector result = sum * rest * square;
    result = result - count * 2.12194440e-4f;
    result = result - 0.5f * square + rest + count * 0.693359375f;
    // The bits of a NaN are no number's: let it through.
    return result + (x - x);
}

static inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

#if MHC_DTYPE == 0
typedef float Stored;
#else
typedef uint16_t Stored;
#endif

#if MHC_DTYPE == 1
static inline float wide(Stored value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline Stored rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return Stored(value != value ? 0x7fc0 : nearest);
}
#elif MHC_DTYPE == 2
static inline float wide(Stored value) {
    _Float16 half;
    memcpy(&half, &value, 2);
    return float(half);
}

static inline Stored rounded(float value) {
    const _Float16 half = _Float16(value);
    Stored bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#endif

// Copy `count` stored values to float32.
static inline void widen(float* __restrict to, const Stored* __restrict from, int64_t count) {
#if MHC_DTYPE == 0
    memcpy(to, from, count * 4);
#else
    int64_t index = 0;
#if MHC_DTYPE == 2 && defined(__F16C__)
    for (; index + 8 <= count; index += 8)
        _mm256_storeu_ps(to + index, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + index))));
#endif
    for (; index < count; index++) to[index] = wide(from[index]);
#endif
}

// Copy `count` float32 values to the stored dtype, rounding to nearest, ties to even.
static inline void narrow(Stored* __restrict to, const float* __restrict from, int64_t count) {
#if MHC_DTYPE == 0
    memcpy(to, from, count * 4);
#else
    int64_t index = 0;
#if MHC_DTYPE == 2 && defined(__F16C__)
    for (; index + 8 <= count; index += 8)
        _mm_storeu_si128((__m128i*)(to + index), _mm256_cvtps_ph(_mm256_loadu_ps(from + index), 0));
#endif
    for (; index < count; index++) to[index] = rounded(from[index]);
#endif
}
