// Huffman block coder, compiled once per instruction set: plain C++, but shifts and counts of zeros
// take fewer instructions where the machine has BMI2. See docs/format/huffman.md for the bitstream.
#include <cstring>

#include "huffman.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are read and written eight bytes at a time");

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace huffman;

inline size_t at_most(size_t a, size_t b) { return a < b ? a : b; }

// The marker is shifted down with the bits, so that its place tells how many are used up.
constexpr uint64_t kMarker = uint64_t(1) << 63;
constexpr unsigned kLookups = 5;  // between refills: 7 + 5 * 11 bits fit below the marker
constexpr size_t kWindow = 8;     // bytes that a refill reads and a lookup writes
constexpr size_t kRoundSymbols = 32;  // most that a round writes: four entries of six symbols, then a window

// A segment on its way. Between rounds `at` is the byte of the next bit, `used` its place therein.
struct Stream {
    const uint8_t* at;
    unsigned used;
    uint8_t* out;
    uint8_t* end;  // of the segment's symbols
};

inline uint64_t window(const uint8_t* at, unsigned used) {
    uint64_t bits;
    std::memcpy(&bits, at, kWindow);
    return (bits | kMarker) >> used;
}

inline void lookup(const DecodeTable& table, uint64_t& bits, uint8_t*& out) {
    const uint64_t entry = table.entries[bits & (kEntries - 1)], symbols = entry >> 8;
    bits >>= entry & 63;
    std::memcpy(out, &symbols, kWindow);
    out += entry >> 56;
}

// Rounds of `count` streams side by side, as many as surely stay within every buffer.
template <unsigned count>
inline void decode_rounds(const DecodeTable& table, Stream* streams, const uint8_t* readable) {
    const uint8_t* at[count];
    uint8_t* out[count];
    uint64_t bits[count];
    for (unsigned i = 0; i < count; ++i) {
        if (size_t(readable - streams[i].at) < kWindow) return;
        at[i] = streams[i].at;
        out[i] = streams[i].out;
        bits[i] = window(at[i], streams[i].used);
    }
    for (;;) {
        size_t rounds = SIZE_MAX;
        for (unsigned i = 0; i < count; ++i) {
            rounds = at_most(rounds, size_t(streams[i].end - out[i]) / kRoundSymbols);
            rounds = at_most(rounds, size_t(readable - at[i]) / kWindow - 1);
        }
        if (rounds == 0) break;
        do {
            for (unsigned k = 0; k < kLookups; ++k)
                for (unsigned i = 0; i < count; ++i) lookup(table, bits[i], out[i]);
            for (unsigned i = 0; i < count; ++i) {
                const unsigned used = unsigned(__builtin_clzll(bits[i]));
                at[i] += used >> 3;
                bits[i] = window(at[i], used & 7);
            }
        } while (--rounds);
    }
    for (unsigned i = 0; i < count; ++i) streams[i] = {at[i], unsigned(__builtin_clzll(bits[i])), out[i], streams[i].end};
}

// The last symbols of a segment, and whether it ends where its bits do.
Status finish(const DecodeTable& table, Stream stream, const Segment& segment, const uint8_t* readable) {
    const auto advance = [&](unsigned bits) {
        stream.used += bits;
        stream.at += stream.used >> 3;
        stream.used &= 7;
    };
    while (size_t(stream.end - stream.out) >= kWindow && size_t(readable - stream.at) >= kWindow) {
        uint64_t bits = window(stream.at, stream.used);
        lookup(table, bits, stream.out);
        advance(unsigned(__builtin_clzll(bits)) - stream.used);
    }
    const uint8_t* end = segment.data + segment.size;
    while (stream.out < stream.end && stream.at < end) {
        uint32_t bits = 0;
        std::memcpy(&bits, stream.at, at_most(size_t(end - stream.at), sizeof bits));
        const uint32_t index = (bits >> stream.used) & (kEntries - 1);
        *stream.out++ = uint8_t(table.entries[index] >> 8);
        advance(table.first_bits[index]);
    }
    const size_t taken = 8 * size_t(stream.at - segment.data) + stream.used;
    if (stream.out < stream.end || taken > 8 * segment.size) return Status::bits_short;
    if (8 * segment.size - taken > 7) return Status::bits_left;
    return stream.used && *stream.at >> stream.used ? Status::bits_left : Status::ok;
}

Status decode_block(const DecodeBlock& block) {
    Stream streams[kSegments];
    const size_t each = (block.count + block.n_segments - 1) / block.n_segments;
    for (unsigned i = 0; i < block.n_segments; ++i)
        streams[i] = {block.segments[i].data, 0, block.out + at_most(i * each, block.count), block.out + at_most((i + 1) * each, block.count)};
    if (block.n_segments == kSegments)
        decode_rounds<kSegments>(*block.table, streams, block.readable);
    for (unsigned i = 0; i < block.n_segments; ++i) {
        decode_rounds<1>(*block.table, streams + i, block.readable);
        const Status status = finish(*block.table, streams[i], block.segments[i], block.readable);
        if (status != Status::ok) return status;
    }
    return Status::ok;
}

size_t encode_segment(const EncodeSegment& segment) {
    uint8_t* at = segment.out;
    uint64_t bits = 0;
    unsigned used = 0;
    uint32_t unknown = 0;
    const auto put = [&](uint8_t symbol) {
        const uint32_t code = segment.codes[symbol];
        bits |= uint64_t(code & 0xFFFF) << used;
        used += code >> 16;
        unknown |= code == 0;
    };
    const auto flush = [&] {
        std::memcpy(at, &bits, kWindow);
        at += used >> 3;
        bits >>= used & ~7u;
        used &= 7;
    };
    size_t i = 0;
    for (; i + 4 <= segment.count; i += 4) {
        for (unsigned k = 0; k < 4; ++k) put(segment.in[i + k]);
        flush();
    }
    for (; i < segment.count; ++i) put(segment.in[i]);
    flush();
    at += used > 0;
    return unknown ? SIZE_MAX : size_t(at - segment.out);
}

const Kernels kTable{decode_block, encode_segment};

}  // namespace

const huffman::Kernels& huffman_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
