// Sixteen floats at a time in the vectors of each instruction set, written once: every lane is
// multiplied and added by itself, never fused, and sums are taken in one order, so that all
// instruction sets give the same bits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "packed_floats.h"

namespace waterfill::WATERFILL_ISA {
namespace {

constexpr size_t kLanes = 16;
#if defined(WATERFILL_ISA_avx512)
constexpr size_t kWide = 16;  // floats of a register
#elif defined(WATERFILL_ISA_avx2)
constexpr size_t kWide = 8;
#else
constexpr size_t kWide = 4;
#endif
constexpr size_t kRegisters = kLanes / kWide;

typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef uint32_t WideBits __attribute__((vector_size(4 * kWide)));
typedef uint16_t WideHalves __attribute__((vector_size(2 * kWide)));

template <class To, class From> inline __attribute__((always_inline)) void copy_bits(To& to, const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&to, &from, sizeof to);
}

inline __attribute__((always_inline)) void widen(Wide& out, const float* at) { std::memcpy(&out, at, sizeof out); }

template <Float Type> inline __attribute__((always_inline)) void widen(Wide& out, const uint16_t* at) {
    WideHalves halves;
    std::memcpy(&halves, at, sizeof halves);
    const WideBits bits = __builtin_convertvector(halves, WideBits);
    if constexpr (Type == Float::bf16) {
        copy_bits(out, bits << 16);
    } else {
        // As `from_half`, without branches.
        const WideBits magnitude = (bits & 0x7FFFu) << 13, exponent = magnitude & 0x0F800000u;
        Wide lifted, one;
        copy_bits(lifted, magnitude + (113u << 23));
        copy_bits(one, WideBits{} + (113u << 23));
        WideBits denormal;
        copy_bits(denormal, lifted - one);
        const WideBits ordinary = exponent == 0x0F800000u ? magnitude + (224u << 23) : magnitude + (112u << 23);
        copy_bits(out, (exponent == 0u ? denormal : ordinary) | (bits & 0x8000u) << 16);
    }
}

// As `to_bf16` and `to_half`, without branches: the bits in the lower halves.
template <Float Type> inline __attribute__((always_inline)) WideBits narrowed(const Wide& x) {
    WideBits bits;
    copy_bits(bits, x);
    if constexpr (Type == Float::bf16) {
        const WideBits rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
        return (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16 | 0x40u) : rounded;
    } else {
        const WideBits sign = bits & 0x80000000u, magnitude = bits ^ sign;
        Wide positive;
        copy_bits(positive, magnitude);
        WideBits shifted;
        copy_bits(shifted, positive + 0.5f);
        const WideBits special = magnitude > 0x7F800000u ? WideBits{} + 0x7E00u : WideBits{} + 0x7C00u;
        const WideBits normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
        const WideBits finite = magnitude < 113u << 23 ? shifted - 0x3F000000u : normal;
        return (magnitude >= 143u << 23 ? special : finite) | sign >> 16;
    }
}

struct Lanes16 {
    Wide v[kRegisters];

    static inline __attribute__((always_inline)) Lanes16 of(float x) {
        Lanes16 out;
        for (size_t i = 0; i < kRegisters; ++i) out.v[i] = Wide{} + x;
        return out;
    }
    template <Float Type> static inline __attribute__((always_inline)) Lanes16 load(const typename Stored<Type>::type* at) {
        Lanes16 out;
        for (size_t i = 0; i < kRegisters; ++i) {
            if constexpr (Type == Float::f32) widen(out.v[i], at + i * kWide);
            else widen<Type>(out.v[i], at + i * kWide);
        }
        return out;
    }
    // The first `count` of sixteen, then zeros; reads no further.
    template <Float Type> static inline __attribute__((always_inline)) Lanes16 load(const typename Stored<Type>::type* at, size_t count) {
        typename Stored<Type>::type padded[kLanes] = {};
        std::memcpy(padded, at, count * sizeof *padded);
        return load<Type>(padded);
    }
    static inline __attribute__((always_inline)) Lanes16 load(const float* at) { return load<Float::f32>(at); }
    inline __attribute__((always_inline)) void store(float* at) const { std::memcpy(at, v, sizeof v); }
    template <Float Type> inline __attribute__((always_inline)) void store(typename Stored<Type>::type* at) const {
        if constexpr (Type == Float::f32) {
            store(static_cast<float*>(at));
        } else {
            for (size_t i = 0; i < kRegisters; ++i) {
                const WideHalves halves = __builtin_convertvector(narrowed<Type>(v[i]), WideHalves);
                std::memcpy(at + i * kWide, &halves, sizeof halves);
            }
        }
    }
    // The first `count`; writes no further.
    template <Float Type> inline __attribute__((always_inline)) void store(typename Stored<Type>::type* at, size_t count) const {
        typename Stored<Type>::type all[kLanes];
        store<Type>(all);
        std::memcpy(at, all, count * sizeof *all);
    }
    // Each as it would be read again.
    template <Float Type> inline __attribute__((always_inline)) Lanes16 rounded() const {
        if constexpr (Type == Float::f32) return *this;
        typename Stored<Type>::type all[kLanes];
        store<Type>(all);
        return load<Type>(all);
    }

