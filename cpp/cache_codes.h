// Codes of one component in a block, and products of pairs of them with integers.
#pragma once
#include "cache.h"
#include "lanes16.h"

#if defined(WATERFILL_ISA_avx512) || defined(WATERFILL_ISA_avx2)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace waterfill::WATERFILL_ISA {
namespace {

typedef int32_t WideInts __attribute__((vector_size(4 * kWide)));
typedef int8_t WideBytes __attribute__((vector_size(kWide)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint64_t Longs4 __attribute__((vector_size(32)));

// A field of `Width` bits of each code: 32-bit words repeat, each time shifted by a field;
// the lowest of `left` bits is yet to come.
template <unsigned Width> inline __attribute__((always_inline)) void field(Words8& out, const uint8_t*& at, unsigned left) {
    if constexpr (Width == 8) {
        std::memcpy(&out, at, sizeof out);
        at += sizeof out;
        return;
    }
    if constexpr (Width == 4) {
        Words4 part;
        std::memcpy(&part, at, sizeof part);
        out = __builtin_shufflevector(part, part, 0, 1, 2, 3, 4, 5, 6, 7);
    } else if constexpr (Width == 2) {
        uint64_t part;
        std::memcpy(&part, at, sizeof part);
        copy_bits(out, Longs4{} + part);
    } else {
        uint32_t part;
        std::memcpy(&part, at, sizeof part);
        out = Words8{} + part;
    }
    at += 4 * Width;
    const Words8 shift{0, 1 / Width * Width, 2 / Width * Width, 3 / Width * Width, 4 / Width * Width, 5 / Width * Width, 6 / Width * Width, 7 / Width * Width};
    out = ((out >> shift) & ((1u << Width) - 1) * 0x01010101u) << left;
}

// Codes of a block's tokens, less 2^(bits - 1); reads 4 * bits bytes.
inline __attribute__((always_inline)) void unpack(const uint8_t* at, unsigned bits, int8_t* out) {
    Words8 codes{}, part;
    if (bits & 8) field<8>(codes, at, 0);
    if (bits & 4) field<4>(part, at, bits & 3), codes |= part;
    if (bits & 2) field<2>(part, at, bits & 1), codes |= part;
    if (bits & 1) field<1>(part, at, 0), codes |= part;
    // Without borrows between bytes: the highest bit is set before, and turned after.
    const uint32_t top = (1u << (bits - 1)) * 0x01010101u, highest = 0x80808080u;
    codes = bits == 8 ? codes ^ highest : ((codes | highest) - top) ^ highest;
    std::memcpy(out, &codes, sizeof codes);
}

// By name: compilers take bytes apart one by one where they are to convert a vector of them.
inline __attribute__((always_inline)) WideInts ints(const int8_t* at) {
#if defined(WATERFILL_ISA_avx512)
    return (WideInts)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(WATERFILL_ISA_avx2)
    return (WideInts)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
#elif defined(__SSE2__)
    int word;
    std::memcpy(&word, at, sizeof word);
    const __m128i bytes = _mm_cvtsi32_si128(word), twice = _mm_unpacklo_epi8(bytes, bytes);
    return (WideInts)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
#else
    WideBytes bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    return __builtin_convertvector(bytes, WideInts);
#endif
}

inline __attribute__((always_inline)) Wide floats(const WideInts& x) { return __builtin_convertvector(x, Wide); }

inline __attribute__((always_inline)) Lanes16 lanes(const int8_t* at) {
    Lanes16 out;
    for (size_t i = 0; i < kRegisters; ++i) out.v[i] = floats(ints(at + i * kWide));
    return out;
}

// sum + low half * low half + high half * high half, of the int16 halves of each word.
inline __attribute__((always_inline)) WideInts dot_pairs(const WideInts& sum, const WideInts& a, const WideInts& b) {
#if defined(WATERFILL_ISA_avx512)
    return (WideInts)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(WATERFILL_ISA_avx2)
    return sum + (WideInts)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (WideInts)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
