// Rows of keys and values, compiled once per instruction set: loops that the compiler makes vectors of.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cachegen.h"

#if defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

namespace waterfill::WATERFILL_ISA {
namespace {

using cachegen::Component;
using cachegen::Pairs;

inline uint32_t bits_of(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}

inline float float_of(uint32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

// Half to float, subnormals by one multiplication.
inline float from_half(uint16_t h) {
    const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
    const float scaled = float_of(magnitude) * 5.192296858534828e33f;  // 2^112
    const uint32_t special = (h & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000u) : bits_of(scaled);
    return float_of(special | uint32_t(h & 0x8000) << 16);
}

inline uint16_t to_half(float x) {
    const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000;
    uint32_t m = b & 0x7fffffffu;
    if (m > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (m >= 0x477ff000u) return uint16_t(sign | 0x7c00);
    if (m < 0x38800000u) return uint16_t(sign | (bits_of(float_of(m) + 0.5f) - 0x3f000000u));  // 0.5 has halves' last place
    m += 0xc8000fffu + (m >> 13 & 1);
    return uint16_t(sign | m >> 13);
}

inline uint16_t to_bfloat(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t rounded = (b + 0x7fffu + (b >> 16 & 1)) >> 16;
    return uint16_t((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16 | 0x40) : rounded);
}

constexpr size_t kSide = cachegen::kTogether;

// Eight rows of eight words, in place, to eight columns.
typedef uint16_t Eight __attribute__((vector_size(16)));
inline Eight low_halves(Eight a, Eight b) { return __builtin_shuffle(a, b, Eight{0, 8, 1, 9, 2, 10, 3, 11}); }
inline Eight high_halves(Eight a, Eight b) { return __builtin_shuffle(a, b, Eight{4, 12, 5, 13, 6, 14, 7, 15}); }
inline void transpose(Eight x[8]) {
    Eight y[8];
#pragma GCC unroll 3
    for (int round = 0; round < 3; ++round) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) y[2 * i] = low_halves(x[i], x[i + 4]), y[2 * i + 1] = high_halves(x[i], x[i + 4]);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) x[i] = y[i];
    }
}
constexpr size_t kTile = 8;

template <class Convert> void gather_words(const void* const* rows, size_t count, size_t width, float* group, Convert convert) {
    for (size_t i = 0; i < width; i += kTile) {
        const size_t some = width - i < kTile ? width - i : kTile;
        for (size_t r = 0; r < kSide; r += kTile) {
            Eight x[kTile];
#pragma GCC unroll 8
            for (size_t s = 0; s < kTile; ++s) {
                x[s] = Eight{};
                if (r + s >= count) continue;
                const uint16_t* from = static_cast<const uint16_t*>(rows[r + s]) + i;
                if (some == kTile) std::memcpy(&x[s], from, sizeof(Eight));
                else std::memcpy(&x[s], from, 2 * some);
            }
            transpose(x);
#pragma GCC unroll 8
            for (size_t s = 0; s < kTile; ++s) {
                if (s >= some) break;
                uint16_t words[kTile];
                std::memcpy(words, &x[s], sizeof(Eight));
                for (size_t j = 0; j < kTile; ++j) group[(i + s) * kSide + r + j] = convert(words[j]);
            }
        }
    }
}

void gather_floats(const void* const* rows, size_t count, size_t width, float* group) {
    for (size_t r = 0; r < kSide; ++r)
        for (size_t i = 0; i < width; ++i) group[i * kSide + r] = r < count ? static_cast<const float*>(rows[r])[i] : 0.0f;
}

void gather(const void* const* rows, size_t count, Float format, size_t width, float* group) {
    if (format == Float::f32) gather_floats(rows, count, width, group);
    else if (format == Float::bf16) gather_words(rows, count, width, group, [](uint16_t w) { return float_of(uint32_t(w) << 16); });
    else gather_words(rows, count, width, group, [](uint16_t w) { return from_half(w); });
}

template <class Convert> void scatter_words(const float* group, size_t count, size_t width, void* const* rows, Convert convert) {
    for (size_t i = 0; i < width; i += kTile) {
        const size_t some = width - i < kTile ? width - i : kTile;
        alignas(64) uint16_t words[kTile][kSide] = {};
        for (size_t j = 0; j < some; ++j)
            for (size_t r = 0; r < kSide; ++r) words[j][r] = convert(group[(i + j) * kSide + r]);
        for (size_t r = 0; r < count; r += kTile) {
            Eight x[kTile];
#pragma GCC unroll 8
            for (size_t s = 0; s < kTile; ++s) std::memcpy(&x[s], &words[s][r], sizeof(Eight));
            transpose(x);
#pragma GCC unroll 8
            for (size_t s = 0; s < kTile; ++s)
                if (r + s < count) std::memcpy(static_cast<uint16_t*>(rows[r + s]) + i, &x[s], some == kTile ? sizeof(Eight) : 2 * some);
        }
    }
}

void scatter_floats(const float* group, size_t count, size_t width, void* const* rows) {
    for (size_t r = 0; r < count; ++r)
        for (size_t i = 0; i < width; ++i) static_cast<float*>(rows[r])[i] = group[i * kSide + r];
}

void scatter(const float* group, size_t count, Float format, size_t width, void* const* rows) {
    if (format == Float::f32) scatter_floats(group, count, width, rows);
    else if (format == Float::bf16) scatter_words(group, count, width, rows, [](float x) { return to_bfloat(x); });
    else scatter_words(group, count, width, rows, [](float x) { return to_half(x); });
}

template <class Convert> void gather_beside(const char* from, int64_t step, size_t width, float* __restrict group, Convert convert) {
    for (size_t i = 0; i < width; ++i, from += step, group += kSide) {
        uint16_t words[kSide];
        std::memcpy(words, from, sizeof(words));
        for (size_t r = 0; r < kSide; ++r) group[r] = convert(words[r]);
    }
}

// Numbers of two places as if of one. More is copied than counts, and overwritten by what follows, but
// never from beyond the last number.
template <size_t kBytes> void join_sides(const cachegen::Sides& from, size_t first, size_t width, char* to) {
    for (size_t i = 0; i + 1 < width; ++i, to += kBytes) {
        std::memcpy(to, from.a + int64_t(i) * from.a_step, kBytes);
        std::memcpy(to + first, from.b + int64_t(i) * from.b_step, kBytes);
    }
    std::memcpy(to, from.a + int64_t(width - 1) * from.a_step, first);
    std::memcpy(to + first, from.b + int64_t(width - 1) * from.b_step, kBytes - first);
}

void gather_sides(const cachegen::Sides& from, Float format, size_t width, char* spare, float* group) {
    const size_t size = format == Float::f32 ? 4 : 2;
    const char* at = from.a;
    int64_t step = from.a_step;
    if (from.n < kSide && width) {
        if (size == 4) join_sides<4 * kSide>(from, 4 * from.n, width, spare);
        else join_sides<2 * kSide>(from, 2 * from.n, width, spare);
        at = spare, step = int64_t(size * kSide);
    }
    if (format == Float::f32) for (size_t i = 0; i < width; ++i) std::memcpy(group + i * kSide, at + int64_t(i) * step, 4 * kSide);
    else if (format == Float::bf16) gather_beside(at, step, width, group, [](uint16_t w) { return float_of(uint32_t(w) << 16); });
    else gather_beside(at, step, width, group, [](uint16_t w) { return from_half(w); });
}

inline void copy_short(char* to, const char* from, size_t n) {
    for (; n >= 8; n -= 8, to += 8, from += 8) std::memcpy(to, from, 8);
    for (; n >= 2; n -= 2, to += 2, from += 2) std::memcpy(to, from, 2);
}

template <class Word, class Convert> void scatter_beside(const float* __restrict group, size_t width, const cachegen::Sides& to, Convert convert) {
    const size_t first = sizeof(Word) * to.n;
    char *a = to.a, *b = to.b;
    if (to.n == kSide) {
        for (size_t i = 0; i < width; ++i, a += to.a_step, group += kSide) {
            Word words[kSide];
            for (size_t r = 0; r < kSide; ++r) words[r] = convert(group[r]);
            std::memcpy(a, words, sizeof(words));
        }
        return;
    }
    // Some numbers first, then where they belong: what was only just written is slow to be read in other pieces.
    constexpr size_t kMany = 16;
    Word words[kMany][2 * kSide] = {};
    for (size_t done = 0; done < width; done += kMany) {
        const size_t some = std::min(kMany, width - done);
        for (size_t i = 0; i < some; ++i, group += kSide)
            for (size_t r = 0; r < kSide; ++r) words[i][r] = convert(group[r]);
        for (size_t i = 0; i < some; ++i, a += to.a_step, b += to.b_step) {
            const char* from = reinterpret_cast<const char*>(words[i]);
            copy_short(a, from, first);
            if (to.free) std::memcpy(b, from + first, sizeof(Word) * kSide);
            else copy_short(b, from + first, sizeof(Word) * kSide - first);
        }
    }
}

void scatter_sides(const float* group, Float format, size_t width, const cachegen::Sides& to) {
    if (format == Float::f32) scatter_beside<float>(group, width, to, [](float x) { return x; });
    else if (format == Float::bf16) scatter_beside<uint16_t>(group, width, to, [](float x) { return to_bfloat(x); });
    else scatter_beside<uint16_t>(group, width, to, [](float x) { return to_half(x); });
}

void add_angles(const cachegen::Angle& base, const cachegen::Angle& more, const double* frequencies, double position, size_t pairs, float* __restrict cos, float* __restrict sin) {
    for (size_t p = 0; p < pairs; ++p) {
        const double c = base.cos[p] * more.cos[p] - base.sin[p] * more.sin[p], s = base.cos[p] * more.sin[p] + base.sin[p] * more.cos[p];
        const double missing = position * frequencies[p] - base.angle[p] - more.angle[p];
        cos[p] = float(c - missing * s);
        sin[p] = float(s + c * missing);
    }
}

void turn_group(float* group, const Pairs& pairs, const float* cos, const float* sin) {
    for (size_t p = 0; p < pairs.count; ++p, cos += kSide, sin += kSide) {
        float *__restrict a = group + size_t(pairs.first[p]) * kSide, *__restrict b = group + size_t(pairs.second[p]) * kSide;
        for (size_t r = 0; r < kSide; ++r) {
            const float u = a[r], v = b[r];
            a[r] = u * cos[r] - v * sin[r];
            b[r] = u * sin[r] + v * cos[r];
        }
    }
}

#if defined(WATERFILL_ISA_avx512)
constexpr size_t kLanes = 16;
#elif defined(WATERFILL_ISA_avx2)
constexpr size_t kLanes = 8;
#else
constexpr size_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

inline Lanes load_lanes(const float* at) {
    Lanes x;
    std::memcpy(&x, at, sizeof(x));
    return x;
}

// kMany numbers at a time, so that sums stay in registers and do not wait for each other.
template <size_t kMany> void transform_some(const float* from, size_t n, const float* matrix, const float* start, float* to) {
    for (size_t r = 0; r < kSide; r += 2 * kLanes) {
        Lanes sum[kMany][2];
#pragma GCC unroll 8
        for (size_t j = 0; j < kMany; ++j) sum[j][0] = sum[j][1] = (start ? start[j] : 0.0f) - Lanes{};
        const float* at = from + r;
        for (size_t i = 0; i < n; ++i, at += kSide) {
            const Lanes x = load_lanes(at), y = load_lanes(at + kLanes);
#pragma GCC unroll 8
            for (size_t j = 0; j < kMany; ++j) {
                const float c = matrix[j * n + i];
                sum[j][0] += c * x;
                sum[j][1] += c * y;
            }
        }
#pragma GCC unroll 8
        for (size_t j = 0; j < kMany; ++j) {
            std::memcpy(to + j * kSide + r, &sum[j][0], sizeof(Lanes));
            std::memcpy(to + j * kSide + r + kLanes, &sum[j][1], sizeof(Lanes));
        }
    }
}

void transform(const float* from, size_t n, const float* matrix, const float* start, size_t m, float* to) {
    constexpr size_t kMany = 4;
    size_t j = 0;
    for (; j + kMany <= m; j += kMany) transform_some<kMany>(from, n, matrix + j * n, start ? start + j : nullptr, to + j * kSide);
    const float *rest = matrix + j * n, *first = start ? start + j : nullptr;
    if (m - j == 3) transform_some<3>(from, n, rest, first, to + j * kSide);
    else if (m - j == 2) transform_some<2>(from, n, rest, first, to + j * kSide);
    else if (m - j == 1) transform_some<1>(from, n, rest, first, to + j * kSide);
}

template <size_t kTogether> int quantise_groups(const float* __restrict z, size_t tokens, const Component& c, float inverse, int32_t* __restrict high, uint8_t* __restrict symbols, uint8_t* __restrict low) {
    const size_t stride = c.stride;
    const float offset = c.offset;
    const int32_t half = (1 << c.shift) >> 1, mask = (1 << c.shift) - 1, first = c.first, last = c.last;
    const int shift = int(c.shift);
    int other = 0, far = 0;
    for (size_t g = 0; g < tokens / kTogether; ++g, z += kTogether, high += kTogether, symbols += stride) {
        int32_t ks[kTogether];
        for (size_t i = 0; i < kTogether; ++i) {
            const float steps = std::nearbyint((z[i] - offset) * inverse);
            const bool fits = std::fabs(steps) < cachegen::kReach;
            far |= !fits;
            const int32_t k = (fits ? int32_t(steps) : 0) + half;
            const int32_t up = (k >> shift) + cachegen::kMiddle;
            const int32_t near = up < first ? first : up > last ? last : up;
            ks[i] = k;
            high[i] = up;
            symbols[i] = uint8_t(near);
            other |= near != up;
        }
        if (low) {
            for (size_t i = 0; i < kTogether; ++i) low[i] = uint8_t(ks[i] & mask);
            low += stride;
        }
    }
    return other | far << 1;
}

int quantise(const float* z, size_t tokens, const Component& c, float inverse, int32_t* high, uint8_t* symbols, uint8_t* low) {
    if (c.together == cachegen::kTogether) return quantise_groups<cachegen::kTogether>(z, tokens, c, inverse, high, symbols, low);
    return quantise_groups<1>(z, tokens, c, inverse, high, symbols, low);
}

// What `quantise` finds of 32 tokens that lie side by side, but for what their nearest symbols are from.
#if defined(WATERFILL_ISA_avx512)
inline bool quantise_side(const float* z, const Component& c, float inverse, uint8_t* symbols, uint8_t* low) {
    const __m512 offset = _mm512_set1_ps(c.offset), times = _mm512_set1_ps(inverse);
    const __m512i half = _mm512_set1_epi32((1 << c.shift) >> 1), mask = _mm512_set1_epi32((1 << c.shift) - 1), middle = _mm512_set1_epi32(cachegen::kMiddle);
    const __m512i first = _mm512_set1_epi32(c.first - cachegen::kMiddle), last = _mm512_set1_epi32(c.last - cachegen::kMiddle), shift = _mm512_set1_epi32(int(c.shift));
    unsigned other = 0;
    for (size_t i = 0; i < kSide; i += 16) {
        // To nearest, ties to even; what is no number or too large becomes the least integer, which has no symbol.
        const __m512i k = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(z + i), offset), times)), half);
        const __m512i up = _mm512_srav_epi32(k, shift), near = _mm512_min_epi32(_mm512_max_epi32(up, first), last);
        other |= _mm512_cmpneq_epi32_mask(up, near);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(near, middle)));
        if (low) _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(_mm512_and_si512(k, mask)));
    }
    return other != 0;
}
#else
inline bool quantise_side(const float* z, const Component& c, float inverse, uint8_t* symbols, uint8_t* low) {
    int32_t high[kSide];
    return quantise_groups<kSide>(z, kSide, c, inverse, high, symbols, low) != 0;
}
#endif

