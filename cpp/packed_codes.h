// A tile of codes: bit planes of 4, 2 and 1 bits by the binary digits of the width, lowest bits first.
#pragma once
#include <utility>

#include "packed_lanes.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using packed::kVector;

// One row's four columns.
struct Dword {
    uint32_t v;

    static Dword load(const uint8_t* at) { return {uint32_t(dword_at(at))}; }
    void store(uint8_t* at) const { std::memcpy(at, &v, 4); }
    template <int Shift> Dword field(uint8_t mask) const { return {(Shift > 0 ? v >> (Shift > 0 ? Shift : 0) : v << (Shift < 0 ? -Shift : 0)) & mask * 0x01010101u}; }
    Dword operator|(Dword other) const { return {v | other.v}; }
};

// Codes of the D-th four columns of a tile, a byte each; of those rows of its vectors that `tile`
// points to.
template <unsigned Bits, unsigned D, class Rows = Codes> inline Rows codes_of(const uint8_t* tile) {
    constexpr int below_two = Bits & 4, below_one = Bits & 6;
    if constexpr (Bits == 8) return Rows::load(tile + kVector * D);
    else if constexpr (Bits == 4) return Rows::load(tile + kVector * (D / 2)).template field<4 * (D % 2)>(15);
    else if constexpr (Bits == 2) return Rows::load(tile + kVector * (D / 4)).template field<2 * (D % 4)>(3);
    else if constexpr ((Bits & 1) != 0)
        return codes_of<Bits - 1, D, Rows>(tile) | Rows::load(tile + kVector * below_one).template field<int(D) - below_one>(uint8_t(1 << below_one));
    else return codes_of<4, D, Rows>(tile) | Rows::load(tile + kVector * (below_two + D / 4)).template field<2 * int(D % 4) - below_two>(uint8_t(3 << below_two));
}

template <class Call, unsigned... D> inline void each_of(Call call, std::integer_sequence<unsigned, D...>) {
    (call(std::integral_constant<unsigned, D>()), ...);
}
// call(0) ... call(7), each known when compiled.
template <class Call> inline void each_dword(Call call) { each_of(call, std::make_integer_sequence<unsigned, 8>()); }
// call(0) ..., known when compiled where that keeps sums in registers.
#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
template <class Call> inline void each_part(Call call) { each_of(call, std::make_integer_sequence<unsigned, kParts>()); }
#else
template <class Call> inline void each_part(Call call) {
    for (size_t part = 0; part < kParts; ++part) call(part);
}
#endif

// A tile as plain bytes, eight vectors.
template <unsigned Bits> void unpack(const uint8_t* tile, uint8_t* out) {
    for (size_t part = 0; part < kVector; part += kPart)
        each_dword([&](auto d) { codes_of<Bits, decltype(d)::value>(tile + part).store(out + kVector * d + part); });
}

// One row of a tile.
template <unsigned Bits> void unpack_row(const uint8_t* tile, size_t row, uint8_t* out) {
    each_dword([&](auto d) { codes_of<Bits, decltype(d)::value, Dword>(tile + 4 * row).store(out + 4 * d); });
}

using Unpack = void (*)(const uint8_t*, uint8_t*);
using UnpackRow = void (*)(const uint8_t*, size_t, uint8_t*);
constexpr Unpack kUnpack[9] = {nullptr, nullptr, unpack<2>, unpack<3>, unpack<4>, unpack<5>, unpack<6>, unpack<7>, unpack<8>};
constexpr UnpackRow kUnpackRow[9] = {nullptr, nullptr, unpack_row<2>, unpack_row<3>, unpack_row<4>, unpack_row<5>, unpack_row<6>, unpack_row<7>, unpack_row<8>};

// Sixteen levels that codes of 4 bits stand for, as codes of 8 bits.
struct Table {
#if defined(WATERFILL_ISA_avx512)
    __m512i v;
    Codes operator[](Codes codes) const { return {_mm512_shuffle_epi8(v, codes.v)}; }
#elif defined(WATERFILL_ISA_avx2)
    __m256i v;
    Codes operator[](Codes codes) const { return {_mm256_shuffle_epi8(v, codes.v)}; }
#else
    uint8_t v[packed::kEntries];
    Codes operator[](Codes codes) const {
        for (size_t i = 0; i < kPart / 2; ++i) codes.v[i] = uint16_t(v[codes.v[i] & 15] | v[codes.v[i] >> 8 & 15] << 8);
        return codes;
    }
#endif

    static Table of(const int8_t* levels) {
        alignas(16) uint8_t codes[packed::kEntries];
        for (size_t i = 0; i < packed::kEntries; ++i) codes[i] = uint8_t(levels[i] + 128);
        Table out;
#if defined(WATERFILL_ISA_avx512)
        out.v = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(codes)));
#elif defined(WATERFILL_ISA_avx2)
        out.v = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(codes)));
#else
        std::memcpy(out.v, codes, sizeof codes);
#endif
        return out;
    }
};

// Bits of a level, once its code is looked up.
inline unsigned level_bits(const packed::Matrix& matrix, unsigned bits) { return matrix.table ? 8 : bits; }

inline void unpack_levels(const packed::Matrix& matrix, unsigned bits, const uint8_t* tile, uint8_t* out) {
    kUnpack[bits](tile, out);
    if (!matrix.table) return;
    const Table table = Table::of(matrix.table);
    for (size_t at = 0; at < 8 * kVector; at += kPart) table[Codes::load(out + at)].store(out + at);
}

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
