// The fast Walsh-Hadamard transform (Yates 1937; Fino and Algazi 1976), compiled once per
// instruction set: butterflies x + y, x - y of numbers 1, 2, 4, ... apart, always in that order and
// after the scale, so that every instruction set gives the same bits.
//
// As many butterflies as fit are made in registers between a load and a store: first those inside
// a tile of kTile numbers, then kRadix numbers far apart at a time.
#include <algorithm>
#include <cstring>
#include <utility>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "hadamard.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace hadamard;

#if defined(WATERFILL_ISA_avx512)
constexpr size_t kWidth = 16, kRegisters = 16, kRadix = 16;
#elif defined(WATERFILL_ISA_avx2)
constexpr size_t kWidth = 8, kRegisters = 8, kRadix = 8;
#else
constexpr size_t kWidth = 4, kRegisters = 8, kRadix = 8;
#endif
constexpr size_t kTile = kWidth * kRegisters;
constexpr size_t kNear = 4096;  // numbers that a pass leaves in the nearest cache

typedef float V __attribute__((vector_size(4 * kWidth)));
typedef int32_t I __attribute__((vector_size(4 * kWidth)));

inline V load(const float* at) {
    V x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline void store(float* at, V x) { std::memcpy(at, &x, sizeof x); }

// Signs are +-1 as bytes; only their topmost bits matter.
inline V with_signs(V x, const int8_t* signs) {
#if defined(WATERFILL_ISA_avx512)
    const I wide = (I)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(signs)));
#elif defined(WATERFILL_ISA_avx2)
    const I wide = (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(signs)));