    inline __attribute__((always_inline)) Lanes16 operator+(const Lanes16& other) const {
        Lanes16 out;
        for (size_t i = 0; i < kRegisters; ++i) out.v[i] = v[i] + other.v[i];
        return out;
    }
    inline __attribute__((always_inline)) Lanes16 operator*(const Lanes16& other) const {
        Lanes16 out;
        for (size_t i = 0; i < kRegisters; ++i) out.v[i] = v[i] * other.v[i];
        return out;
    }
    // The greater of each; this one where the other is no number.
    inline __attribute__((always_inline)) Lanes16 greater(const Lanes16& other) const {
        Lanes16 out;
        for (size_t i = 0; i < kRegisters; ++i) out.v[i] = other.v[i] > v[i] ? other.v[i] : v[i];
        return out;
    }
    template <class Join> inline __attribute__((always_inline)) float joined(const Join& join) const {
        float values[kLanes];
        store(values);
        for (size_t step = kLanes / 2; step; step /= 2)
            for (size_t i = 0; i < step; ++i) values[i] = join(values[i], values[i + step]);
        return values[0];
    }
    inline __attribute__((always_inline)) float sum() const {
        return joined([](float a, float b) { return a + b; });
    }
    inline __attribute__((always_inline)) float greatest() const {
        return joined([](float a, float b) { return b > a ? b : a; });
    }
};

// The sums of sixteen, each as `sum` takes it: pairs share the additions.
inline __attribute__((always_inline)) Lanes16 sums_of(const Lanes16 (&x)[kLanes]) {
#if defined(WATERFILL_ISA_avx512)
    Wide halves[8], quarters[4], pairs[2];
    for (size_t i = 0; i < 8; ++i) {
        const Wide a = x[2 * i].v[0], b = x[2 * i + 1].v[0];
        halves[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (size_t i = 0; i < 4; ++i) {
        const Wide a = halves[2 * i], b = halves[2 * i + 1];
        quarters[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (size_t i = 0; i < 2; ++i) {
        const Wide a = quarters[2 * i], b = quarters[2 * i + 1];
        pairs[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                   __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    return {{__builtin_shufflevector(pairs[0], pairs[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
             __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)}};
#elif defined(WATERFILL_ISA_avx2)
    // Shuffles within halves of a register are the cheap ones; the order is mended at the end.
    Lanes16 out;
    for (size_t g = 0; g < 2; ++g) {
        Wide quarters[4], pairs[2];
        for (size_t i = 0; i < 4; ++i) {
            const Lanes16 &even = x[8 * g + 2 * i], &odd = x[8 * g + 2 * i + 1];
            const Wide a = even.v[0] + even.v[1], b = odd.v[0] + odd.v[1];
            quarters[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
        }
        for (size_t i = 0; i < 2; ++i) {
            const Wide a = quarters[2 * i], b = quarters[2 * i + 1];
            pairs[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
        const Wide sums = __builtin_shufflevector(pairs[0], pairs[1], 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 9, 11, 5, 7, 13, 15);
        out.v[g] = __builtin_shufflevector(sums, sums, 0, 4, 1, 5, 2, 6, 3, 7);
    }
    return out;
#else
    Lanes16 out;
    for (size_t g = 0; g < 4; ++g) {
        Wide pairs[2], quarters[4];
        for (size_t i = 0; i < 4; ++i) quarters[i] = (x[4 * g + i].v[0] + x[4 * g + i].v[2]) + (x[4 * g + i].v[1] + x[4 * g + i].v[3]);
        for (size_t i = 0; i < 2; ++i) {
            const Wide a = quarters[2 * i], b = quarters[2 * i + 1];
            pairs[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
        }
        out.v[g] = __builtin_shufflevector(pairs[0], pairs[1], 0, 2, 4, 6) + __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 5, 7);
    }
    return out;
#endif
}

// e^x for x <= 0, within 2 units of the last place; 0 below -87, where numbers end. Cephes' expf.
inline __attribute__((always_inline)) Lanes16 exponential(const Lanes16& x) {
    Lanes16 out;
    for (size_t i = 0; i < kRegisters; ++i) {
        const Wide value = x.v[i], shifted = value * 1.44269504088896341f + 12582912.0f;  // the integer is in the lowest bits
        const Wide n = shifted - 12582912.0f, r = value - n * 0.693359375f - n * -2.12194440e-4f;
        Wide p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        WideBits bits;
        copy_bits(bits, p * (r * r) + r + 1.0f);
        WideBits exponent;
        copy_bits(exponent, shifted);
        Wide scaled;
        copy_bits(scaled, bits + (exponent << 23));
        out.v[i] = value < -87.0f ? Wide{} : scaled;
    }
    return out;
}

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
