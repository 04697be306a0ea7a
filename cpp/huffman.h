// What the Huffman kernels and their callers share. Plain data and constants only: this header is
// compiled once per instruction set, so a function here would be merged across them by the linker.
//
// The bitstream itself is described in docs/format/huffman.md.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill::huffman {

constexpr unsigned kLongest = 11;  // bits of a code
constexpr uint32_t kEntries = 1u << kLongest;
constexpr unsigned kMostSymbols = 6;  // of one entry
constexpr size_t kBlock = 1 << 16;    // symbols; only the last block has fewer
constexpr size_t kDivided = 1 << 12;  // symbols from which a block is cut into segments
constexpr unsigned kSegments = 5;

// Indexed by the next 11 bits. An entry holds all whole codes among them, at most six:
//   [symbols : 8][sixth symbol : 8] ... [first symbol : 8][bits : 8]
// The bits come lowest, where a shift by the entry needs no field extracted first.
struct DecodeTable {
    uint64_t entries[kEntries];
    uint8_t first_bits[kEntries];  // of the first code alone
};

struct Segment {
    const uint8_t* data;
    size_t size;
};

struct DecodeBlock {
    const DecodeTable* table;
    const Segment* segments;
    unsigned n_segments;
    const uint8_t* readable;  // end of what may be read, at or after the end of each segment
    uint8_t* out;
    size_t count;  // symbols
};

enum class Status { ok, bits_short, bits_left };

struct EncodeSegment {
    const uint32_t* codes;  // of each byte: [length : 16][code, first bit lowest : 16]; 0 for none
    const uint8_t* in;
    size_t count;
    uint8_t* out;  // room for 11 bits a symbol and eight bytes
};

struct Kernels {
    // Writes `count` bytes and none beyond.
    Status (*decode_block)(const DecodeBlock&);
    // Number of bytes written, or SIZE_MAX where a symbol has no code.
    size_t (*encode_segment)(const EncodeSegment&);
};

}  // namespace waterfill::huffman

namespace waterfill::scalar { const huffman::Kernels& huffman_kernels(); }
namespace waterfill::avx2 { const huffman::Kernels& huffman_kernels(); }
namespace waterfill::avx512 { const huffman::Kernels& huffman_kernels(); }
