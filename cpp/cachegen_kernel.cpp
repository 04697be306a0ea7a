// Rows of keys and values, compiled once per instruction set: loops that the compiler makes vectors of.
#include <cmath>
#include <cstring>

#include "cachegen.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using cachegen::Head;
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

void turn(float* x, const Pairs& pairs, const float* cos, const float* sin) {
    if (pairs.run) {
        float *__restrict a = x + pairs.first[0], *__restrict b = x + pairs.second[0];
        for (size_t i = 0; i < pairs.count; ++i) {
            const float u = a[i], v = b[i];
            a[i] = u * cos[i] - v * sin[i];
            b[i] = u * sin[i] + v * cos[i];
        }
        return;
    }
    for (size_t i = 0; i < pairs.count; ++i) {
        float &a = x[pairs.first[i]], &b = x[pairs.second[i]];
        const float u = a, v = b;
        a = u * cos[i] - v * sin[i];
        b = u * sin[i] + v * cos[i];
    }
}

void read(const void* from, Float format, size_t width, const Pairs& pairs, const float* cos, const float* sin, float* __restrict to) {
    const uint16_t* words = static_cast<const uint16_t*>(from);
    if (format == Float::f32) std::memcpy(to, from, 4 * width);
    else if (format == Float::bf16) for (size_t i = 0; i < width; ++i) to[i] = float_of(uint32_t(words[i]) << 16);
    else for (size_t i = 0; i < width; ++i) to[i] = from_half(words[i]);
    if (cos) turn(to, pairs, cos, sin);
}

void write(const float* from, const float* mean, size_t width, const Pairs& pairs, const float* cos, const float* sin, float* __restrict scratch, Float format, void* to) {
    for (size_t i = 0; i < width; ++i) scratch[i] = from[i] + mean[i];
    if (cos) turn(scratch, pairs, cos, sin);
    uint16_t* words = static_cast<uint16_t*>(to);
    if (format == Float::f32) std::memcpy(to, scratch, 4 * width);
    else if (format == Float::bf16) for (size_t i = 0; i < width; ++i) words[i] = to_bfloat(scratch[i]);
    else for (size_t i = 0; i < width; ++i) words[i] = to_half(scratch[i]);
}

int quantise(const float* __restrict z, const Head& head, float inverse, int32_t* __restrict high, uint8_t* __restrict symbols, uint8_t* __restrict low) {
    const float* __restrict offset = head.offset;
    const uint8_t* __restrict shift = head.shift;
    const int32_t *__restrict first = head.first, *__restrict last = head.last;
    int other = 0, far = 0;
    for (size_t i = 0; i < head.count; ++i) {
        const float steps = std::nearbyint((z[i] - offset[i]) * inverse);
        const bool fits = std::fabs(steps) < cachegen::kReach;
        far |= !fits;
        const int32_t k = (fits ? int32_t(steps) : 0) + ((1 << shift[i]) >> 1);
        const int32_t up = (k >> shift[i]) + cachegen::kMiddle;
        const int32_t near = up < first[i] ? first[i] : up > last[i] ? last[i] : up;
        high[i] = up;
        symbols[i] = uint8_t(near);
        low[i] = uint8_t(k & ((1 << shift[i]) - 1));
        other |= near != up;
    }
    return other | far << 1;
}

void widen(const uint8_t* symbols, const Head& head, float* __restrict steps) {
    const float* __restrict scale = head.scale;
    for (size_t i = 0; i < head.count; ++i) steps[i] = float(int(symbols[i]) - cachegen::kMiddle) * scale[i];
}

void finish(const Head& head, float step, float* __restrict steps) {
    const float* __restrict pulls = head.pull;
    for (size_t i = 0; i < head.count; ++i) {
        // Read before it is known whether it counts: a jump for each sign would be a coin toss.
        const float k = steps[i], pull = std::copysign(pulls[i], k);
        steps[i] = (k - (k == 0.0f ? 0.0f : pull)) * step;
    }
}

}  // namespace

const cachegen::Kernels& cachegen_kernels() {
    static constexpr cachegen::Kernels kernels{read, write, quantise, widen, finish};
    return kernels;
}

}  // namespace waterfill::WATERFILL_ISA
