// Sixteen rows at a time, in the registers of each instruction set. All give the same bits: integers
// are exact, and floats are multiplied and added one after the other, never fused.
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

// Sums of codes times activations, four columns at a time.
template <unsigned Period> struct Sum {
    __m512i v;

    static Sum start(unsigned bits, int32_t levels) { return {_mm512_set1_epi32(-levels * (1 << (bits - 1)))}; }
    static Sum zero() { return {_mm512_setzero_si512()}; }
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
    template <unsigned Period> static Lanes of(Sum<Period> sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
    void store(float* at) const { _mm512_storeu_ps(at, v); }
    Lanes operator*(float x) const { return {_mm512_mul_ps(v, _mm512_set1_ps(x))}; }
    Lanes operator*(Lanes other) const { return {_mm512_mul_ps(v, other.v)}; }
    Lanes operator+(Lanes other) const { return {_mm512_add_ps(v, other.v)}; }
};

#elif defined(WATERFILL_ISA_avx2)

struct Codes {
    __m256i v[2];

    static Codes load(const uint8_t* at) {
        const auto* half = reinterpret_cast<const __m256i*>(at);
        return {{_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)}};
    }
    void store(uint8_t* at) const {
        auto* half = reinterpret_cast<__m256i*>(at);
        _mm256_storeu_si256(half, v[0]), _mm256_storeu_si256(half + 1, v[1]);
    }
    template <int Shift> Codes field(uint8_t mask) const {
        const __m256i m = _mm256_set1_epi8(char(mask));
        const auto shifted = [](__m256i w) {
            if constexpr (Shift > 0) return _mm256_srli_epi32(w, Shift);
            else if constexpr (Shift < 0) return _mm256_slli_epi32(w, -Shift);
            else return w;
        };
        return {{_mm256_and_si256(shifted(v[0]), m), _mm256_and_si256(shifted(v[1]), m)}};
    }
    Codes operator|(Codes other) const { return {{_mm256_or_si256(v[0], other.v[0]), _mm256_or_si256(v[1], other.v[1])}}; }
};

template <unsigned Period> struct Sum {
    __m256i v[2], narrow[2];

    static Sum start(unsigned bits, int32_t levels) {
        const __m256i first = _mm256_set1_epi32(Period ? -levels * (1 << (bits - 1)) : 0), none = _mm256_setzero_si256();
        return {{first, first}, {none, none}};
    }
    static Sum zero() { return start(1, 0); }
    template <unsigned D> void add(Codes codes, const int8_t* x) {
        const __m256i four = _mm256_set1_epi32(dword_at(x)), ones = _mm256_set1_epi16(1);
        for (int h = 0; h < 2; ++h) {
            if constexpr (Period == 0) {
                // |level| <= 128 is a byte without sign, and twice 128 * 127 is no overflow.
                const __m256i level = _mm256_xor_si256(codes.v[h], _mm256_set1_epi8(char(0x80)));
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(four, level));
                v[h] = _mm256_add_epi32(v[h], _mm256_madd_epi16(pairs, ones));
            } else {
                const __m256i pairs = _mm256_maddubs_epi16(codes.v[h], four);
                if constexpr (D % Period == 0) narrow[h] = pairs;
                else narrow[h] = _mm256_add_epi16(narrow[h], pairs);
                if constexpr (D % Period == Period - 1) v[h] = _mm256_add_epi32(v[h], _mm256_madd_epi16(narrow[h], ones));
            }
        }
    }
    Sum operator+(Sum other) const { return {{_mm256_add_epi32(v[0], other.v[0]), _mm256_add_epi32(v[1], other.v[1])}, {}}; }
    Sum scaled(int32_t base, Sum other) const {
        const __m256i b = _mm256_set1_epi32(base);
        return Sum{{_mm256_mullo_epi32(v[0], b), _mm256_mullo_epi32(v[1], b)}, {}} + other;
    }
};

struct Lanes {
    __m256 v[2];

