// Floats of the three kinds, in loops without branches that become vectors.
#pragma once
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace waterfill::WATERFILL_ISA {
namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float from_half(uint16_t half) {
    const uint32_t magnitude = (half & 0x7FFFu) << 13, exponent = magnitude & 0x0F800000u, sign = (half & 0x8000u) << 16;
    const uint32_t normal = magnitude + (112u << 23);
    // A denormal is a fraction whose leading one is put there and taken away as a number.
    const uint32_t denormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t special = magnitude + (224u << 23);
    return float_of((exponent == 0 ? denormal : exponent == 0x0F800000u ? special : normal) | sign);
}

inline uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    return uint16_t((magnitude >= 143u << 23 ? special : magnitude < 113u << 23 ? denormal : normal) | sign >> 16);
}

inline float from_bf16(uint16_t upper) { return float_of(uint32_t(upper) << 16); }

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x), rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
    return uint16_t((x != x ? bits | 0x400000u : rounded) >> 16);
}

template <Float Type> struct Stored;
template <> struct Stored<Float::f32> {
    using type = float;
    static float read(float x) { return x; }
    static float write(float x) { return x; }
};
template <> struct Stored<Float::bf16> {
    using type = uint16_t;
    static float read(uint16_t x) { return from_bf16(x); }
    static uint16_t write(float x) { return to_bf16(x); }
};
template <> struct Stored<Float::f16> {
    using type = uint16_t;
    static float read(uint16_t x) { return from_half(x); }
    static uint16_t write(float x) { return to_half(x); }
};

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
