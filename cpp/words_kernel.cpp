// Words taken apart and put together, compiled once per instruction set: plain loops that the
// compiler turns into vectors, but for the packing of narrow planes.
#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "rans.h"
#include "words.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace words;
using rans::kTile;

// Eight values of `bits` bits from the lower bits of a number, and back.
#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
inline uint64_t spread(uint64_t packed, unsigned bits) { return _pdep_u64(packed, 0x0101010101010101u * ((1u << bits) - 1)); }
inline uint64_t gather(uint64_t values, unsigned bits) { return _pext_u64(values, 0x0101010101010101u * ((1u << bits) - 1)); }
#else
inline uint64_t spread(uint64_t packed, unsigned bits) {
    uint64_t values = 0;
    for (unsigned i = 0; i < 8; ++i) values |= (packed >> (bits * i) & ((1u << bits) - 1)) << (8 * i);
    return values;
}
inline uint64_t gather(uint64_t values, unsigned bits) {
    uint64_t packed = 0;
    for (unsigned i = 0; i < 8; ++i) packed |= (values >> (8 * i) & ((1u << bits) - 1)) << (bits * i);
    return packed;
}
#endif

// `count` values of fewer than 8 bits, from bit first * bits on.
void unpack(const uint8_t* packed, size_t nbytes, unsigned bits, size_t first, size_t count, uint8_t* out) {
    size_t i = 0;
    if (first * bits % 8 == 0) {
        const uint8_t* at = packed + first * bits / 8;
        const uint8_t* end = packed + nbytes;
#if defined(WATERFILL_ISA_avx512)
        alignas(64) uint8_t bytes[64], shifts[64];
        for (unsigned k = 0; k < 64; ++k) bytes[k] = uint8_t(k / 8 * bits + k % 8), shifts[k] = uint8_t(k % 8 * bits);
        const __m512i from = _mm512_load_si512(bytes), shift = _mm512_load_si512(shifts), mask = _mm512_set1_epi8(char((1u << bits) - 1));
        const __mmask64 used = (uint64_t(1) << (8 * bits)) - 1;
        for (; i + 64 <= count; i += 64, at += 8 * bits) {
            const __m512i groups = _mm512_permutexvar_epi8(from, _mm512_maskz_loadu_epi8(used, at));
            _mm512_storeu_si512(out + i, _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, groups), mask));
        }
#endif
        for (; i + 8 <= count && end - at >= 8; i += 8, at += bits) {
            uint64_t eight;
            std::memcpy(&eight, at, 8);
            eight = spread(eight, bits);
            std::memcpy(out + i, &eight, 8);
        }
    }
    for (; i < count; ++i) {
        const size_t bit = (first + i) * bits, byte = bit / 8;
        const unsigned pair = packed[byte] | (byte + 1 < nbytes ? packed[byte + 1] << 8 : 0);
        out[i] = uint8_t(pair >> bit % 8 & ((1u << bits) - 1));
    }
}