bool quantise_sides(const float* z, const Component* components, size_t n, float inverse, uint8_t* to, const int64_t* columns, const int64_t* lows, bool* others) {
    bool any = false;
    for (size_t i = 0; i < n; ++i) {
        others[i] = quantise_side(z + i * kSide, components[i], inverse, to + columns[i], lows[i] < 0 ? nullptr : to + lows[i]);
        any |= others[i];
    }
    return any;
}

template <size_t kTogether> void dequantise_groups(const uint8_t* __restrict symbols, const uint8_t* __restrict low, size_t tokens, const Component& c, float step, float* __restrict z) {
    const size_t stride = c.stride;
    const float scale = float(1 << c.shift), half = low ? 0.5f * scale : 0.0f, pull = c.pull;
    for (size_t g = 0; g < tokens / kTogether; ++g, z += kTogether, symbols += stride) {
        for (size_t i = 0; i < kTogether; ++i) z[i] = float(int(symbols[i]) - cachegen::kMiddle) * scale - half;
        if (low) {
            for (size_t i = 0; i < kTogether; ++i) z[i] += float(low[i]);
            low += stride;
        }
        for (size_t i = 0; i < kTogether; ++i) {
            // Taken before it is known whether it counts: a jump for each sign would be a coin toss.
            const float k = z[i], towards = std::copysign(pull, k);
            z[i] = (k - (k == 0.0f ? 0.0f : towards)) * step;
        }
    }
}

void dequantise(const uint8_t* symbols, const uint8_t* low, size_t tokens, const Component& c, float step, float* z) {
    if (c.together == cachegen::kTogether) dequantise_groups<cachegen::kTogether>(symbols, low, tokens, c, step, z);
    else dequantise_groups<1>(symbols, low, tokens, c, step, z);
}

}  // namespace

const cachegen::Kernels& cachegen_kernels() {
    static constexpr cachegen::Kernels kernels{gather, scatter, gather_sides, scatter_sides, add_angles, turn_group, transform, quantise, quantise_sides, dequantise};
    return kernels;
}

}  // namespace waterfill::WATERFILL_ISA
