// Sixteen rows at a time, in the registers of each instruction set. All give the same bits: integers
// are exact, and floats are multiplied and added one after the other, never fused.
//
// A vector of 64 bytes is used in parts of one register: Codes are the bytes of a part, Sum is its rows'
// sums, Lanes are floats of all sixteen rows.
#pragma once
#include <cstring>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "packed.h"
#include "packed_floats.h"

namespace waterfill::WATERFILL_ISA {
namespace {

inline int32_t dword_at(const void* at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

// Pairs of products that fit 16-bit sums before these must be widened; 0 for 8 bits, whose levels are
// used without their zero point. One instruction of AVX-512 goes all the way.
constexpr unsigned flush_period(unsigned bits) {
#if defined(WATERFILL_ISA_avx512)
    (void)bits;
    return 8;
#else
    return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : bits == 7 ? 1 : 0;
#endif
}

#if defined(WATERFILL_ISA_avx512)

constexpr size_t kParts = 1;

struct Codes {
    __m512i v;

    static Codes load(const uint8_t* at) { return {_mm512_loadu_si512(at)}; }
    void store(uint8_t* at) const { _mm512_storeu_si512(at, v); }
    // Bits of each byte after a shift to the right (to the left where it is negative).
    template <int Shift> Codes field(uint8_t mask) const {
        const __m512i m = _mm512_set1_epi8(char(mask));
        if constexpr (Shift > 0) return {_mm512_and_si512(_mm512_srli_epi32(v, Shift), m)};
        else if constexpr (Shift < 0) return {_mm512_and_si512(_mm512_slli_epi32(v, -Shift), m)};
        else return {_mm512_and_si512(v, m)};
    }
    Codes operator|(Codes other) const { return {_mm512_or_si512(v, other.v)}; }
};

template <unsigned Period> struct Sum {
    __m512i v;

    static Sum start(unsigned bits, int32_t levels) { return {_mm512_set1_epi32(-levels * (1 << (bits - 1)))}; }
    static Sum zero() { return {_mm512_setzero_si512()}; }
    // Codes of the D-th four columns of a tile, times their activations.
    template <unsigned D> void add(Codes codes, const int8_t* x) { v = _mm512_dpbusd_epi32(v, codes.v, _mm512_set1_epi32(dword_at(x))); }
    Sum operator+(Sum other) const { return {_mm512_add_epi32(v, other.v)}; }
    // This times `base`, and another.
    Sum scaled(int32_t base, Sum other) const { return {_mm512_add_epi32(_mm512_mullo_epi32(v, _mm512_set1_epi32(base)), other.v)}; }
};

struct Lanes {
    __m512 v;

    static Lanes zero() { return {_mm512_setzero_ps()}; }
    static Lanes load(const float* at) { return {_mm512_loadu_ps(at)}; }
    static Lanes load_half(const uint16_t* at) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))}; }
    template <unsigned Period> static Lanes of(const Sum<Period> (&sums)[kParts]) { return {_mm512_cvtepi32_ps(sums[0].v)}; }
    void store(float* at) const { _mm512_storeu_ps(at, v); }
    Lanes operator*(float x) const { return {_mm512_mul_ps(v, _mm512_set1_ps(x))}; }
    Lanes operator*(Lanes other) const { return {_mm512_mul_ps(v, other.v)}; }
    Lanes operator+(Lanes other) const { return {_mm512_add_ps(v, other.v)}; }
};

#elif defined(WATERFILL_ISA_avx2)

constexpr size_t kParts = 2;

struct Codes {
    __m256i v;

    static Codes load(const uint8_t* at) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))}; }
    void store(uint8_t* at) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), v); }
    template <int Shift> Codes field(uint8_t mask) const {
        const __m256i m = _mm256_set1_epi8(char(mask));
        if constexpr (Shift > 0) return {_mm256_and_si256(_mm256_srli_epi32(v, Shift), m)};
        else if constexpr (Shift < 0) return {_mm256_and_si256(_mm256_slli_epi32(v, -Shift), m)};
        else return {_mm256_and_si256(v, m)};
    }
    Codes operator|(Codes other) const { return {_mm256_or_si256(v, other.v)}; }
};

template <unsigned Period> struct Sum {
    __m256i v, narrow;

    static Sum start(unsigned bits, int32_t levels) { return {_mm256_set1_epi32(Period ? -levels * (1 << (bits - 1)) : 0), _mm256_setzero_si256()}; }
    static Sum zero() { return start(1, 0); }
    template <unsigned D> void add(Codes codes, const int8_t* x) {
        const __m256i four = _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x))), ones = _mm256_set1_epi16(1);
        if constexpr (Period == 0) {
            // |level| <= 128 is a byte without sign, and twice 128 * 127 is no overflow.
            const __m256i level = _mm256_xor_si256(codes.v, _mm256_set1_epi8(char(0x80)));
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(four, level));
            v = _mm256_add_epi32(v, _mm256_madd_epi16(pairs, ones));
        } else {
            __m256i pairs = _mm256_maddubs_epi16(codes.v, four);
            if constexpr (D % Period != 0) pairs = _mm256_add_epi16(narrow, pairs);
            // Or the compiler adds pairs in another order, and there are too few registers for that.
            asm("" : "+x"(pairs));
            narrow = pairs;
            if constexpr (D % Period == Period - 1) v = _mm256_add_epi32(v, _mm256_madd_epi16(narrow, ones));
        }
    }
    Sum operator+(Sum other) const { return {_mm256_add_epi32(v, other.v), narrow}; }
    Sum scaled(int32_t base, Sum other) const { return {_mm256_add_epi32(_mm256_mullo_epi32(v, _mm256_set1_epi32(base)), other.v), narrow}; }
};