// `first` is a multiple of 8, so that a value's bits begin a byte.
void pack(const uint8_t* values, unsigned bits, size_t first, size_t count, uint8_t* packed) {
    uint8_t* at = packed + first / 8 * bits;
    uint8_t* const end = at + (count * bits + 7) / 8;  // behind which another thread may be at work
    size_t i = 0;
#if defined(WATERFILL_ISA_avx512)
    // Eight neighbours become one number in three sums of pairs, whose lower bytes then close ranks.
    alignas(64) uint8_t bytes[64] = {};
    for (unsigned k = 0; k < 8 * bits; ++k) bytes[k] = uint8_t(k / bits * 8 + k % bits);
    const __m512i close = _mm512_load_si512(bytes);
    const __m512i twos = _mm512_set1_epi16(short(1 | 1 << (8 + bits))), fours = _mm512_set1_epi32(1 | 1 << (16 + 2 * bits));
    const __mmask64 used = (uint64_t(1) << (8 * bits)) - 1;  // bits < 8
    for (; i + 64 <= count; i += 64, at += 8 * bits) {
        const __m512i pairs = _mm512_maddubs_epi16(twos, _mm512_loadu_si512(values + i));
        const __m512i quads = _mm512_madd_epi16(pairs, fours);
        const __m512i high = _mm512_sll_epi64(_mm512_srli_epi64(quads, 32), _mm_cvtsi32_si128(int(4 * bits)));
        const __m512i eights = _mm512_or_si512(_mm512_and_si512(quads, _mm512_set1_epi64(0xFFFFFFFF)), high);
        _mm512_mask_storeu_epi8(at, used, _mm512_permutexvar_epi8(close, eights));
    }
#endif
    for (; i < count; i += 8, at += bits) {
        uint64_t eight = 0;
        if (i + 8 <= count) std::memcpy(&eight, values + i, 8);
        else std::memcpy(&eight, values + i, count - i);
        eight = gather(eight, bits);
        if (end - at >= 8) std::memcpy(at, &eight, 8);
        else std::memcpy(at, &eight, std::min<size_t>(bits, size_t(end - at)));
    }
}

// The loops below know at compile time how wide words are and how many planes they have.
template <class W, unsigned P> void join_words(const Join& job, const uint8_t* __restrict symbols, const uint8_t* const* planes, size_t count, uint8_t* __restrict out) {
    const uint8_t* from[P];
    std::copy_n(planes, P, from);
    const unsigned top = 8 * sizeof(W) - 1, below = job.layout.rest_bits() - 1;
    const W low = W(job.low), fixed = W(job.fixed), bit = W(W(1) << below), mask = W(bit - 1);
    // Products where a vector cannot shift lanes so narrow by a number it does not know beforehand.
    const W lift = W(W(1) << (top - below));
    for (size_t i = 0; i < count; ++i) {
        W rest = from[0][i];
        for (unsigned p = 1; p < P; ++p) rest = W(W(rest << 8) | from[p][i]);
        rest = W(rest | fixed);
        const W field = W(symbols[i] + low), sign = W(rest & bit);
        // An escape's marker may be 2^T, a bit too far: that flips the sign until it is mended.
        W word = W(rest & mask);
        if constexpr (sizeof(W) < 4) word = W(word ^ W(field * uint32_t(bit)) ^ W(sign * uint32_t(lift)));
        else word = W(word ^ W(field << below) ^ W(sign << (top - below)));
        std::memcpy(out + i * sizeof(W), &word, sizeof(W));
    }
}

template <class W> void join_whole(const Join& job, const uint8_t* const* planes, size_t count, uint8_t* __restrict out) {
    const uint8_t* from[sizeof(W)];
    std::copy_n(planes, sizeof(W), from);
    const W fixed = W(job.fixed);
    for (size_t i = 0; i < count; ++i) {
        W word = from[0][i];
        for (unsigned p = 1; p < sizeof(W); ++p) word = W(uint64_t(word) << 8 | from[p][i]);
        const W whole = W(word | fixed);
        std::memcpy(out + i * sizeof(W), &whole, sizeof(W));
    }
}

template <class W> void join_as(const Join& job, const uint8_t* symbols, const uint8_t* const* planes, size_t first, size_t count) {
    uint8_t* out = static_cast<uint8_t*>(job.out) + first * sizeof(W);
    if (!job.layout.field_bits) return join_whole<W>(job, planes, count, out);
    const unsigned n = job.layout.planes();
    if (n == sizeof(W)) return join_words<W, sizeof(W)>(job, symbols, planes, count, out);
    if constexpr (sizeof(W) > 1)
        if (n == sizeof(W) - 1) return join_words<W, sizeof(W) - 1>(job, symbols, planes, count, out);
    if constexpr (sizeof(W) > 2) join_words<W, sizeof(W) - 2>(job, symbols, planes, count, out);
}

constexpr uint8_t kZeros[kTile] = {};

