// A tile of codes: bit planes of 4, 2 and 1 bits by the binary digits of the width, lowest bits first.
#pragma once
#include <utility>

#include "packed_lanes.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using packed::kVector;

// Codes of the D-th four columns of a tile, a byte each; of the part of its vectors that `tile` points to.
template <unsigned Bits, unsigned D> inline Codes codes_of(const uint8_t* tile) {
    constexpr int below_two = Bits & 4, below_one = Bits & 6;
    if constexpr (Bits == 8) return Codes::load(tile + kVector * D);
    else if constexpr (Bits == 4) return Codes::load(tile + kVector * (D / 2)).template field<4 * (D % 2)>(15);
    else if constexpr (Bits == 2) return Codes::load(tile + kVector * (D / 4)).template field<2 * (D % 4)>(3);
    else if constexpr ((Bits & 1) != 0)
        return codes_of<Bits - 1, D>(tile) | Codes::load(tile + kVector * below_one).template field<int(D) - below_one>(uint8_t(1 << below_one));
    else return codes_of<4, D>(tile) | Codes::load(tile + kVector * (below_two + D / 4)).template field<2 * int(D % 4) - below_two>(uint8_t(3 << below_two));
}

template <class Call, unsigned... D> inline void each_of(Call call, std::integer_sequence<unsigned, D...>) {
    (call(std::integral_constant<unsigned, D>()), ...);
}
// call(0) ... call(7), each known when compiled.
template <class Call> inline void each_dword(Call call) { each_of(call, std::make_integer_sequence<unsigned, 8>()); }
template <class Call> inline void each_part(Call call) { each_of(call, std::make_integer_sequence<unsigned, kParts>()); }

// Tiles of a chunk as plain bytes, eight vectors a tile.
template <unsigned Bits> void unpack(const uint8_t* codes, size_t tiles, uint8_t* out) {
    for (size_t tile = 0; tile < tiles; ++tile, codes += Bits * kVector, out += 8 * kVector)
        for (size_t part = 0; part < kVector; part += kPart)
            each_dword([&](auto d) { codes_of<Bits, decltype(d)::value>(codes + part).store(out + kVector * d + part); });
}

using Unpack = void (*)(const uint8_t*, size_t, uint8_t*);
constexpr Unpack kUnpack[9] = {nullptr, nullptr, unpack<2>, unpack<3>, unpack<4>, unpack<5>, unpack<6>, unpack<7>, unpack<8>};

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