    static Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static Lanes load(const float* at) { return {{_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}}; }
    static Lanes load_half(const uint16_t* at) {
        const auto* half = reinterpret_cast<const __m128i*>(at);
        return {{_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))}};
    }
    template <unsigned Period> static Lanes of(Sum<Period> sum) { return {{_mm256_cvtepi32_ps(sum.v[0]), _mm256_cvtepi32_ps(sum.v[1])}}; }
    void store(float* at) const { _mm256_storeu_ps(at, v[0]), _mm256_storeu_ps(at + 8, v[1]); }
    Lanes operator*(float x) const {
        const __m256 b = _mm256_set1_ps(x);
        return {{_mm256_mul_ps(v[0], b), _mm256_mul_ps(v[1], b)}};
    }
    Lanes operator*(Lanes other) const { return {{_mm256_mul_ps(v[0], other.v[0]), _mm256_mul_ps(v[1], other.v[1])}}; }
    Lanes operator+(Lanes other) const { return {{_mm256_add_ps(v[0], other.v[0]), _mm256_add_ps(v[1], other.v[1])}}; }
};

#else

struct Codes {
    uint16_t v[32];

    static Codes load(const uint8_t* at) {
        Codes out;
        std::memcpy(out.v, at, sizeof out.v);
        return out;
    }
    void store(uint8_t* at) const { std::memcpy(at, v, sizeof v); }
    // Bits that a shift brings in from the next byte are masked away.
    template <int Shift> Codes field(uint8_t mask) const {
        const uint16_t m = uint16_t(mask * 0x0101);
        Codes out;
        for (int i = 0; i < 32; ++i) out.v[i] = uint16_t((Shift >= 0 ? v[i] >> (Shift >= 0 ? Shift : 0) : v[i] << (Shift < 0 ? -Shift : 0)) & m);
        return out;
    }
    Codes operator|(Codes other) const {
        for (int i = 0; i < 32; ++i) other.v[i] = uint16_t(other.v[i] | v[i]);
        return other;
    }
};

template <unsigned Period> struct Sum {
    int32_t v[16];
    int16_t narrow[32];

    static Sum start(unsigned bits, int32_t levels) {
        Sum out{};
        for (int32_t& one : out.v) one = Period ? -levels * (1 << (bits - 1)) : 0;
        return out;
    }
    static Sum zero() { return start(1, 0); }
    template <unsigned D> void add(Codes codes, const int8_t* x) {
        // Two columns of a row to a word: the products of one pair fit 16 bits, signed.
        const int16_t zero_point = Period ? 0 : 128;
        int16_t lower[32], upper[32];
        for (int i = 0; i < 32; i += 2) lower[i] = x[0], upper[i] = x[1], lower[i + 1] = x[2], upper[i + 1] = x[3];
        for (int i = 0; i < 32; ++i) {
            const int16_t low = int16_t(int16_t(codes.v[i] & 255) - zero_point), high = int16_t(int16_t(codes.v[i] >> 8) - zero_point);
            const int16_t pair = int16_t(int16_t(low * lower[i]) + int16_t(high * upper[i]));
            narrow[i] = D % (Period ? Period : 1) == 0 ? pair : int16_t(narrow[i] + pair);
        }
        if constexpr (Period == 0 || D % (Period ? Period : 1) == Period - 1)
            for (int r = 0; r < 16; ++r) v[r] += narrow[2 * r] + narrow[2 * r + 1];
    }
    Sum operator+(Sum other) const {
        for (int r = 0; r < 16; ++r) other.v[r] += v[r];
        return other;
    }
    Sum scaled(int32_t base, Sum other) const {
        for (int r = 0; r < 16; ++r) other.v[r] += v[r] * base;
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
    template <unsigned Period> static Lanes of(Sum<Period> sum) {
        Lanes out;
        for (int r = 0; r < 16; ++r) out.v[r] = float(sum.v[r]);
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

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