struct Lanes {
    __m256 v[2];

    static Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static Lanes load(const float* at) { return {{_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}}; }
    static Lanes load_half(const uint16_t* at) {
        const auto* half = reinterpret_cast<const __m128i*>(at);
        return {{_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))}};
    }
    template <unsigned Period> static Lanes of(const Sum<Period> (&sums)[kParts]) { return {{_mm256_cvtepi32_ps(sums[0].v), _mm256_cvtepi32_ps(sums[1].v)}}; }
    void store(float* at) const { _mm256_storeu_ps(at, v[0]), _mm256_storeu_ps(at + 8, v[1]); }
    Lanes operator*(float x) const {
        const __m256 b = _mm256_set1_ps(x);
        return {{_mm256_mul_ps(v[0], b), _mm256_mul_ps(v[1], b)}};
    }
    Lanes operator*(Lanes other) const { return {{_mm256_mul_ps(v[0], other.v[0]), _mm256_mul_ps(v[1], other.v[1])}}; }
    Lanes operator+(Lanes other) const { return {{_mm256_add_ps(v[0], other.v[0]), _mm256_add_ps(v[1], other.v[1])}}; }
};

#else

constexpr size_t kParts = 4;

// Two columns of a row to a word.
struct Codes {
    uint16_t v[8];

    static Codes load(const uint8_t* at) {
        Codes out;
        std::memcpy(out.v, at, sizeof out.v);
        return out;
    }
    void store(uint8_t* at) const { std::memcpy(at, v, sizeof v); }
    // Bits that a shift brings in from the next byte are masked away.
    template <int Shift> Codes field(uint8_t mask) const {
        constexpr int right = Shift > 0 ? Shift : 0, left = Shift < 0 ? -Shift : 0;
        const uint16_t m = uint16_t(mask * 0x0101);
        Codes out;
        for (int i = 0; i < 8; ++i) out.v[i] = uint16_t((left ? v[i] << left : v[i] >> right) & m);
        return out;
    }
    Codes operator|(Codes other) const {
        for (int i = 0; i < 8; ++i) other.v[i] = uint16_t(other.v[i] | v[i]);
        return other;
    }
};

template <unsigned Period> struct Sum {
    int32_t v[4];
    int16_t narrow[8];

    static Sum start(unsigned bits, int32_t levels) {
        const int32_t first = Period ? -levels * (1 << (bits - 1)) : 0;
        return {{first, first, first, first}, {}};
    }
    static Sum zero() { return start(1, 0); }
    template <unsigned D> void add(Codes codes, const int8_t* x) {
        constexpr unsigned period = Period ? Period : 1;
        constexpr int16_t zero_point = Period ? 0 : 128;
        const int16_t lower[8] = {x[0], x[2], x[0], x[2], x[0], x[2], x[0], x[2]}, upper[8] = {x[1], x[3], x[1], x[3], x[1], x[3], x[1], x[3]};
        for (int i = 0; i < 8; ++i) {
            const int16_t low = int16_t((codes.v[i] & 255) - zero_point), high = int16_t((codes.v[i] >> 8) - zero_point);
            const int16_t pair = int16_t(low * lower[i] + high * upper[i]);
            narrow[i] = D % period == 0 ? pair : int16_t(narrow[i] + pair);
        }
        if constexpr (D % period == period - 1)
            for (int r = 0; r < 4; ++r) v[r] += narrow[2 * r] + narrow[2 * r + 1];
    }
    Sum operator+(Sum other) const {
        for (int r = 0; r < 4; ++r) other.v[r] += v[r];
        return other;
    }
    Sum scaled(int32_t base, Sum other) const {
        for (int r = 0; r < 4; ++r) other.v[r] += v[r] * base;
        return other;
    }
};

struct Lanes {
    float v[16];

    static Lanes zero() { return {}; }
    static Lanes load(const float* at) {
        Lanes out;
        std::memcpy(out.v, at, sizeof out.v);
        return out;
    }
    static Lanes load_half(const uint16_t* at) {
        Lanes out;
        for (int r = 0; r < 16; ++r) out.v[r] = from_half(at[r]);
        return out;
    }
    template <unsigned Period> static Lanes of(const Sum<Period> (&sums)[kParts]) {
        Lanes out;
        for (int r = 0; r < 16; ++r) out.v[r] = float(sums[r / 4].v[r % 4]);
        return out;
    }
    void store(float* at) const { std::memcpy(at, v, sizeof v); }
    Lanes operator*(float x) const {
        Lanes out;
        for (int r = 0; r < 16; ++r) out.v[r] = v[r] * x;
        return out;
    }
    Lanes operator*(Lanes other) const {
        for (int r = 0; r < 16; ++r) other.v[r] = v[r] * other.v[r];
        return other;
    }
    Lanes operator+(Lanes other) const {
        for (int r = 0; r < 16; ++r) other.v[r] = v[r] + other.v[r];
        return other;
    }
};

#endif

constexpr size_t kPart = packed::kVector / kParts;  // bytes

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