#else
    typedef int8_t Bytes __attribute__((vector_size(16)));
    typedef int16_t Shorts __attribute__((vector_size(16)));
    int32_t four;
    std::memcpy(&four, signs, kWidth);
    const Bytes bytes = (Bytes)I{four, 0, 0, 0};
    const Shorts twice = (Shorts)__builtin_shufflevector(bytes, bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const I wide = (I)__builtin_shufflevector(twice, twice, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
    return (V)((I)x ^ (wide & INT32_MIN));
}

// Butterflies inside a vector. The product with +-1 is exact, so that fusing it changes nothing.
template <size_t Distance, size_t... Is> inline V butterfly(V x, std::index_sequence<Is...>) {
    const V other = __builtin_shufflevector(x, x, (Is ^ Distance)...);
    const V sign = {(Is & Distance ? -1.0f : 1.0f)...};
#if defined(WATERFILL_ISA_avx512)
    return _mm512_fmadd_ps(x, sign, other);
#elif defined(WATERFILL_ISA_avx2)
    return _mm256_fmadd_ps(x, sign, other);
#else
    return x * sign + other;
#endif
}

template <size_t Distance, size_t Count> inline void inside(V (&x)[Count]) {
#pragma GCC unroll 16
    for (size_t r = 0; r < Count; ++r) x[r] = butterfly<Distance>(x[r], std::make_index_sequence<kWidth>());
}

template <size_t Distance, size_t Count> inline void between(V (&x)[Count]) {
#pragma GCC unroll 16
    for (size_t r = 0; r < Count; ++r) {
        if (r & Distance) continue;
        const V a = x[r], b = x[r + Distance];
        x[r] = a + b;
        x[r + Distance] = a - b;
    }
}

// All butterflies of blocks of `Block` numbers, 2 to kTile, in one tile.
template <size_t Block> inline void butterflies(V (&x)[kRegisters]) {
    inside<1>(x);
    if constexpr (Block > 2) inside<2>(x);
    if constexpr (Block > 4 && kWidth > 4) inside<4 % kWidth>(x);
    if constexpr (Block > 8 && kWidth > 8) inside<8 % kWidth>(x);
    if constexpr (Block > kWidth) between<1>(x);
    if constexpr (Block > 2 * kWidth) between<2>(x);
    if constexpr (Block > 4 * kWidth) between<4>(x);
    if constexpr (Block > 8 * kWidth && kRegisters > 8) between<8 % kRegisters>(x);
}

struct Pass {
    float scale;
    const int8_t* before;  // signs of the first number, or null
    const int8_t* after;
};

template <size_t Block> void tile(const Pass& pass, const float* in, float* out) {
    V x[kRegisters];
#pragma GCC unroll 16
    for (size_t r = 0; r < kRegisters; ++r) x[r] = load(in + r * kWidth) * pass.scale;
    if (pass.before)
#pragma GCC unroll 16
        for (size_t r = 0; r < kRegisters; ++r) x[r] = with_signs(x[r], pass.before + r * kWidth);
    butterflies<Block>(x);
    if (pass.after)
#pragma GCC unroll 16
        for (size_t r = 0; r < kRegisters; ++r) x[r] = with_signs(x[r], pass.after + r * kWidth);
#pragma GCC unroll 16
    for (size_t r = 0; r < kRegisters; ++r) store(out + r * kWidth, x[r]);
}

void tile(size_t block, const Pass& pass, const float* in, float* out) {
    switch (block) {
        case 2: return tile<2>(pass, in, out);
        case 4: return tile<4>(pass, in, out);
        case 8: return tile<8>(pass, in, out);
        case 16: return tile<16>(pass, in, out);
        case 32: return tile<32>(pass, in, out);
#if !defined(WATERFILL_ISA_scalar)
        case 64: return tile<64>(pass, in, out);
#endif
#if defined(WATERFILL_ISA_avx512)
        case 128: return tile<128>(pass, in, out);
#endif
        default: return tile<kTile>(pass, in, out);
    }
}

// Butterflies of `Radix` numbers, each `distance` from the next, in place.
template <size_t Radix> void far(float* x, size_t distance, const int8_t* after) {
    for (size_t i = 0; i < distance; i += kWidth) {
        V v[Radix];
#pragma GCC unroll 16
        for (size_t r = 0; r < Radix; ++r) v[r] = load(x + r * distance + i);
        between<1>(v);
        if constexpr (Radix > 2) between<2>(v);
        if constexpr (Radix > 4) between<4>(v);
        if constexpr (Radix > 8) between<8>(v);
        if (after)
#pragma GCC unroll 16
            for (size_t r = 0; r < Radix; ++r) v[r] = with_signs(v[r], after + r * distance + i);
#pragma GCC unroll 16
        for (size_t r = 0; r < Radix; ++r) store(x + r * distance + i, v[r]);
    }
}

void far(size_t radix, float* x, size_t distance, const int8_t* after) {
    switch (radix) {
        case 2: return far<2>(x, distance, after);
        case 4: return far<4>(x, distance, after);
        case 8: return far<8>(x, distance, after);
        default: return far<kRadix>(x, distance, after);
    }
}

// One block of more than a tile; a large one first in parts that stay in the nearest cache.
void block_of(size_t block, const Pass& pass, const float* in, float* out) {
    const size_t part = std::min(block, kNear);
    for (size_t at = 0; at < block; at += part) {
        for (size_t i = at; i < at + part; i += kTile)
            tile<kTile>({pass.scale, pass.before ? pass.before + i : nullptr, nullptr}, in + i, out + i);
        for (size_t done = kTile; done < part;) {
            const size_t radix = std::min(kRadix, part / done);
            const bool last = done * radix == block;
            for (size_t i = at; i < at + part; i += done * radix) far(radix, out + i, done, last && pass.after ? pass.after + i : nullptr);
            done *= radix;
        }
    }
    for (size_t done = part; done < block;) {
        const size_t radix = std::min<size_t>(8, block / done);
        far(radix, out, done, pass.after);
        done *= radix;
    }
}

// A tile of which only `count` numbers are there.
void partial(size_t block, const Pass& pass, const float* in, float* out, size_t count) {
    alignas(64) float x[kTile] = {};
    alignas(64) int8_t signs[kTile] = {};
    std::copy_n(in, count, x);
    if (const int8_t* from = pass.before ? pass.before : pass.after) std::copy_n(from, count, signs);
    tile(block, {pass.scale, pass.before ? signs : nullptr, pass.after ? signs : nullptr}, x, x);
    std::copy_n(x, count, out);
}

void transform(const Job& job, size_t first, size_t count) {
    const size_t step = std::max(job.block, kTile);
    for (size_t at = first; at < first + count;) {
        const size_t column = at % job.columns;
        const size_t run = std::min(first + count - at, job.signs ? job.columns - column : count);
        for (size_t i = 0; i < run; i += step) {
            const size_t here = std::min(step, run - i);
            const int8_t* signs = job.signs ? job.signs + column + i : nullptr;
            const Pass pass{job.scale, job.signs_last ? nullptr : signs, job.signs_last ? signs : nullptr};
            const float* in = job.in + at + i;
            float* out = job.out + at + i;
            if (here < kTile) partial(job.block, pass, in, out, here);
            else if (job.block <= kTile) tile(job.block, pass, in, out);
            else block_of(job.block, pass, in, out);
        }
        at += run;
    }
}

}  // namespace

const hadamard::Kernels& hadamard_kernels() {
    static constexpr hadamard::Kernels kernels{transform};
    return kernels;
}

}  // namespace waterfill::WATERFILL_ISA