void join(const Join& job, const uint8_t* symbols, size_t first, size_t count) {
    alignas(64) uint8_t unpacked[kTile];
    const uint8_t* planes[kMaxPlanes];
    for (unsigned p = 0; p < job.layout.planes(); ++p) {
        const Plane& plane = job.planes[p];
        planes[p] = plane.kind == Plane::bytes ? plane.at + first : plane.kind == Plane::packed ? unpacked : kZeros;
        if (plane.kind == Plane::packed) unpack(plane.at, plane.nbytes, job.layout.first_bits(), first, count, unpacked);
    }
    switch (job.layout.width) {
        case 1: return join_as<uint8_t>(job, symbols, planes, first, count);
        case 2: return join_as<uint16_t>(job, symbols, planes, first, count);
        case 4: return join_as<uint32_t>(job, symbols, planes, first, count);
        default: return join_as<uint64_t>(job, symbols, planes, first, count);
    }
}

template <class W> W word_at(const uint8_t* words, size_t i) {
    W word;
    std::memcpy(&word, words + i * sizeof(W), sizeof(W));
    return word;
}

template <class W> void symbols_of(const Split& job, const uint8_t* __restrict words, size_t count, uint8_t* __restrict symbols) {
    using Sum = std::conditional_t<(sizeof(W) < 2), uint16_t, W>;  // wide enough for the escape
    const unsigned below = job.layout.rest_bits() - 1;
    const W mask = W((W(1) << (job.layout.field_bits)) - 1);
    const Sum low = Sum(job.low), escape = Sum(job.escape);
    for (size_t i = 0; i < count; ++i) {
        const Sum place = Sum(Sum(W(word_at<W>(words, i) >> below) & mask) - low);
        symbols[i] = uint8_t(place < escape ? place : escape);
    }
}

template <class W> void plane_of(const Split& job, unsigned shift, const uint8_t* __restrict words, size_t count, uint8_t* __restrict plane) {
    if (!job.layout.field_bits) {
        for (size_t i = 0; i < count; ++i) plane[i] = uint8_t(word_at<W>(words, i) >> shift);
        return;
    }
    const unsigned top = 8 * sizeof(W) - 1, below = job.layout.rest_bits() - 1;
    const W bit = W(W(1) << below), mask = W(bit - 1);
    const auto rest = [=](W word) {
        const W sign = W(word >> top);
        if constexpr (sizeof(W) < 4) return W(W(word & mask) | W(sign * uint32_t(bit)));  // as in join_words
        else return W(W(word & mask) | W(sign << below));
    };
    if (shift == 0) {
        for (size_t i = 0; i < count; ++i) plane[i] = uint8_t(rest(word_at<W>(words, i)));
    } else {
        for (size_t i = 0; i < count; ++i) plane[i] = uint8_t(rest(word_at<W>(words, i)) >> shift);
    }
}

template <class W> void split_as(const Split& job, size_t first, size_t count) {
    alignas(64) uint8_t values[kTile];
    const uint8_t* words = static_cast<const uint8_t*>(job.words) + first * sizeof(W);
    if (job.symbols) symbols_of<W>(job, words, count, job.symbols + first);
    for (unsigned p = 0; p < job.layout.planes(); ++p) {
        if (!job.planes[p]) continue;
        const bool packed = job.packed && p == 0 && job.layout.first_bits() < 8;
        plane_of<W>(job, 8 * (job.layout.planes() - 1 - p), words, count, packed ? values : job.planes[p] + first);
        if (packed) pack(values, job.layout.first_bits(), first, count, job.planes[p]);
    }
}

void split(const Split& job, size_t first, size_t count) {
    switch (job.layout.width) {
        case 1: return split_as<uint8_t>(job, first, count);
        case 2: return split_as<uint16_t>(job, first, count);
        case 4: return split_as<uint32_t>(job, first, count);
        default: return split_as<uint64_t>(job, first, count);
    }
}

const Kernels kTable{join, split};

}  // namespace

const words::Kernels& words_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
