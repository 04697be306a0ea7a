// What the fuzz drivers share: chance, damage, and which decoders this machine has.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dispatch.h"

namespace waterfill {

inline uint64_t seed = 0x9E3779B97F4A7C15u;

inline uint64_t random(uint64_t below) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % below;
}

inline void damage(std::string& stream) {
    switch (random(5)) {
        case 0: stream.resize(random(stream.size() + 1)); break;
        case 1: stream.append(1 + random(9), char(random(256))); break;
        case 2: for (size_t i = 0; i < stream.size() && i < 24; ++i) if (!random(3)) stream[i] = char(random(256)); break;
        case 3: for (char& c : stream) c = char(random(256)); break;
        default: if (!stream.empty()) stream[random(stream.size())] ^= char(1 << random(8));
    }
}

inline std::vector<Isa> available() {
    std::vector<Isa> isas;
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (machine_has(isa)) isas.push_back(isa);
    return isas;
}

}  // namespace waterfill
