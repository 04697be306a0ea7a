// Fixed-width packing, compiled once per instruction set: eight values at a time, in one register.
#include <algorithm>
#include <cstring>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "packing.h"

namespace waterfill::WATERFILL_ISA {
namespace {

constexpr size_t kGroup = 8;
constexpr uint64_t kOnes = 0x0101010101010101u;

// `width` bits of each byte.
constexpr uint64_t mask_of(unsigned width) { return kOnes * ((1u << width) - 1); }

inline uint64_t load(const uint8_t* from, size_t nbytes = 8) {
    uint64_t x = 0;
    for (size_t i = 0; i < nbytes; ++i) x |= uint64_t(from[i]) << 8 * i;
    return x;
}

inline void store(uint8_t* to, uint64_t x, size_t nbytes = 8) {
    for (size_t i = 0; i < nbytes; ++i) to[i] = uint8_t(x >> 8 * i);
}

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
template <unsigned Width> inline uint64_t spread(uint64_t bits) { return _pdep_u64(bits, mask_of(Width)); }
template <unsigned Width> inline uint64_t gather(uint64_t values) { return _pext_u64(values, mask_of(Width)); }
#else
// Halves are moved apart until each value has a byte of its own: 8 in 64 bits are 4 in 32 and 4 in 32.
template <unsigned Width> inline uint64_t spread(uint64_t x) {
    constexpr uint64_t four = (uint64_t(1) << 4 * Width) - 1, two = (uint64_t(1) << 2 * Width) - 1;
    x = (x & four) | (x >> 4 * Width & four) << 32;
    x = (x & two * 0x0000000100000001u) | (x >> 2 * Width & two * 0x0000000100000001u) << 16;
    constexpr uint64_t one = (uint64_t(1) << Width) - 1;
    return (x & one * 0x0001000100010001u) | (x >> Width & one * 0x0001000100010001u) << 8;
}

template <unsigned Width> inline uint64_t gather(uint64_t x) {
    constexpr uint64_t one = (uint64_t(1) << Width) - 1, two = (uint64_t(1) << 2 * Width) - 1, four = (uint64_t(1) << 4 * Width) - 1;
    x = (x & one * 0x0001000100010001u) | (x >> 8 & one * 0x0001000100010001u) << Width;
    x = (x & two * 0x0000000100000001u) | (x >> 16 & two * 0x0000000100000001u) << 2 * Width;
    return (x & four) | (x >> 32 & four) << 4 * Width;
}
#endif

template <unsigned Width> void unpack(const uint8_t* bytes, size_t nbytes, uint8_t* values, size_t count) {
    size_t at = 0;
    // Eight bytes are read for the few that are wanted, as long as there are eight.
    for (; count >= kGroup && at + 8 <= nbytes; at += Width, values += kGroup, count -= kGroup) store(values, spread<Width>(load(bytes + at)));
    for (; count; at += Width) {
        const size_t here = std::min(count, kGroup);
        store(values, spread<Width>(load(bytes + at, std::min<size_t>(Width, nbytes - at))), here);
        values += here, count -= here;
    }
}

template <unsigned Width> void pack(const uint8_t* values, size_t count, uint8_t* bytes, size_t nbytes) {
    size_t at = 0;
    // And written, for the next group to write over.
    for (; count >= kGroup && at + 8 <= nbytes; at += Width, values += kGroup, count -= kGroup) store(bytes + at, gather<Width>(load(values)));
    for (; count; at += Width) {
        const size_t here = std::min(count, kGroup);
        store(bytes + at, gather<Width>(load(values, here)), std::min<size_t>(Width, nbytes - at));
        values += here, count -= here;
    }
}

void unpack_any(const uint8_t* bytes, size_t nbytes, unsigned width, uint8_t* values, size_t count) {
    switch (width) {
        case 1: return unpack<1>(bytes, nbytes, values, count);
        case 2: return unpack<2>(bytes, nbytes, values, count);
        case 3: return unpack<3>(bytes, nbytes, values, count);
        case 4: return unpack<4>(bytes, nbytes, values, count);
        case 5: return unpack<5>(bytes, nbytes, values, count);
        case 6: return unpack<6>(bytes, nbytes, values, count);
        default: return unpack<7>(bytes, nbytes, values, count);
    }
}

void pack_any(const uint8_t* values, size_t count, unsigned width, uint8_t* bytes, size_t nbytes) {
    switch (width) {
        case 1: return pack<1>(values, count, bytes, nbytes);
        case 2: return pack<2>(values, count, bytes, nbytes);
        case 3: return pack<3>(values, count, bytes, nbytes);
        case 4: return pack<4>(values, count, bytes, nbytes);
        case 5: return pack<5>(values, count, bytes, nbytes);
        case 6: return pack<6>(values, count, bytes, nbytes);
        default: return pack<7>(values, count, bytes, nbytes);
    }
}

}  // namespace

const packing::Kernels& packing_kernels() {
    static constexpr packing::Kernels kernels{unpack_any, pack_any};
    return kernels;
}

}  // namespace waterfill::WATERFILL_ISA
